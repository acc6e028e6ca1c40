"""Weights from files that are made here, in the layouts of timm, of the original release and of masklr."""

import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

from masklr.models.pretrained import load_encoder, mae_state_dict

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def sincos(dim, side):
    """Positions of the original release: sine and cosine of x in the first half, of y in the second; class token 0."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [np.outer(place, omega) for place in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), table])).float()[None]


class Original(nn.Module):
    """The original release's network for square color images, written from the paper, with its names and orders."""

    def __init__(self, image=8, patch=2, dim=24, decoder_dim=16, depth=2, decoder_depth=2):
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        side = image // patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos(dim, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, 2, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos(decoder_dim, side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, 2, qkv_bias=True) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * 3)

    def forward(self, images, visible, masked):
        """Pixels of masked patches in the order (y, x, channel), and the encoder's tokens."""
        tokens = self.patch_embed.proj(images).flatten(2).mT + self.pos_embed[:, 1:]
        batch = torch.arange(len(images))[:, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([cls, tokens[batch, visible]], 1)
        for block in self.blocks:
            x = block(x)
        latent = self.norm(x)
        x = self.decoder_embed(latent)
        full = self.mask_token.repeat(len(images), tokens.shape[1], 1)
        full[batch, visible] = x[:, 1:]
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:][batch, masked], latent


@pytest.fixture(scope="module")
def original():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Original().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        return model


def encoder_of(state):
    return {key: tensor for key, tensor in state.items() if not key.startswith(("decoder", "mask_token"))}


@pytest.fixture(scope="module")
def files(original, tmp_path_factory):
    """Both layouts of the original release, as its authors save them, and timm's."""
    folder = tmp_path_factory.mktemp("weights")
    state = original.state_dict()
    torch.save({"model": encoder_of(state)}, folder / "encoder.pth")
    torch.save({"model": state, "epoch": 799, "scaler": {"scale": 65536.0}}, folder / "all.pth")
    save_file({k: v.contiguous() for k, v in encoder_of(state).items()}, folder / "timm.safetensors")
    return folder


def color(make_mae, **options):
    return make_mae(**{"in_chans": 3, "decoder_depth": 2, "seed": 5, **options}).eval()


def split_and_images(model):
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), model.draw_split(
        3, torch.Generator().manual_seed(2)
    )


def test_encoder_and_decoder_of_the_original_release_predict_what_they_predicted_there(make_mae, original, files):
    model = color(make_mae, weights=str(files / "all.pth"))
    images, (visible, masked) = split_and_images(model)
    with torch.no_grad():
        theirs, their_latent = original(images, visible, masked)
        latent = model.encode(images, visible)
        ours = model.decode(latent, visible, masked)
    torch.testing.assert_close(latent, their_latent, rtol=1e-5, atol=1e-5)
    theirs = theirs.unflatten(2, (2, 2, 3)).permute(0, 1, 4, 2, 3).flatten(2)  # (y, x, channel) to (channel, y, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder.pth", "timm.safetensors"])
def test_encoder_alone_is_read_and_the_decoder_stays_as_it_was(make_mae, original, files, name):
    fresh, model = color(make_mae), color(make_mae, weights=str(files / name))
    images, (visible, masked) = split_and_images(model)
    with torch.no_grad():
        latent = original(images, visible, masked)[1]
        torch.testing.assert_close(model.encode(images, visible), latent, rtol=1e-5, atol=1e-5)
    for key, tensor in model.state_dict().items():
        if not key.startswith("encoder."):
            assert torch.equal(tensor, fresh.state_dict()[key]), key
    assert not model.encoder.pos_embed.requires_grad


def test_positions_of_another_size_are_interpolated(make_mae, original, files):
    model = color(make_mae, weights=str(files / "all.pth"), image_size=(12, 16))
    expected = resample_abs_pos_embed(original.pos_embed, [6, 8], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.encoder.pos_embed, expected)
    assert model(torch.randn(2, 3, 12, 16)).loss.isfinite()


def test_decoder_with_positions_of_its_own_is_refused(make_mae, original, files, tmp_path):
    state = dict(original.state_dict())
    state["decoder_pos_embed"] = state["decoder_pos_embed"].flip(2)
    torch.save({"model": state}, tmp_path / "learned.pth")
    with pytest.raises(ValueError, match=r"Expected the fixed sine-cosine positions .*learned\.pth"):
        color(make_mae, weights=str(tmp_path / "learned.pth"))


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_own_checkpoints_are_read_whole_through_every_wrapper(make_mae, make_task, tmp_path, decoder):
    trained = color(make_mae, seed=7, decoder=decoder)
    task = make_task(trained)
    compiled = {key.replace("model.", "model._orig_mod.", 1): t for key, t in task.state_dict().items()}
    torch.save({"state_dict": task.state_dict(), "epoch": 3}, tmp_path / "task.ckpt")
    torch.save({"state_dict": compiled}, tmp_path / "compiled.ckpt")
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    torch.save({f"module.{k}": t for k, t in trained.state_dict().items()}, tmp_path / "parallel.pt")
    for name in ("task.ckpt", "compiled.ckpt", "model.pt", "parallel.pt"):
        model = color(make_mae, decoder=decoder, weights=str(tmp_path / name))
        assert list(model.state_dict()) == list(trained.state_dict())
        assert all(torch.equal(t, trained.state_dict()[key]) for key, t in model.state_dict().items()), name


def test_encoder_of_a_classifier_is_read_without_its_head(make_mae, tmp_path):
    from masklr.models import Classifier

    trained = Classifier(num_classes=7, image_size=8, patch_size=2, backbone_args=SIZES)
    torch.save({"state_dict": {f"model.{k}": t for k, t in trained.state_dict().items()}}, tmp_path / "c.ckpt")
    model = color(make_mae, weights=str(tmp_path / "c.ckpt"))
    theirs = trained.backbone.state_dict()
    assert all(torch.equal(t, theirs[key]) for key, t in model.encoder.state_dict().items())
    assert not any("head" in key for key in mae_state_dict(tmp_path / "c.ckpt"))


def test_timm_by_name_reads_weights_of_the_original_release(make_mae, original, files):
    # What `pretrained: true` downloads for the `.mae` tag has this layout; the overlay says where it lies.
    overlay = {"file": str(files / "encoder.pth"), "num_classes": 0}
    model = make_mae(
        encoder="vit_base_patch16_224.mae",
        in_chans=3,
        encoder_args={**SIZES, "pretrained": True, "pretrained_cfg_overlay": overlay},
    ).eval()
    images, (visible, masked) = split_and_images(model)
    with torch.no_grad():
        latent = original(images, visible, masked)[1]
        torch.testing.assert_close(model.encode(images, visible), latent, rtol=1e-5, atol=1e-5)
    assert model.encoder.pos_embed.requires_grad


def test_registers_and_positions_of_patches_alone_are_read(tmp_path):
    def vit(image):
        options = {"reg_tokens": 2, "no_embed_class": True, "num_classes": 0, **SIZES}
        return timm.create_model("vit_tiny_patch16_224", img_size=image, patch_size=2, **options)

    small, large = vit(8), vit(12)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    load_encoder(large, tmp_path / "small.pt")
    assert torch.equal(large.reg_token, small.reg_token)
    expected = resample_abs_pos_embed(small.pos_embed, [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(large.pos_embed, expected)


BAD = {
    "depth": (
        {"encoder_args": {**SIZES, "depth": 3}},
        r"encoder\.blocks\.2\.norm1\.weight is missing, encoder\.blocks\.2\.norm1\.bias is missing, "
        r"encoder\.blocks\.2\.attn\.qkv\.weight is missing \(12 mismatches in all\)\.$",
    ),
    "width": ({"encoder_args": {**SIZES, "embed_dim": 32}}, r"encoder\.cls_token is 1 x 1 x 24, not 1 x 1 x 32, "),
    "decoder depth": ({"decoder_depth": 1}, r"decoder_blocks\.1\.norm1\.weight is too many, "),
    "other decoder": ({"decoder": "cross"}, r"decoder_blocks\.0\.attn\.q\.weight is missing"),
    "channels": ({"in_chans": 1}, r"patch_embed\.proj\.weight is 24 x 3 x 2 x 2, not 24 x 1 x 2 x 2"),
    "no class token": ({"encoder_args": {**SIZES, "class_token": False}}, r"encoder\.cls_token is too many"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_weights_of_another_architecture_are_refused_with_the_first_three_mismatches(
    make_mae, files, options, sentence
):
    with pytest.raises(ValueError, match=sentence) as error:
        color(make_mae, weights=str(files / "all.pth"), **options)
    text = str(error.value)
    assert text.startswith("Expected `weights` of this architecture, got ")
    assert sum(text.count(word) for word in ("is missing", "too many", ", not ")) <= 3
    assert "\n" not in text


def test_files_that_are_no_weights_are_refused(make_mae, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no "):
        make_mae(weights=str(tmp_path / "none.pth"))
    torch.save({"model": math.sqrt}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"Refused to read .*code\.pth"):
        make_mae(weights=str(tmp_path / "code.pth"))
