import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from masklr.callbacks import StepSeed
from masklr.data import RandomCrop
from masklr.masks import fixed_patch_split
from masklr.optim import Optim


class Splits(pl.Callback):
    """What the model was given: (training, positions, visible patches) of every batch."""

    def __init__(self):
        self.training, self.validation, self._batch = [], [], None

    def setup(self, trainer, task, stage):
        self.handle = task.model.register_forward_pre_hook(self._note)

    def teardown(self, trainer, task, stage):
        self.handle.remove()

    def on_validation_batch_start(self, trainer, task, batch, *_):
        self._batch = batch

    def _note(self, model, args):
        visible = args[1][0].clone()
        if model.training:
            self.training.append(visible)
        else:
            self.validation.append((self._batch[2].tolist(), visible))


class Rates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.rates += [optimizer.param_groups[0]["lr"]]


class DigitStream(IterableDataset):
    """The training images without end or length."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __iter__(self):
        while True:
            yield from zip(self.images, self.labels, strict=True)


def val_loss(make_trainer, folder, task, data):
    return make_trainer(folder, logger=False).validate(task, data, verbose=False)[0]


@pytest.fixture(scope="module")
def pretrained(make_task, make_digits, make_trainer, tmp_path_factory, read_metrics):
    """12 steps of two micro-batches, a validation every 5 micro-batches but one, and one before the first step."""
    folder = tmp_path_factory.mktemp("pretrained")
    splits, rates = Splits(), Rates()
    task = make_task(optim=Optim(base_lr=0.02, warmup=0.25))
    trainer = make_trainer(
        folder,
        max_steps=12,
        accumulate_grad_batches=4,
        val_check_interval=20,
        num_sanity_val_steps=-1,
        log_every_n_steps=50,
        callbacks=[StepSeed(7), splits, rates],
    )
    trainer.fit(task, make_digits(64))
    return {"task": task, "trainer": trainer, "splits": splits, "rates": rates.rates, "metrics": read_metrics(folder)}


def test_val_loss_is_logged_at_step_0_and_at_the_exact_steps_of_validation(pretrained):
    found = pretrained["metrics"]
    for key in ("val/loss", "val/loss_of_patch_means"):
        assert list(found[key]) == [0, 5, 10]
    assert found["val/loss"][10] < found["val/loss"][0]


def test_val_loss_at_the_start_is_that_of_the_untrained_model(pretrained, make_task, digits):
    task = make_task().eval()
    images = digits[2]
    split = fixed_patch_split(torch.arange(len(images)), (4, 4), 0.75, seed=0)
    with torch.no_grad():
        loss = task.model((images - 0.305) / 0.376, split).loss.item()
    assert pretrained["metrics"]["val/loss"][0] == pytest.approx(loss, rel=1e-5)


def test_loss_of_patch_means_is_that_of_predicting_zero(pretrained, make_task, digits):
    task = make_task().eval()
    nn.init.zeros_(task.model.decoder_head.weight)
    images = digits[2]
    with torch.no_grad():
        split = fixed_patch_split(torch.arange(len(images)), (4, 4), 0.75, seed=0)
        loss = task.model(task.prepared(images), split).loss.item()
    measured = pretrained["metrics"]["val/loss_of_patch_means"]
    # The target's own mean is zero up to rounding, so its variance is its mean square.
    assert measured == pytest.approx(dict.fromkeys((0, 5, 10), loss), rel=1e-4)


def test_micro_batches_of_one_step_get_different_masks(pretrained):
    splits = pretrained["splits"].training
    assert len(splits) == 48
    assert all(visible.shape == (16, 4) for visible in splits)
    for step in range(12):
        four = splits[4 * step : 4 * step + 4]
        assert len({tuple(visible.flatten().tolist()) for visible in four}) == 4
    assert len({tuple(visible.flatten().tolist()) for visible in splits}) == 48


def test_masks_of_a_position_are_the_same_at_every_validation(pretrained):
    found = {}
    for positions, visible in pretrained["splits"].validation:
        for position, patches in zip(positions, visible.tolist(), strict=True):
            found.setdefault(position, []).append(patches)
    assert sorted(found) == list(range(144))
    assert all(len(masks) == 3 and masks[0] == masks[1] == masks[2] for masks in found.values())
    assert len({tuple(masks[0]) for masks in found.values()}) > 100


def test_learning_rate_is_scaled_by_the_global_batch_and_follows_warm_up_and_cosine(pretrained):
    peak = 0.02 * 64 / 256
    rise = [peak * (step + 1) / 3 for step in range(3)]
    fall = [peak * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert pretrained["rates"] == pytest.approx(rise + fall)


def test_val_loss_depends_on_neither_batch_size_nor_generator(make_trainer, make_task, make_digits, tmp_path):
    task = make_task()
    results = []
    for batch_size, seed in ((144, 0), (7, 1), (50, 2)):
        torch.manual_seed(seed)
        results.append(val_loss(make_trainer, tmp_path, task, make_digits(batch_size)))
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
    other = val_loss(make_trainer, tmp_path, make_task(mask_seed=1), make_digits(144))
    assert other["val/loss"] != pytest.approx(results[0]["val/loss"], rel=1e-6)


def test_validation_draws_nothing(make_trainer, make_task, make_digits, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    val_loss(make_trainer, tmp_path, make_task(), make_digits(50))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_without_positions_are_counted(make_trainer, make_task, make_digits, plain_loaders, tmp_path):
    task = make_task()
    ours = val_loss(make_trainer, tmp_path, task, make_digits(50))
    for batch_size in (50, 37):
        plain = val_loss(make_trainer, tmp_path, task, plain_loaders(val_batch_size=batch_size)[1])
        assert plain == pytest.approx(ours, rel=1e-6)


def test_test_step_logs_the_loss_of_the_test_split(make_trainer, make_task, make_digits, tmp_path):
    result = make_trainer(tmp_path, logger=False).test(make_task(), make_digits(), verbose=False)[0]
    assert result["test/loss"] > result["test/loss_of_patch_means"] > 0


def test_default_sanity_check_leaves_nothing_behind(
    make_trainer, make_task, make_digits, plain_loaders, tmp_path, read_metrics
):
    task = make_task()
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=2, num_sanity_val_steps=2, limit_train_batches=2)
    trainer.fit(task, *plain_loaders())
    found = read_metrics(tmp_path)
    assert list(found["val/loss"]) == [2]
    # Positions counted during the check would shift the masks.
    expected = val_loss(make_trainer, tmp_path, task, make_digits())
    assert found["val/loss"][2] == pytest.approx(expected["val/loss"], rel=1e-6)


def test_plain_loaders_of_images_and_labels_train(make_trainer, make_task, plain_loaders, tmp_path, read_metrics):
    trainer = make_trainer(tmp_path, max_epochs=3, check_val_every_n_epoch=1)
    trainer.fit(make_task(optim=Optim(base_lr=0.02)), *plain_loaders())
    found = read_metrics(tmp_path)
    assert list(found["val/loss"]) == [10, 20, 30]
    assert found["val/loss"][30] < found["val/loss"][10]
    assert all(math.isfinite(value) for value in found["train/loss"].values())


def test_stream_without_length_trains_for_max_steps(make_trainer, make_task, digits, plain_loaders, tmp_path):
    rates = Rates()
    stream = DataLoader(DigitStream(*digits[:2]), batch_size=32)
    trainer = make_trainer(tmp_path, max_steps=6, val_check_interval=3, callbacks=[rates])
    trainer.fit(make_task(optim=Optim(base_lr=0.02, warmup=2)), stream, plain_loaders()[1])
    assert trainer.global_step == 6
    peak = 0.02 * 32 / 256
    assert rates.rates == pytest.approx(
        [peak / 2, peak, *(peak * (1 + math.cos(math.pi * s / 4)) / 2 for s in range(4))]
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_precision_and_gradient_clipping_run_and_train(make_trainer, make_task, make_digits, tmp_path, precision, clip):
    task = make_task(optim=Optim(base_lr=0.02, warmup=0.0))
    norms = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer, task, optimizer):
            grads = [p.grad for p in task.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    trainer = make_trainer(tmp_path, max_steps=3, precision=precision, gradient_clip_val=clip, callbacks=[Norms()])
    trainer.fit(task, make_digits())
    assert norms
    assert all(p.isfinite().all() for p in task.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in task.named_parameters())
    assert (max(norms) <= 0.0101) == (clip is not None)
    assert all(p.dtype == torch.float32 for p in task.parameters())


@pytest.mark.usefixtures("compilable")
def test_compiled_task_trains_with_the_same_losses_under_the_same_keys(
    make_trainer, make_task, make_digits, tmp_path, read_metrics
):
    losses, keys = [], []
    for compile_model in (False, True):
        task = make_task(compile=compile_model)
        if compile_model:
            task.model.compile(backend="eager")  # tracing is what could go wrong here, not code generation
        folder = tmp_path / str(compile_model)
        make_trainer(folder, max_steps=4, val_check_interval=2, callbacks=[StepSeed(0)]).fit(task, make_digits())
        losses.append(read_metrics(folder))
        keys.append(list(task.state_dict()))
    assert keys[0] == keys[1]
    for key in ("train/loss", "val/loss"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-4)


def test_forward_is_the_encoding_of_normalized_whole_images(make_task, digits):
    task = make_task().eval()
    images = digits[2][:5]
    tokens = task(images)
    assert tokens.shape == (5, 17, 24)
    torch.testing.assert_close(tokens, task.model.encoder.forward_features((images - 0.305) / 0.376))
    torch.testing.assert_close(task((images * 255).round().to(torch.uint8)), tokens, rtol=1e-5, atol=1e-5)


def test_predictions_are_mean_patch_tokens_with_labels_and_positions(
    make_trainer, make_task, make_digits, digits, tmp_path
):
    task = make_task(model={"encoder_args": {"reg_tokens": 2}})
    outputs = make_trainer(tmp_path, logger=False).predict(task, make_digits(50))
    with torch.no_grad():
        features = task.eval()(digits[2])[:, 3:].mean(1)
    torch.testing.assert_close(torch.cat([out["features"] for out in outputs]), features, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([out["labels"] for out in outputs]), digits[3])
    assert torch.equal(torch.cat([out["positions"] for out in outputs]), torch.arange(144))


def test_predictions_of_plain_batches_have_what_the_batch_has(make_trainer, make_task, plain_loaders, tmp_path):
    output = make_trainer(tmp_path, logger=False).predict(make_task(), plain_loaders()[1])[0]
    assert output.keys() == {"features", "labels"}
    assert output["features"].shape == (50, 24)


def test_reconstruction_is_in_the_range_of_images_and_keeps_visible_pixels(make_task, digits):
    task = make_task().eval()
    images = digits[2][:6]
    with torch.no_grad():
        visible, reconstruction = task.reconstruct(images)
    assert visible.shape == reconstruction.shape == images.shape
    assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
    masked = task.fixed_split(torch.arange(6))[1]
    is_masked = torch.zeros(6, 16, dtype=torch.bool).scatter(1, masked, True)
    for pictures in (visible, reconstruction):
        kept = task.model.patchify(pictures)[~is_masked]
        torch.testing.assert_close(kept, task.model.patchify(images)[~is_masked], rtol=0, atol=1e-6)
    # Hidden patches have the value of the mean.
    torch.testing.assert_close(task.model.patchify(visible)[is_masked], torch.full((72, 4), 0.305))
    other, _ = task.reconstruct(images, torch.arange(1, 7))
    assert torch.equal(task.fixed_split(torch.arange(1, 7))[1][:5], masked[1:])
    assert not torch.equal(other, visible)


def test_augmentation_is_drawn_inside_the_training_step_only(make_task, make_digits, make_trainer, tmp_path):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def forward(self, images):
            self.shapes.append((tuple(images.shape), images.dtype))
            return images

    counted = Counted()
    task = make_task(augmentation=[RandomCrop(1), counted])
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[StepSeed(0)])
    trainer.fit(task, make_digits())
    assert counted.shapes == [((32, 1, 8, 8), torch.uint8)] * 2


def test_training_step_reads_nothing_from_the_device(make_task):
    # On the meta device there is nothing to read: `.item()` and branches on values raise, as they would wait on a GPU.
    task = make_task().to("meta")
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        loss = task.training_step((torch.empty(4, 1, 8, 8, device="meta", dtype=torch.uint8), None), 0)
    loss.backward()
    assert task.model.decoder_head.weight.grad.shape == (4, 16)


def test_resumed_run_is_bitwise_the_uninterrupted_one(make_task, make_digits, make_trainer, tmp_path):
    def fit(steps, checkpoint=None):
        task = make_task(optim=Optim(base_lr=0.02, schedule="constant", warmup=2), augmentation=[RandomCrop(1)])
        trainer = make_trainer(tmp_path, logger=False, max_steps=steps, callbacks=[StepSeed(3)])
        torch.manual_seed(steps)  # what was drawn before must not matter
        options = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}
        trainer.fit(task, make_digits(), **options)
        return task, trainer

    _, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "step3.ckpt")
    resumed, _ = fit(6, tmp_path / "step3.ckpt")
    whole, _ = fit(6)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"std": [0.0]}, r"Expected `std` above 0, got \[0.0\]"),
        ({"mean": [0.1, 0.2]}, r"Expected `mean` of 1 values \(channels\), got \[0.1, 0.2\]"),
        ({"std": [0.1, 0.2, 0.3]}, r"Expected `std` of 1 values"),
    ],
)
def test_bad_normalization_raises(make_mae, options, sentence):
    from masklr.tasks import Pretraining

    with pytest.raises(ValueError, match=sentence):
        Pretraining(make_mae(), **options)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1, 8, 10)])
def test_images_that_the_model_was_not_built_for_are_refused_before_they_broadcast(make_task, shape):
    task = make_task()
    with pytest.raises(ValueError, match=r"Expected images of 1 x 8 x 8 \(channels x height x width\), got"):
        task(torch.zeros(shape, dtype=torch.uint8))


def test_masks_are_put_into_the_model_and_act_in_training_alone(make_mae, make_task, digits):
    from masklr.layers import DropConnect, DropConnectLinear

    masks = {"encoder.blocks.*.mlp.fc1": DropConnect(0.5), "decoder_blocks.0.mlp.fc2": DropConnect(0.25, per="sample")}
    plain, task = make_task(), make_task(masks=masks)
    assert list(task.state_dict()) == list(plain.state_dict())
    masked = {name: layer.p for name, layer in task.model.named_modules() if type(layer) is DropConnectLinear}
    assert masked == {
        "encoder.blocks.0.mlp.fc1": 0.5,
        "encoder.blocks.1.mlp.fc1": 0.5,
        "decoder_blocks.0.mlp.fc2": 0.25,
    }
    images = digits[2][:4]
    with torch.no_grad():
        assert torch.equal(task.eval()(images), plain.eval()(images))
        task.train()
        assert not torch.equal(task(images), task(images))
    with pytest.raises(ValueError, match=r"Expected `masks` to match something, got 'encoder\.blocks\.2'"):
        make_task(masks={"encoder.blocks.2": DropConnect(0.5)})


def test_evaluation_before_training_leaves_nothing_behind(make_trainer, make_task, make_digits, tmp_path):
    task, data = make_task(), make_digits()
    val_loss(make_trainer, tmp_path, task, data)
    trainer = make_trainer(tmp_path, logger=False, max_steps=2, val_check_interval=2)
    trainer.fit(task, data)
    again = val_loss(make_trainer, tmp_path, task, data)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(again["val/loss"], rel=1e-6)


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_random_ratios_and_partial_predictions_train_and_validation_is_fixed(
    make_trainer, make_task, make_digits, tmp_path, read_metrics, decoder
):
    model = {"decoder": decoder, "mask_ratio": (0.4, 0.9), "prediction_ratio": 0.5}
    shapes = {True: [], False: []}

    class Shapes(pl.Callback):
        def setup(self, trainer, task, stage):
            task.model.register_forward_pre_hook(self.note)

        def note(self, model, args):
            shapes[model.training].append(tuple(part.shape[1] for part in args[1]))

    task = make_task(model=model, optim=Optim(base_lr=0.02))
    trainer = make_trainer(tmp_path, max_steps=12, val_check_interval=6, callbacks=[StepSeed(0), Shapes()])
    trainer.fit(task, make_digits())
    # Validation: the middle of the interval, 0.65 of 16 patches, and all of the masked ones predicted.
    assert set(shapes[False]) == {(6, 10)}
    assert all(predicted == round((16 - visible) * 0.5) for visible, predicted in shapes[True])
    assert all(2 <= visible <= 10 for visible, _ in shapes[True])
    assert len(set(shapes[True])) > 3
    found = read_metrics(tmp_path)["val/loss"]
    assert found[12] < found[6]


def test_validation_loss_does_not_depend_on_the_prediction_ratio_of_training(
    make_trainer, make_task, make_digits, tmp_path
):
    losses = [
        val_loss(make_trainer, tmp_path, make_task(model={"decoder": "cross", "prediction_ratio": r}), make_digits())
        for r in (1.0, 0.25)
    ]
    assert losses[0] == losses[1]


def test_schedule_moves_the_mask_ratio_of_training_alone_with_partial_predictions(
    make_trainer, make_task, make_digits, tmp_path
):
    from masklr.callbacks import MaskSchedule

    task = make_task(model={"decoder": "cross", "prediction_ratio": 0.5, "mask_ratio": 0.75})
    splits = Splits()
    schedule = MaskSchedule(start=0.5, end=0.875, begin=0.5, until=0.5, what="mask_ratio", module="model")
    trainer = make_trainer(tmp_path, max_steps=4, val_check_interval=2, callbacks=[StepSeed(0), schedule, splits])
    trainer.fit(task, make_digits())
    assert [visible.shape[1] for visible in splits.training] == [8, 8, 2, 2]
    assert {len(visible) for _, rows in splits.validation for visible in rows.tolist()} == {4}
