"""From a pretraining run to a classifier: fine-tuned, probed, from scratch; the way there through the command line."""

import copy

import pytest
import pytorch_lightning as pl
import torch
import yaml
from timm.layers import resample_abs_pos_embed
from torch import nn

from masklr.callbacks import FinalTest, StepSeed
from masklr.cli import main
from masklr.data import Mixing
from masklr.models import Classifier
from masklr.optim import Optim
from masklr.summary import series
from masklr.tasks import Classification

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a short run of a recipe that pretrains."""
    folder = tmp_path_factory.mktemp("pretraining")
    recipe = {
        "name": "pretrain",
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "masklr.tasks.Pretraining",
            "init_args": {
                "model": {
                    "class_path": "masklr.models.MaskedAutoencoder",
                    "init_args": {
                        "encoder_args": SIZES,
                        "image_size": 8,
                        "patch_size": 2,
                        "in_chans": 1,
                        "mask_ratio": [0.5, 0.75],
                        "decoder": "cross",
                        "prediction_ratio": 0.5,
                        "decoder_dim": 16,
                        "decoder_depth": 1,
                        "decoder_heads": 2,
                    },
                },
                "mean": [0.305],
                "std": [0.376],
                "uniformity_weight": 0.01,
            },
        },
        "data": {"class_path": "masklr.data.Digits", "init_args": {"batch_size": 64}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(path), "--runs", str(folder / "runs"), "--wandb", "off"]) == 0
    return folder / "runs" / "pretrain" / "version_0"


def classifier(backbone, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(backbone if isinstance(backbone, str) else str(backbone), num_classes=10, **options)


def weights_of(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {k.removeprefix("model.encoder."): t for k, t in state.items() if k.startswith("model.encoder.")}


def make(model, **options):
    return Classification(model, **{"optim": Optim(base_lr=0.01), "mean": [0.305], "std": [0.376], **options})


@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_backbone_of_a_run_has_its_architecture_and_its_weights_bitwise(pretrained, of):
    source = pretrained if of == "run" else next((pretrained / "checkpoints").glob("step=*.ckpt"))
    model = classifier(source, backbone_args={"drop_path_rate": 0.2, "global_pool": "avg"})
    expected = weights_of(pretrained)
    assert model.backbone.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in model.backbone.state_dict().items())
    assert (model.image_size, model.in_chans, model.num_features) == ((8, 8), 1, 24)
    assert model.backbone.blocks[0].attn.num_heads == 2
    assert model.backbone.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    images = torch.randn(3, 1, 8, 8)
    tokens = model.eval().backbone.forward_features(images)
    torch.testing.assert_close(model(images), model.head(tokens[:, 1:].mean(1)), rtol=1e-5, atol=1e-5)


def test_backbone_of_a_run_takes_images_of_another_size(pretrained):
    model = classifier(pretrained, image_size=12)
    expected = resample_abs_pos_embed(weights_of(pretrained)["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.backbone.pos_embed, expected)
    assert model(torch.randn(2, 1, 12, 12)).shape == (2, 10)


def test_weights_of_a_run_go_into_a_named_backbone(pretrained, tmp_path):
    options = {"image_size": 8, "patch_size": 2, "in_chans": 1, "backbone_args": SIZES}
    file = tmp_path / "encoder.safetensors"
    assert main(["export", str(pretrained), "--out", str(file)]) == 0
    expected = weights_of(pretrained)
    for source in (pretrained, file):
        model = classifier("vit_tiny_patch16_224", weights=str(source), **options)
        assert all(torch.equal(t, expected[key]) for key, t in model.backbone.state_dict().items())


def test_frozen_backbone_stays_bitwise_and_its_head_learns(pretrained, make_trainer, make_digits, tmp_path):
    model = classifier(pretrained, frozen=True, head_norm=True, backbone_args={"drop_path_rate": 0.5})
    before = copy.deepcopy(model.state_dict())
    optim = Optim(optimizer="sgd", base_lr=0.5, momentum=0.9, weight_decay=0.0)
    trainer = make_trainer(tmp_path, max_steps=6, val_check_interval=6, callbacks=[StepSeed(0)])
    trainer.fit(make(model, optim=optim), make_digits())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == key.startswith("backbone."), key
    assert model.training
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == model.head_norm.training == mode
        assert not any(part.training for part in model.backbone.modules())
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == ["head.bias", "head.weight"]


def test_norm_before_the_head_standardizes_and_has_no_parameters(pretrained):
    model, plain = (classifier(pretrained, head_norm=h) for h in (True, False))
    images = torch.randn(64, 1, 8, 8)
    seen = []
    model.head.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model(images)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(24), rtol=0, atol=1e-5)
    features = model.features(images)
    torch.testing.assert_close(
        seen[0].var(0, correction=0), features.var(0, correction=0) / (features.var(0, correction=0) + 1e-6)
    )
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_loss_of_mixtures_is_that_of_soft_labels(pretrained, digits):
    task = make(classifier(pretrained), mixing=Mixing(), label_smoothing=0.1)
    logged = {}
    task.log = lambda key, value, **_: logged.update({key: value})
    images, labels = digits[2][:32], digits[3][:32]
    torch.manual_seed(4)
    loss = task.training_step((images, labels), 0)
    torch.manual_seed(4)
    mixed, others, share = task.mixing(task.prepared(images), labels)
    target = share[:, None] * nn.functional.one_hot(labels, 10) + (1 - share[:, None]) * nn.functional.one_hot(
        others, 10
    )
    logits = task.model(mixed)
    expected = nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    hits = target.gather(1, logits.argmax(1, keepdim=True)).mean()
    torch.testing.assert_close(logged["train/accuracy"], hits, rtol=1e-5, atol=0.0)
    assert 0 < share.mean() < 1


@pytest.mark.parametrize("averaged", [False, True])
def test_last_weights_or_their_average_are_tested_once_at_the_end(
    pretrained, make_trainer, make_digits, tmp_path, averaged
):
    model = classifier(pretrained, backbone_args={"drop_path_rate": 0.3})  # which is off where it is tested
    task, data = make(model, optim=Optim(base_lr=0.05)), make_digits()
    average = [pl.callbacks.EMAWeightAveraging(decay=0.5)] if averaged else []
    trainer = make_trainer(tmp_path, max_steps=8, val_check_interval=4, callbacks=[StepSeed(0), *average, FinalTest()])
    trainer.fit(task, data)
    found = series(tmp_path)
    assert found["test/accuracy"] == [(8, pytest.approx(trainer.callback_metrics["test/accuracy"].item()))]
    result = make_trainer(tmp_path / "test", logger=False).test(task, data, verbose=False)[0]
    assert found["test/accuracy"][0][1] == pytest.approx(result["test/accuracy"], abs=1e-6)
    assert found["test/loss"][0][1] == pytest.approx(result["test/loss"], rel=1e-5)
    assert found["val/accuracy"][-1][0] == 8


@pytest.mark.parametrize("limit", [1, 0.5])
def test_final_test_is_of_as_many_batches_as_the_trainer_allows(pretrained, make_trainer, make_digits, tmp_path, limit):
    task, data = make(classifier(pretrained)), make_digits()
    make_trainer(tmp_path, max_steps=1, callbacks=[FinalTest()], limit_test_batches=limit).fit(task, data)
    result = make_trainer(tmp_path / "test", logger=False, limit_test_batches=limit)
    expected = result.test(task, data, verbose=False)[0]["test/loss"]
    assert series(tmp_path)["test/loss"] == [(1, pytest.approx(expected, rel=1e-5))]
    whole = make_trainer(tmp_path / "whole", logger=False).test(task, data, verbose=False)[0]["test/loss"]
    assert expected != pytest.approx(whole, rel=1e-4)


def test_final_test_without_a_test_split_is_refused_before_training(pretrained, make_trainer, plain_loaders, tmp_path):
    task = make(classifier(pretrained))
    with pytest.raises(ValueError, match="Expected a data module with a test split"):
        make_trainer(tmp_path, max_steps=1, callbacks=[FinalTest()]).fit(task, *plain_loaders())
    assert task.trainer.global_step == 0


def test_final_test_of_data_whose_test_split_is_missing_is_refused_before_training(
    pretrained, make_trainer, make_digits, tmp_path
):
    class NoTest(type(make_digits())):
        def test_images(self):
            raise ValueError("Expected `test`, got None.")

    task, data = make(classifier(pretrained)), NoTest(batch_size=64)
    with pytest.raises(ValueError, match="Expected `test`, got None"):
        make_trainer(tmp_path, max_steps=1, callbacks=[FinalTest()]).fit(task, data)
    assert task.trainer.global_step == 0

    class Two(type(make_digits())):
        def test_dataloader(self):
            return [super().test_dataloader()] * 2

    with pytest.raises(ValueError, match="one test loader, got 2"):
        make_trainer(tmp_path, max_steps=1, callbacks=[FinalTest()]).fit(task, Two(batch_size=64))


def test_final_test_changes_nothing(pretrained, make_trainer, make_digits, tmp_path):
    states = []
    for callbacks in ([], [FinalTest()]):
        task = make(classifier(pretrained), mixing=Mixing())
        trainer = make_trainer(tmp_path / str(len(callbacks)), max_steps=3, callbacks=[StepSeed(0), *callbacks])
        trainer.fit(task, make_digits())
        states.append((task.state_dict(), torch.get_rng_state(), task.training))
    assert all(torch.equal(t, states[1][0][key]) for key, t in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_run_that_began_from_timms_weights_downloads_nothing(pretrained, tmp_path):
    recipe = yaml.safe_load((pretrained / "config.yaml").read_text())
    arguments = recipe["model"]["init_args"]["model"]["init_args"]
    arguments["encoder_args"] = {**arguments["encoder_args"], "pretrained": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "last.ckpt").write_bytes((pretrained / "checkpoints" / "last.ckpt").read_bytes())
    model = classifier(tmp_path)
    assert torch.equal(model.backbone.norm.weight, weights_of(pretrained)["norm.weight"])


def test_final_test_before_what_averages_weights_is_refused_before_training(
    pretrained, make_trainer, make_digits, tmp_path
):
    task = make(classifier(pretrained))
    callbacks = [FinalTest(), pl.callbacks.EMAWeightAveraging()]
    with pytest.raises(ValueError, match="Expected `EMAWeightAveraging` before `FinalTest` among the callbacks"):
        make_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(task, make_digits())
    assert task.trainer.global_step == 0


RECIPES = [
    "finetune_cifar10",
    "scratch_cifar10",
    "probe_cifar10",
    "finetune_cifar10_patch2",
    "scratch_cifar10_patch2",
]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_goes_from_a_pretraining_run_to_its_test_accuracy_in_one_command(
    pretrained, tmp_path, name, averaged, request
):
    root = request.config.rootpath
    recipe = yaml.safe_load((root / "configs" / f"{name}.yaml").read_text())
    recipe["data"] = {"class_path": "masklr.data.Digits", "init_args": {"batch_size": 128}}
    recipe["model"]["init_args"] |= {"mean": [0.305], "std": [0.376]}
    options = recipe["model"]["init_args"]["model"]["init_args"]
    if name.startswith("scratch"):
        options |= {"image_size": 8, "patch_size": 2, "in_chans": 1}
        options["backbone_args"] = options.get("backbone_args", {}) | SIZES
    else:
        options["backbone"] = str(pretrained)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["fit", "--config", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs"), "--wandb", "off"]
    short = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"] if averaged else []
    assert main([*arguments, *average, *short, *quiet, "--trainer.check_val_every_n_epoch", "1"]) == 0
    run = tmp_path / "runs" / name / "version_0"
    found = series(run)
    if averaged and name == "finetune_cifar10":  # weights are measured as they are trained, at the last step too
        assert main([*arguments, *short, *quiet, "--trainer.check_val_every_n_epoch", "1"]) == 0
        plain = series(run.with_name("version_1"))
        assert len(plain["weight/mean/frobenius_norm"]) == 2
        assert found["weight/mean/frobenius_norm"] == plain["weight/mean/frobenius_norm"]
        assert found["test/loss"] != plain["test/loss"]
    steps = 2 * (1294 // 128)
    assert [step for step, _ in found["test/accuracy"]] == [steps]
    assert [step for step, _ in found["val/accuracy"]] == [0, steps // 2, steps]
    assert 0.05 < found["test/accuracy"][0][1] <= 1
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert ("averaging_state" in checkpoint) == averaged
    tested = ["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run), *quiet]
    assert main(tested) == 0  # the checkpoint has the weights that were tested
    again = series(tmp_path / "runs" / name / "test_0")
    assert again["test/accuracy"] == [(steps, pytest.approx(found["test/accuracy"][0][1], abs=1e-6))]
    assert again["test/loss"] == [(steps, pytest.approx(found["test/loss"][0][1], rel=1e-5))]


def bad(pretrained, tmp_path):
    lonely = tmp_path / "lonely.ckpt"
    lonely.write_bytes(next((pretrained / "checkpoints").glob("step=*.ckpt")).read_bytes())
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    (other / "step=1.ckpt").write_bytes(lonely.read_bytes())
    (other.parent / "config.yaml").write_text("model: {class_path: masklr.tasks.Regression, init_args: {model: null}}")
    return {
        "no file": (
            {"backbone": str(tmp_path / "none.ckpt")},
            "`backbone` to be a checkpoint or a run's folder, but there is no",
        ),
        "no checkpoint": ({"backbone": str(tmp_path)}, "lonely|there is none in"),
        "no recipe": ({"backbone": str(lonely)}, r"whose config\.yaml says how it was built, got .*lonely\.ckpt"),
        "no pretraining": ({"backbone": str(other.parent)}, "Expected a run that pretrains an encoder by name"),
        "pretrained": ({"backbone": str(pretrained), "pretrained": True}, "Expected no `pretrained` beside"),
        "weights": ({"backbone": str(pretrained), "weights": "x"}, "Expected no `weights` beside a `backbone`"),
        "depth": (
            {"backbone": str(pretrained), "backbone_args": {"depth": 3}},
            r"Expected `backbone` of this architecture, got .*, in which blocks\.2\.norm1\.weight is missing",
        ),
        "channels": ({"backbone": str(pretrained), "in_chans": 3}, r"patch_embed\.proj\.weight is 24 x 1 x 2 x 2, not"),
        "no weights for it": (
            {"backbone": "resnet10t", "weights": str(lonely)},
            "Expected `weights` of this architecture",
        ),
    }


def test_bad_values_raise_one_sentence(pretrained, tmp_path):
    for name, (options, sentence) in bad(pretrained, tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
            Classifier(**options)
        assert "\n" not in str(error.value), name
