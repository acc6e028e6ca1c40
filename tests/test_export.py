import re

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from masklr.cli import main
from masklr.export import exported, write

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODEL = {"image_size": 8, "patch_size": 2, "in_chans": 1, "encoder_args": SIZES}


@pytest.fixture
def run(make_task, make_mae, tmp_path):
    """The folder of a run that pretrains, with two checkpoints, and the task of the later one."""
    folder = tmp_path / "runs" / "pretrain" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (5, 20):
        task = make_task(make_mae(seed=step))
        torch.save({"state_dict": task.state_dict()}, folder / "checkpoints" / f"step={step:08d}.ckpt")
    model = {
        "class_path": "masklr.models.MaskedAutoencoder",
        "init_args": {"encoder": "vit_tiny_patch16_224", **MODEL, "encoder_args": {**SIZES, "pretrained": True}},
    }
    recipe = {"model": {"class_path": "masklr.tasks.Pretraining", "init_args": {"model": model}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder, task


def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_run_is_exported_as_an_encoder_that_the_printed_lines_load_strictly(run, capsys):
    folder, task = run
    assert main(["export", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert str(folder / "checkpoints" / "step=00000020.ckpt") in printed
    lines = printed[printed.index("import timm") :]
    assert "pretrained" not in lines
    names = {}
    exec(lines.replace("import timm", "import timm, torch", 1), names)  # what a user would copy
    vit = names["model"].eval()
    with torch.no_grad():
        theirs = vit.forward_features(images())
        torch.testing.assert_close(theirs, task.model.eval().encode(images()), rtol=1e-5, atol=1e-5)
    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert file.metadata()["architecture"] == "vit_tiny_patch16_224"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "encoder.safetensors"]


@pytest.mark.parametrize("backbone", ["run", "resnet18", "vit_tiny_patch16_224"])
def test_backbone_of_a_classifier_is_loaded_by_the_printed_lines(backbone, run, tmp_path, capsys):
    from masklr.models import Classifier

    args = {"global_pool": "avg"} | (SIZES if backbone.startswith("vit") else {})
    sizes = {} if backbone == "run" else {"image_size": 8, "in_chans": 1}
    sizes |= {"patch_size": 2} if backbone.startswith("vit") else {}
    options = {"backbone": str(run[0]) if backbone == "run" else backbone, "backbone_args": args, **sizes}
    model = Classifier(num_classes=7, **options)
    folder = tmp_path / "runs" / "finetune" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "step=00000005.ckpt")
    entry = {"class_path": "masklr.models.Classifier", "init_args": {"num_classes": 7, "pretrained": False, **options}}
    recipe = {"model": {"class_path": "masklr.tasks.Classification", "init_args": {"model": entry}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["export", str(folder)]) == 0
    printed = capsys.readouterr().out
    names = {}
    exec(printed[printed.index("import timm") :].replace("import timm", "import timm, torch", 1), names)
    with torch.no_grad():
        theirs, ours = names["model"].eval()(images()), model.eval().features(images())
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_export_of_a_classifier_whose_pretraining_run_is_gone_prints_no_lines(tmp_path, capsys):
    folder = tmp_path / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {"model.backbone.a": torch.zeros(2, 2)}}, folder / "checkpoints" / "step=00000005.ckpt")
    entry = {"class_path": "masklr.models.Classifier", "init_args": {"backbone": str(tmp_path / "runs" / "gone")}}
    recipe = {"model": {"class_path": "masklr.tasks.Classification", "init_args": {"model": entry}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["export", str(folder)]) == 0
    assert "import timm" not in capsys.readouterr().out
    assert load_file(folder / "encoder.safetensors").keys() == {"a"}


def test_everything_is_exported_and_comes_back_bitwise(run, make_mae, tmp_path):
    folder, task = run
    out = tmp_path / "new" / "mae.safetensors"
    assert main(["export", str(folder), "--what", "all", "--out", str(out)]) == 0
    assert load_file(out).keys() == task.model.state_dict().keys()
    model = make_mae(seed=9, weights=str(out))
    assert all(torch.equal(t, task.model.state_dict()[key]) for key, t in model.state_dict().items())


def test_checkpoint_is_exported_beside_itself(run):
    folder, _ = run
    checkpoint = folder / "checkpoints" / "step=00000005.ckpt"
    assert main(["export", str(checkpoint)]) == 0
    found = load_file(folder / "checkpoints" / "step=00000005.encoder.safetensors")
    expected = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(t, expected[f"model.encoder.{key}"]) for key, t in found.items())
    assert len(found) == sum(key.startswith("model.encoder.") for key in expected)


def test_classifier_is_exported_as_a_backbone_or_with_its_head(tmp_path):
    from masklr.models import Classifier

    model = Classifier("convnext_atto", num_classes=7, backbone_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)})
    torch.save({"state_dict": {f"model.{k}": t for k, t in model.state_dict().items()}}, tmp_path / "a.ckpt")
    backbone = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=0)
    backbone.load_state_dict(exported(tmp_path / "a.ckpt"), strict=True)
    assert torch.equal(backbone.stem[0].weight, model.backbone.stem[0].weight)
    whole = exported(tmp_path / "a.ckpt", "all")
    assert whole.keys() == model.state_dict().keys()
    assert torch.equal(whole["head.weight"], model.head.weight)


def test_tensors_that_share_memory_or_are_views_are_written(tmp_path):
    weight = torch.randn(4, 6)
    state = {"model.encoder.a": weight.T, "model.encoder.b": weight[:2], "model.encoder.c": weight}
    torch.save({"state_dict": state}, tmp_path / "views.ckpt")
    write(exported(tmp_path / "views.ckpt"), tmp_path / "views.safetensors")
    found = load_file(tmp_path / "views.safetensors")
    assert all(torch.equal(found[key], state[f"model.encoder.{key}"]) for key in "abc")


def test_bad_input_is_answered_with_a_sentence(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "empty").mkdir()
    whole = (folder / "checkpoints" / "step=00000005.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "file").touch()
    cases = {
        (str(tmp_path / "none"),): r"Expected a checkpoint or a run's folder, but there is no .*none\.$",
        (str(tmp_path / "empty"),): "a sound checkpoint, but there is none in",
        (str(tmp_path / "torn.ckpt"),): r"Expected a sound checkpoint, got .*torn\.ckpt",
        (str(folder), "--what", "half"): "invalid choice: 'half'",
        (str(folder), "--out", str(tmp_path / "file" / "x.safetensors")): r"Cannot write .* \(`out`\)",
        (str(folder), "--out", str(tmp_path / "torn.ckpt")): r"Expected `--out` to be a \.safetensors file",
        (): "RUN_OR_CHECKPOINT",
    }
    for arguments, sentence in cases.items():
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(sentence, error), error
        assert error.startswith("masklr: error: ")
        assert error.count("\n") == 1
    assert (tmp_path / "torn.ckpt").read_bytes() == whole[: len(whole) // 2]
    out = folder / "encoder.safetensors"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    assert main(["export", str(out), "--out", str(out)]) == 2
    assert "other than the source" in capsys.readouterr().err


def test_newest_checkpoint_that_is_sound_is_taken(run, caplog):
    folder, _ = run
    newest = folder / "checkpoints" / "step=00000020.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    assert main(["export", str(folder)]) == 0
    expected = torch.load(folder / "checkpoints" / "step=00000005.ckpt")["state_dict"]
    found = load_file(folder / "encoder.safetensors")
    assert torch.equal(found["cls_token"], expected["model.encoder.cls_token"])
    assert "Passed over" in caplog.text
