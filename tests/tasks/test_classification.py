import math

import pytest
import torch
import yaml
from torch import nn

from masklr.callbacks import StepSeed
from masklr.cli import main
from masklr.data import RandomCrop
from masklr.layers import DropConnect, DropConnectLinear, Groups, LowRank, masking
from masklr.models import MLP, Classifier
from masklr.optim import Optim
from masklr.tasks import Classification


def perceptron(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP([64, 32, 10], **options)


def transformer(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(
            "vit_tiny_patch16_224",
            num_classes=10,
            image_size=8,
            patch_size=2,
            in_chans=1,
            backbone_args={"embed_dim": 24, "depth": 2, "num_heads": 2},
        )


def make(model=None, **options):
    defaults = {"optim": Optim(base_lr=0.04), "mean": [0.305], "std": [0.376]}
    return Classification(model or perceptron(), **{**defaults, **options})


def measured_by_hand(task, images, labels):
    """(loss, accuracy) in float64."""
    with torch.no_grad():
        logits = task.model.eval()((images - 0.305) / 0.376).double()
    loss = nn.functional.nll_loss(logits.log_softmax(1), labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def trained(make_digits, make_trainer, tmp_path_factory, read_metrics):
    """120 steps, validations at 60 and 120, and one before the first step."""
    folder = tmp_path_factory.mktemp("trained")
    task = make(perceptron(p=0.2), label_smoothing=0.1)
    trainer = make_trainer(
        folder,
        max_steps=120,
        val_check_interval=60,
        num_sanity_val_steps=-1,
        callbacks=[StepSeed(0)],
        log_every_n_steps=1,
    )
    trainer.fit(task, make_digits(64))
    return {"task": task, "metrics": read_metrics(folder)}


def test_it_learns_and_logs_at_the_exact_steps(trained):
    found = trained["metrics"]
    for key in ("val/loss", "val/accuracy"):
        assert list(found[key]) == [0, 60, 120]
    assert found["val/accuracy"][0] < 0.3
    assert found["val/accuracy"][120] > 0.85
    assert found["val/loss"][120] < 0.5 * found["val/loss"][0]
    assert len(found["train/loss"]) == len(found["train/accuracy"]) == 120
    assert all(0 <= value <= 1 for value in found["train/accuracy"].values())


def test_validation_is_without_masks_and_label_smoothing(trained, digits):
    loss, accuracy = measured_by_hand(trained["task"], digits[2], digits[3])
    assert trained["metrics"]["val/loss"][120] == pytest.approx(loss, rel=1e-5)
    assert trained["metrics"]["val/accuracy"][120] == pytest.approx(accuracy, rel=1e-6)


def test_value_at_step_0_is_that_of_the_untrained_model(trained, digits):
    loss, accuracy = measured_by_hand(make(), digits[2], digits[3])
    assert trained["metrics"]["val/loss"][0] == pytest.approx(loss, rel=1e-5)
    assert trained["metrics"]["val/accuracy"][0] == pytest.approx(accuracy, rel=1e-6)


def test_results_do_not_depend_on_the_batch_size(make_trainer, make_digits, digits, tmp_path):
    task = make()
    results = [
        make_trainer(tmp_path, logger=False).validate(task, make_digits(size), verbose=False)[0]
        for size in (144, 50, 7)
    ]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
    test = make_trainer(tmp_path, logger=False).test(task, make_digits(), verbose=False)[0]
    assert test.keys() == {"test/loss", "test/accuracy", "step"}


def test_label_smoothing_mixes_the_target_with_all_classes(digits):
    images, labels = digits[0][:16], digits[1][:16]
    task = make(label_smoothing=0.2)
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        loss = task.training_step((images, labels), 0)
    target = 0.8 * nn.functional.one_hot(labels, 10) + 0.02
    expected = -(target * task(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_forward_is_the_logits_of_normalized_images_of_bytes_or_floats(digits):
    task = make().eval()
    images = digits[2][:5]
    torch.testing.assert_close(task(images), task.model((images - 0.305) / 0.376))
    torch.testing.assert_close(task((images * 255).round().to(torch.uint8)), task(images), rtol=1e-5, atol=1e-5)


def test_predictions_are_logits_with_labels_and_positions(make_trainer, make_digits, digits, tmp_path):
    task = make(transformer())
    outputs = make_trainer(tmp_path, logger=False).predict(task, make_digits(50))
    found = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    assert found.keys() == {"logits", "labels", "positions"}
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], task.eval()(digits[2]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["labels"], digits[3])
    assert torch.equal(found["positions"], torch.arange(144))


def test_plain_loaders_of_images_and_labels_train(make_trainer, plain_loaders, tmp_path, read_metrics):
    make_trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=1).fit(make(), *plain_loaders())
    assert list(read_metrics(tmp_path)["val/accuracy"]) == [10, 20]


def test_evaluation_before_training_leaves_nothing_behind(make_trainer, make_digits, tmp_path):
    task, data = make(), make_digits()
    before = make_trainer(tmp_path, logger=False).validate(task, data, verbose=False)[0]
    trainer = make_trainer(tmp_path, logger=False, max_steps=2, val_check_interval=2)
    trainer.fit(task, data)
    after = trainer.callback_metrics
    again = make_trainer(tmp_path, logger=False).validate(task, data, verbose=False)[0]
    assert after["val/loss"].item() == pytest.approx(again["val/loss"], rel=1e-6)
    assert before["val/loss"] != pytest.approx(again["val/loss"], rel=1e-4)


def test_masks_are_put_into_the_model_and_act_in_training_alone(digits):
    masks = {
        "backbone.blocks.*.mlp.fc1": DropConnect(0.5, per="sample"),
        "backbone.blocks.0.attn.proj": Groups(0.5, group_size=4),
    }
    torch.manual_seed(0)
    plain, task = make(transformer()), make(transformer(), masks=masks)
    assert list(task.state_dict()) == list(plain.state_dict())
    blocks = task.model.backbone.blocks
    assert all(type(block.mlp.fc1) is DropConnectLinear and block.mlp.fc1.p == 0.5 for block in blocks)
    assert len(masking(task.model)) == 3
    images = digits[0][:8]
    with torch.no_grad():
        assert torch.equal(task.eval()(images), plain.eval()(images))
        task.train()
        assert not torch.equal(task(images), task(images))


RECIPE = """
trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 0, enable_progress_bar: false}
model:
  class_path: masklr.tasks.Classification
  init_args:
    model: {class_path: masklr.models.MLP, init_args: {sizes: [64, 8, 10]}}
    masks:
      layers.[0]: {class_path: masklr.layers.DropConnect, init_args: {p: 0.25, per: sample}}
      "**.0": {class_path: masklr.layers.Dropout, init_args: {p: 0.5}}
data: {class_path: masklr.data.Digits, init_args: {batch_size: 32}}
"""


@pytest.mark.parametrize("pattern", ["dropouts.*", "dropouts.7", "layers.*"])
def test_masks_come_from_a_recipe_and_a_wrong_pattern_ends_it_with_one_sentence(pattern, tmp_path, capsys, monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASKLR_RUN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("**.0", pattern))
    code = main(["fit", f"--config={path}", f"--runs={tmp_path / 'runs'}", "--wandb=off"])
    lines = capsys.readouterr().err.strip().splitlines()
    if pattern == "dropouts.*":
        assert code == 0
        config = yaml.safe_load((tmp_path / "runs/run/version_0/config.yaml").read_text())
        masks = config["model"]["init_args"]["masks"]
        assert masks["layers.[0]"] == {
            "class_path": "masklr.layers.DropConnect",
            "init_args": {"p": 0.25, "per": "sample"},
        }
        assert masks["dropouts.*"]["init_args"] == {"p": 0.5}
    else:
        assert code == 2
        assert lines[-1].startswith("masklr: error: Expected")
        assert pattern in lines[-1] or "'layers.0'" in lines[-1]
        assert not (tmp_path / "runs/run").exists()


def test_low_rank_layers_are_trained(make_trainer, make_digits, tmp_path):
    task = make(masks={"layers.0": LowRank(4)})
    before = task.model.layers[0].effective_weight().detach().clone()
    make_trainer(tmp_path, logger=False, max_steps=2, limit_val_batches=0).fit(task, make_digits())
    after = task.model.layers[0].effective_weight().detach()
    assert torch.linalg.matrix_rank(after) == 4
    assert not torch.equal(before, after)


@pytest.mark.usefixtures("compilable")
def test_compiled_task_trains_with_the_same_losses_under_the_same_keys(
    make_trainer, make_digits, tmp_path, read_metrics
):
    losses, keys = [], []
    for compile_model in (False, True):
        task = make(masks={"layers.1": DropConnect(0.5)}, compile=compile_model)
        if compile_model:
            task.model.compile(backend="eager")  # tracing is what could go wrong here, not code generation
        folder = tmp_path / str(compile_model)
        make_trainer(folder, max_steps=4, val_check_interval=2, callbacks=[StepSeed(0)]).fit(task, make_digits())
        losses.append(read_metrics(folder))
        keys.append(list(task.state_dict()))
    assert keys[0] == keys[1]
    for key in ("train/loss", "val/loss", "val/accuracy"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-4)


def test_resumed_run_is_bitwise_the_uninterrupted_one(make_digits, make_trainer, tmp_path):
    def fit(steps, checkpoint=None):
        task = make(
            masks={"layers.*": DropConnect(0.3)},
            augmentation=[RandomCrop(1)],
            optim=Optim(base_lr=0.02, schedule="constant", warmup=2),
        )
        trainer = make_trainer(tmp_path, logger=False, max_steps=steps, callbacks=[StepSeed(3)])
        torch.manual_seed(steps)  # what was drawn before must not matter
        trainer.fit(task, make_digits(), **({"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}))
        return task, trainer

    fit(3)[1].save_checkpoint(tmp_path / "step3.ckpt")
    resumed, whole = fit(6, tmp_path / "step3.ckpt")[0], fit(6)[0]
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("model", [perceptron, transformer])
def test_training_step_reads_nothing_from_the_device(model):
    # On the meta device there is nothing to read: `.item()` and branches on values raise, as they would wait on a GPU.
    task = make(model(), label_smoothing=0.1).to("meta")
    images = torch.empty(4, 1, 8, 8, device="meta", dtype=torch.uint8)
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        loss = task.training_step((images, torch.zeros(4, device="meta", dtype=torch.long)), 0)
    loss.backward()


def test_bf16_trains(make_trainer, make_digits, tmp_path, read_metrics):
    trainer = make_trainer(tmp_path, max_steps=3, precision="bf16-mixed", val_check_interval=3)
    trainer.fit(make(transformer(), masks={"backbone.blocks.*.mlp.fc2": DropConnect(0.2)}), make_digits())
    assert all(math.isfinite(value) for value in read_metrics(tmp_path)["train/loss"].values())


def test_another_number_of_classes_raises_before_the_first_step(make_trainer, make_digits, tmp_path):
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match="Expected a `model` of as many classes as the data has, 10, got 9"):
            getattr(make_trainer(tmp_path, logger=False, max_steps=1), stage)(make(MLP([64, 9])), make_digits())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing": 1.0}, r"Expected `label_smoothing` in \[0, 1\), got 1\.0"),
        ({"label_smoothing": -0.1}, r"Expected `label_smoothing` in \[0, 1\), got -0\.1"),
        ({"std": [0.0]}, r"Expected `std` above 0, got \[0\.0\]"),
        ({"model": transformer(), "mean": [0.1, 0.2]}, r"Expected `mean` of 1 values \(channels\), got \[0\.1, 0\.2\]"),
        ({"masks": {"layers.7": DropConnect(0.5)}}, r"Expected `masks` to match something, got 'layers\.7'"),
        ({"masks": {"dropouts.0": DropConnect(0.5)}}, "DropConnect can replace, got 'dropouts.0'"),
    ],
)
def test_bad_values_raise_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_images_that_the_model_was_not_built_for_are_refused_before_they_broadcast():
    with pytest.raises(ValueError, match=r"Expected images of 1 x 8 x 8 \(channels x height x width\), got 3 x 8 x 8"):
        make(transformer())(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    # A mean of three channels would make three of one.
    task = make(Classifier("resnet10t", 10), mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    with pytest.raises(ValueError, match=r"Expected images of 3 x any x any .*, got 1 x 8 x 8"):
        task(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
