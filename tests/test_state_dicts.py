import collections
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from masklr.matrices import measured_matrices
from masklr.state_dicts import checkpoint_state_dict, state_dict_matrices


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


class Words(nn.Module):
    """An embedding, an attention of torch's with one width and one with three, tied weights."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.attention, self.separate = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.tokens.weight


@pytest.mark.parametrize(
    "make",
    [
        vit,
        Words,
        lambda: timm.create_model("resnet10t", num_classes=3),
        lambda: timm.create_model("convnext_atto", num_classes=3),
        lambda: torch.compile(nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose2d(3, 4, 2)), backend="eager"),
        lambda: nn.Linear(3, 2),
    ],
    ids=["vit", "words", "resnet", "convnext", "compiled", "one layer"],
)
def test_matrices_of_a_state_dict_are_those_of_its_model(make):
    model = make()
    expected, found = measured_matrices(model), state_dict_matrices(model.state_dict())
    assert set(found) == set(expected)
    for name, matrix in found.items():
        assert torch.equal(matrix, expected[name]), name


def test_positions_are_left_out_unless_asked_for_by_name():
    state = vit().state_dict()
    asked = ["pos_embed", "blocks.0.attn.qkv.?"]
    found = state_dict_matrices(state, include=asked)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        "pos_embed": (17, 24),
        **{f"blocks.0.attn.qkv.{part}": (24, 24) for part in "qkv"},
    }
    assert set(found) == set(measured_matrices(vit(), include=asked))


def test_names_are_chosen_by_pattern_and_the_nearest_is_named():
    state = vit().state_dict()
    found = state_dict_matrices(state, include=["blocks.**"], exclude=["**.qkv.*", "blocks.1.**"])
    assert list(found) == ["blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    with pytest.raises(ValueError, match=r"Expected `include` to match something, got 'block\.\*'; did you mean"):
        state_dict_matrices(state, include=["block.*"])


def test_tensors_without_a_matrix_raise():
    with pytest.raises(ValueError, match=r"Expected a matrix to measure, got none of 2 tensors, such as 'norm.weight'"):
        state_dict_matrices({"norm.weight": torch.ones(3), "steps.weight": torch.ones(3, 3, dtype=torch.long)})


# ------------------------------------------------------------------------------------------------ files

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.pth", WEIGHTS),
        ("ordered.pt", collections.OrderedDict(WEIGHTS)),
        ("lightning.ckpt", {"epoch": 1, "state_dict": WEIGHTS, "optimizer_states": [{"state": {0: torch.ones(2)}}]}),
        ("mae.pth", {"model": WEIGHTS, "epoch": 3, "scale": torch.ones(1)}),
        ("some.bin", {"model_state_dict": WEIGHTS}),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_is_found_in_every_kind_of_checkpoint(name, content, zipped, tmp_path):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = checkpoint_state_dict(tmp_path / name)
    assert found.keys() == WEIGHTS.keys()
    assert torch.equal(found["fc.weight"], WEIGHTS["fc.weight"])


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert torch.equal(checkpoint_state_dict(tmp_path / "model.safetensors")["fc.bias"], torch.ones(2))


class Trap:
    """Unpickling this would leave a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_that_needs_code_is_refused_and_runs_none(tmp_path, zipped):
    sprung = tmp_path / "sprung"
    path = tmp_path / "evil.pt"
    for trap in (Trap(open, str(sprung), "w"), Trap(os.system, f"touch {sprung}"), Trap(eval, "1 + 1")):
        torch.save({"state_dict": WEIGHTS, "args": trap}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ValueError, match=rf"Refused to read .*evil\.pt: it needs code to be run, [\w.]*{trap.call.__name__};"
        ):
            checkpoint_state_dict(path)
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"Refused to read .* it needs code to be run, torch.*Linear;"):
        checkpoint_state_dict(path)
    assert not sprung.exists()


def test_files_that_are_no_checkpoint_or_truncated_are_one_sentence(tmp_path):
    torch.save(WEIGHTS | {"big.weight": torch.randn(50, 50)}, tmp_path / "whole.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS | {"big.weight": torch.randn(50, 50)}, tmp_path / "whole.safetensors")
    contents = {
        "text.ckpt": b"not a checkpoint",
        "empty.pt": b"",
        "zeros.pt": bytes(1000),
        "pickle.pt": pickle.dumps([1, 2]),
        "text.safetensors": b"not a checkpoint",
        "empty.safetensors": b"",
    }
    for whole in ("whole.pt", "old.pt", "whole.safetensors"):
        data = (tmp_path / whole).read_bytes()
        for share in (0.1, 0.5, 0.97):
            contents[f"{share}_{whole}"] = data[: int(share * len(data))]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=r"it is truncated, or no|Expected a checkpoint with a state dict"
        ) as error:
            checkpoint_state_dict(tmp_path / name)
        assert str(tmp_path / name) in str(error.value), name
        assert "\n" not in str(error.value)


def test_missing_files_folders_and_checkpoints_without_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.ckpt"):
        checkpoint_state_dict(tmp_path / "missing.ckpt")
    with pytest.raises(ValueError, match="Expected a checkpoint file, got the folder"):
        checkpoint_state_dict(tmp_path)
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"Expected a checkpoint with weights, got .* with the keys epoch, lr\."):
        checkpoint_state_dict(tmp_path / "a.pt")
