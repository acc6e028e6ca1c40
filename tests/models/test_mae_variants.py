"""Variants of the masked autoencoder: cross decoder, fewer predictions, random mask ratios, checkpointing."""

import jaxtyping
import pytest
import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from masklr.masks import patch_split
from masklr.models import attention
from masklr.models.patches import num_predicted, predicted_subset

SHAPES = {
    "square": {},
    "wide, tall patches, color": {"image_size": (12, 16), "patch_size": (4, 2), "in_chans": 3},
    "tall, five channels": {"image_size": (15, 10), "patch_size": 5, "in_chans": 5, "mask_ratio": 0.5},
}


def images_for(model, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.in_chans, *model.image_size, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(model, seed=1):
    """The model with every parameter moved, so that no zero bias or unit scale hides an error."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(seed + p.numel())))
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def cross_loss(model, vit, images, visible, masked):
    """CrossMAE written out, one image and one predicted patch at a time; `vit` has the encoder's weights."""
    block_of = nn.functional
    per_image = []
    for image, seen, hidden in zip(images, visible.tolist(), masked.tolist(), strict=True):
        tokens = vit.patch_embed(image[None])[0] + vit.pos_embed[0, 1:]
        cls = vit.cls_token[0] + vit.pos_embed[0, :1]
        latent = vit.norm(vit.blocks(torch.cat([cls, tokens[seen]])[None]))[0]
        positions = build_sincos2d_pos_embed(model.grid, model.mask_token.shape[-1]).float()
        height, width = model.patch_size
        errors = []
        for index in hidden:
            x = (model.mask_token[0] + positions[index])[0]
            for block in model.decoder_blocks:
                attn, width_of_head = block.attn, len(x) // block.attn.num_heads
                q, (k, v) = attn.q(block.norm1(x)), attn.kv(latent).chunk(2, dim=-1)
                found = []
                for head in range(attn.num_heads):
                    part = slice(head * width_of_head, (head + 1) * width_of_head)
                    weights = (k[:, part] @ q[part] / width_of_head**0.5).softmax(0)
                    found.append(weights @ v[:, part])
                x = x + attn.proj(torch.cat(found))
                x = x + block.mlp.fc2(block_of.gelu(block.mlp.fc1(block.norm2(x))))
            prediction = model.decoder_head(model.decoder_norm(x))
            row, column = divmod(index, model.grid[1])
            target = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width].flatten()
            if model.norm_pixels:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
            errors.append((prediction - target).square().mean())
        per_image.append(torch.stack(errors).mean())
    return torch.stack(per_image).mean()


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_decoder_has_the_loss_and_gradients_of_crossmae_written_out(make_mae, shape, norm_pixels):
    options = {"decoder": "cross", "decoder_depth": 2, "prediction_ratio": 0.5, "norm_pixels": norm_pixels, **shape}
    model = perturbed(make_mae(**options))
    images, (visible, masked) = images_for(model), model.draw_split(3, seeded())
    output = model(images, (visible, masked))
    output.loss.backward()
    ours = gradients(model)

    model.zero_grad()
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
    )
    vit.load_state_dict(model.encoder.state_dict(), strict=True)
    vit.pos_embed.requires_grad_(False)
    loss = cross_loss(model, vit, images, visible, masked)
    loss.backward()
    theirs = {f"encoder.{name}": p.grad for name, p in vit.named_parameters() if p.requires_grad}
    theirs |= {name: p.grad for name, p in model.named_parameters() if not name.startswith("encoder.")}

    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        error = (grad - theirs[name]).abs().max() / theirs[name].abs().max()  # of the largest: zero is none of them
        assert error < 1e-5, name


def test_prediction_of_the_cross_decoder_does_not_depend_on_what_else_is_predicted(make_mae):
    for decoder, independent in (("cross", True), ("full", False)):
        model = perturbed(make_mae(decoder=decoder, decoder_depth=2)).eval()
        visible, masked = model.draw_split(3, seeded())
        latent = model.encode(images_for(model), visible)
        everything, some = model.decode(latent, visible, masked), model.decode(latent, visible, masked[:, 2:5])
        assert torch.allclose(some, everything[:, 2:5], atol=1e-5) == independent


def test_cross_decoder_has_no_parameters_that_it_does_not_use(make_mae):
    model = make_mae(decoder="cross")
    assert not any(name.startswith("decoder_embed") for name in model.state_dict())
    model(images_for(model)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("decoder", ["full", "cross"])
@pytest.mark.parametrize(
    ("strategy", "ratio"), [("random", 0.75), ("block", 0.6), ("grid", 0.75), ("grid", 0.5)], ids=str
)
def test_every_strategy_works_with_every_decoder_and_prediction_ratio(make_mae, decoder, strategy, ratio):
    for prediction_ratio in (1.0, 0.3):
        model = make_mae(decoder=decoder, strategy=strategy, mask_ratio=ratio, prediction_ratio=prediction_ratio)
        output = model(images_for(model), generator=seeded())
        output.loss.backward()
        num_masked = round(16 * ratio)
        assert output.visible.shape == (3, 16 - num_masked)
        assert output.masked.shape == (3, round(num_masked * prediction_ratio))
        assert output.prediction.shape == (3, round(num_masked * prediction_ratio), 4)
        assert output.latent.shape == (3, 17 - num_masked, 24)
        for seen, hidden in zip(output.visible.tolist(), output.masked.tolist(), strict=True):
            assert len({*seen, *hidden}) == len(seen) + len(hidden)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_predicted_patches_are_a_uniformly_random_subset_of_the_masked_ones():
    _, masked = patch_split(4000, (4, 4), 0.5, generator=seeded())
    some = predicted_subset(masked, 0.375, generator=seeded(1))
    assert some.shape == (4000, 3)
    assert (some.diff(dim=1) > 0).all()
    place = (masked[:, :, None] == some[:, None]).any(2)
    assert (place.sum(1) == 3).all()
    # Each of the 56 subsets of 3 among 8 with the same frequency, within 5 standard errors.
    subsets = (place.long() << torch.arange(8)).sum(1)
    counts = subsets.unique(return_counts=True)[1]
    assert len(counts) == 56
    error = (4000 / 56 * (1 - 1 / 56)) ** 0.5
    assert (counts - 4000 / 56).abs().max() < 5 * error


def test_predicting_all_masked_patches_draws_nothing_and_keeps_them(make_mae):
    model = make_mae()
    visible, masked = model.draw_split(3, seeded())
    expected = patch_split(3, (4, 4), 0.75, generator=seeded())
    assert torch.equal(visible, expected[0])
    assert torch.equal(masked, expected[1])
    subset = make_mae(prediction_ratio=0.25).draw_split(3, seeded())
    assert torch.equal(subset[0], visible)
    assert subset[1].shape == (3, 3)


@pytest.mark.parametrize(
    ("num_masked", "ratio", "count"), [(48, 1 / 3, 16), (7, 0.5, 4), (12, 0.99, 12), (10, 0.06, 1)]
)
def test_number_of_predicted_patches_is_rounded(num_masked, ratio, count):
    assert num_predicted(num_masked, ratio) == count


def test_mask_ratio_is_drawn_from_its_interval_for_each_batch(make_mae):
    model = make_mae(mask_ratio=(0.25, 0.75), patch_size=1)
    generator = seeded()
    counts = [model.draw_split(2, generator)[1].shape[1] for _ in range(300)]
    assert min(counts) >= 16
    assert max(counts) <= 48
    assert len(set(counts)) > 25
    # The mean of 300 uniform counts, within 5 of its standard errors.
    assert abs(sum(counts) / 300 - 32) < 5 * 32 / (12 * 300) ** 0.5
    assert model.middle_mask_ratio == 0.5
    assert make_mae(mask_ratio=0.6).middle_mask_ratio == 0.6
    again = seeded()
    assert counts[:9] == [model.draw_split(2, again)[1].shape[1] for _ in range(9)]


def test_mask_ratio_follows_the_seed_of_the_step(make_mae):
    model = make_mae(mask_ratio=(0.25, 0.75), patch_size=1)
    counts = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        counts.append(model.draw_split(2)[1].shape[1])
    assert counts[0] == counts[2] != counts[1]


def test_one_mask_ratio_draws_no_number(make_mae):
    torch.manual_seed(0)
    visible, _ = make_mae().draw_split(3)
    torch.manual_seed(0)
    assert torch.equal(visible, patch_split(3, (4, 4), 0.75)[0])


def test_draws_of_all_variants_read_nothing_from_the_device(make_mae):
    # On the meta device there is nothing to read: `.item()` and branches on values raise, as they would wait on a GPU.
    options = {"mask_ratio": (0.4, 0.8), "prediction_ratio": 0.5, "decoder": "cross", "checkpoint": True}
    model = make_mae(**options).to("meta")
    model(torch.empty(4, 1, 8, 8, device="meta")).loss.backward()
    assert model.mask_token.grad is not None


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_checkpointing_gives_the_same_loss_and_gradients(make_mae, decoder):
    plain, saving = (perturbed(make_mae(decoder=decoder, decoder_depth=2, checkpoint=c)) for c in (False, True))
    assert list(plain.state_dict()) == list(saving.state_dict())
    split = plain.draw_split(3, seeded())
    calls = []
    for block in (*saving.encoder.blocks, *saving.decoder_blocks):
        block.norm2.register_forward_hook(lambda layer, *_: calls.append(layer))
    losses = [model(images_for(model), split).loss for model in (plain, saving)]
    assert len(calls) == 4
    for loss in losses:
        loss.backward()
    assert {calls.count(layer) for layer in calls} == {2}, "activations were kept"
    assert losses[0] == losses[1]
    theirs = gradients(plain)
    for name, grad in gradients(saving).items():
        torch.testing.assert_close(grad, theirs[name], rtol=0, atol=0, msg=name)


def test_checkpointing_covers_whole_images_and_draws_dropout_once(make_mae):
    dropout = {"proj_drop_rate": 0.5, "drop_path_rate": 0.3}
    plain, saving = (perturbed(make_mae(encoder_args=dropout, checkpoint=c)) for c in (False, True))
    results = []
    for model in (plain, saving):
        torch.manual_seed(0)
        tokens = model.encode(images_for(model))
        tokens.square().mean().backward()
        results.append((tokens, gradients(model.encoder)))
    assert saving.encoder.grad_checkpointing
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_checkpointing_under_autocast_and_without_gradients(make_mae):
    plain, saving = (perturbed(make_mae(decoder="cross", checkpoint=c)) for c in (False, True))
    split = plain.draw_split(3, seeded())
    for model in (plain, saving):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images_for(model), split).loss.backward()
    theirs = gradients(plain)
    assert all(torch.equal(grad, theirs[name]) for name, grad in gradients(saving).items())
    with torch.no_grad():
        assert torch.equal(plain(images_for(plain), split).loss, saving(images_for(saving), split).loss)


@pytest.mark.parametrize("tokens", [{}, {"class_token": False}, {"reg_tokens": 4}], ids=["class", "none", "registers"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_encoding_everything_is_timms_forward_features_at_the_sizes_of_the_papers(make_mae, size, tokens, monkeypatch):
    torch.manual_seed(0)
    options = {"img_size": 64, "num_classes": 0, "global_pool": "avg", "fc_norm": False, **tokens}
    vit = timm.create_model(f"vit_{size}_patch16_224", **options).eval()
    images, everything = torch.randn(1, 3, 64, 64), torch.arange(16).expand(1, -1)
    with torch.no_grad():
        theirs = vit.forward_features(images)
        exact = vit.double().forward_features(images.double())
        model = make_mae(encoder=vit, decoder_dim=16, decoder_heads=2).eval()
        # In float64 there is no rounding to hide behind; the fast attention is to be used there too.
        monkeypatch.setattr(attention, "MAX_TOKENS_BY_PRODUCTS", {torch.float32: 48, torch.float64: 48})
        for ours in (model.double().encode(images.double()), model.encode(images.double(), everything)):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
        # In float32 each entry too, where nothing is to be differentiated.
        torch.testing.assert_close(model.float().encode(images), theirs, rtol=0, atol=1e-6)
        # Patches by index are embedded by a matrix product, not a convolution; and timm itself is 3e-6 from the truth
        # in its worst entry, 4e-7 on the whole.
        assert (model.encode(images, everything) - theirs).norm() / theirs.norm() < 1e-6
    # In training, products take the place of fused attention.
    assert (model.encode(images) - theirs).norm() / theirs.norm() < 1e-6


BAD = {
    "no prediction": ({"prediction_ratio": 0.0}, r"Expected `prediction_ratio` in \(0, 1\], got 0\.0"),
    "more than all": ({"prediction_ratio": 1.01}, r"Expected `prediction_ratio` in \(0, 1\], got 1\.01"),
    "negative share": ({"prediction_ratio": -0.5}, r"Expected `prediction_ratio` in \(0, 1\], got -0\.5"),
    "too small a share": ({"prediction_ratio": 0.01}, "`prediction_ratio` to leave a patch to predict, got 0.01 of 12"),
    "low above high": ({"mask_ratio": (0.8, 0.5)}, "Expected `mask_ratio` with low <= high, got 0.8 and 0.5"),
    "interval from zero": ({"mask_ratio": (0.0, 0.5)}, r"`mask_ratio`.*0\.0"),
    "interval to one": ({"mask_ratio": (0.5, 1.0)}, r"`mask_ratio`.*1\.0"),
    "interval of grids": ({"mask_ratio": (0.5, 0.75), "strategy": "grid"}, "one `mask_ratio` for strategy grid"),
    "share of the lowest": (
        {"mask_ratio": (0.1, 0.75), "prediction_ratio": 0.2},
        "`prediction_ratio` to leave a patch to predict, got 0.2 of 2",
    ),
    "heads of the cross decoder": ({"decoder": "cross", "decoder_heads": 3}, "`decoder_heads` to divide"),
}


def test_unknown_decoder_raises(make_mae, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose own check comes first in the tests
    with pytest.raises(ValueError, match="Expected `decoder` full or cross, got 'half'"):
        make_mae(decoder="half")


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(make_mae, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make_mae(**options)
    assert "\n" not in str(error.value)
