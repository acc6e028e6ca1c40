import copy
import io
import pickle

import pytest
import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

from masklr.masks import patch_split
from masklr.models import MaskedAutoencoder

SHAPES = {
    "square": {},
    "wide, tall patches, color": {"image_size": (12, 16), "patch_size": (4, 2), "in_chans": 3},
    "tall, one channel": {"image_size": (15, 10), "patch_size": 5},
}
ENCODERS = {
    "class token": {},
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 2},
    "registers only": {"reg_tokens": 2, "class_token": False},
    "no position of the class token": {"no_embed_class": True, "reg_tokens": 1},
    "norm before the blocks": {"pre_norm": True},
    "no positions": {"pos_embed": "none"},
}


def images_for(model, batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.in_chans, *model.image_size, generator=generator).to(dtype)


def split_for(model, batch=3, seed=0):
    return patch_split(batch, model.grid, model.mask_ratio, generator=torch.Generator().manual_seed(seed))


def perturbed(model, seed=1):
    """The model with every parameter moved, so that no zero bias or unit scale hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def patches_by_loops(image, patch):
    """Rows (y of the patch, x of the patch), columns (channel, y, x)."""
    rows = []
    for top in range(0, image.shape[1], patch[0]):
        for left in range(0, image.shape[2], patch[1]):
            pixels = []
            for channel in image:
                for y in range(patch[0]):
                    for x in range(patch[1]):
                        pixels.append(channel[top + y, left + x])
            rows.append(torch.stack(pixels))
    return torch.stack(rows)


def paper_loss(model, vit, decoder, images, visible, masked):
    """The paper, one image at a time: the loss as a function of the weights.

    Embed all patches and add positions, drop the masked ones, encode, append mask tokens, put all in order, add
    positions, decode, and compare the masked patches.
    """
    per_image = []
    for image, seen, hidden in zip(images, visible.tolist(), masked.tolist(), strict=True):
        patches = patches_by_loops(image, model.patch_size)
        kernel = vit.patch_embed.proj.weight.reshape(vit.embed_dim, -1)
        tokens = patches @ kernel.T + vit.patch_embed.proj.bias + vit.pos_embed[0, 1:]
        cls = vit.cls_token[0] + vit.pos_embed[0, :1]
        latent = vit.norm(vit.blocks(torch.cat([cls, torch.stack([tokens[i] for i in seen])])[None]))[0]

        latent = model.decoder_embed(latent)
        in_order = [model.mask_token[0, 0]] * len(patches)
        for place, index in enumerate(seen):
            in_order[index] = latent[1 + place]
        positions = build_sincos2d_pos_embed(model.grid, latent.shape[1]).float()
        full = torch.cat([latent[:1], torch.stack(in_order) + positions])
        prediction = model.decoder_head(model.decoder_norm(decoder(full[None])))[0, 1:]

        errors = []
        for index in hidden:
            target = patches[index]
            if model.norm_pixels:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
            errors.append(((prediction[index] - target) ** 2).mean())
        per_image.append(torch.stack(errors).mean())
    return torch.stack(per_image).mean()


def plain_parts(model):
    """The same weights in timm's own, unchanged modules."""
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
    decoder = nn.Sequential(*(Block(16, 2, qkv_bias=True) for _ in model.decoder_blocks))
    decoder.load_state_dict(model.decoder_blocks.state_dict(), strict=True)
    return vit, decoder


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_are_those_of_the_paper_written_out(make_mae, shape, norm_pixels):
    model = perturbed(make_mae(norm_pixels=norm_pixels, decoder_depth=2, **shape))
    images, (visible, masked) = images_for(model), split_for(model)
    output = model(images, (visible, masked))
    output.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    vit, decoder = plain_parts(model)
    loss = paper_loss(model, vit, decoder, images, visible, masked)
    loss.backward()
    theirs = {f"encoder.{name}": p.grad for name, p in vit.named_parameters() if p.requires_grad}
    theirs |= {f"decoder_blocks.{name}": p.grad for name, p in decoder.named_parameters()}
    rest = ("decoder_embed", "mask_token", "decoder_norm", "decoder_head")
    theirs |= {name: p.grad for name, p in model.named_parameters() if name.startswith(rest)}

    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        error = (grad - theirs[name]).abs().max() / theirs[name].abs().max()  # of the largest: zero is none of them
        assert error < 1e-5, name


@pytest.mark.parametrize("encoder_args", ENCODERS.values(), ids=ENCODERS)
def test_encoding_all_patches_by_index_is_timms_forward_features(make_mae, encoder_args):
    model = perturbed(make_mae(encoder_args=encoder_args, image_size=(8, 12), in_chans=3)).eval()
    images = images_for(model)
    everything = torch.arange(model.grid[0] * model.grid[1]).expand(3, -1)
    theirs = model.encoder.forward_features(images)
    assert theirs.shape == (3, model.encoder.num_prefix_tokens + 24, 24)
    torch.testing.assert_close(model.encode(images, everything), theirs, rtol=1e-5, atol=2e-6)
    assert torch.equal(model.encode(images), theirs)


def test_order_of_visible_patches_is_the_order_of_their_tokens(make_mae):
    model = perturbed(make_mae()).eval()
    images = images_for(model)
    forward, backward = torch.tensor([[1, 5, 9]] * 3), torch.tensor([[9, 5, 1]] * 3)
    latent = model.encode(images, forward)
    torch.testing.assert_close(model.encode(images, backward)[:, 1:], latent[:, 1:].flip(1), rtol=1e-5, atol=2e-6)
    assert not torch.allclose(latent[:, 1], latent[:, 3])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_unpatchify_inverts_patchify_and_patchify_is_the_loop(make_mae, shape):
    model = make_mae(**shape)
    images = images_for(model)
    patches = model.patchify(images)
    assert torch.equal(patches, torch.stack([patches_by_loops(image, model.patch_size) for image in images]))
    assert torch.equal(model.unpatchify(patches), images)


def test_images_of_another_size_raise(make_mae):
    model = make_mae()
    with pytest.raises(ValueError, match=r"Expected images of 1 x 8 x 8 .* got 1 x 8 x 10"):
        model(torch.zeros(2, 1, 8, 10))


def test_latent_depends_on_visible_pixels_only(make_mae):
    model = perturbed(make_mae()).eval()
    images, (visible, masked) = images_for(model), split_for(model)
    latent = model.encode(images, visible)
    patches = model.patchify(images)
    other = patches.scatter(1, masked[..., None].expand(-1, -1, 4), torch.nan)
    assert torch.equal(model.encode(model.unpatchify(other), visible), latent)
    other = patches.scatter(1, visible[:, :1, None].expand(-1, -1, 4), 0.0)
    assert not torch.equal(model.encode(model.unpatchify(other), visible), latent)


def test_loss_compares_masked_patches_only(make_mae):
    model = perturbed(make_mae(norm_pixels=False))
    images, (visible, masked) = images_for(model), split_for(model)
    output = model(images, (visible, masked))
    target = torch.stack([model.patchify(images)[i, masked[i]] for i in range(3)])
    torch.testing.assert_close(output.loss, (output.prediction - target).square().mean())
    images.requires_grad_()
    latent = model.encode(images.detach(), visible)  # the pixels enter the loss as targets alone
    loss = (model.decode(latent, visible, masked) - model.target(images, masked)).square().mean()
    grad = model.patchify(torch.autograd.grad(loss, images)[0]).abs().sum(-1)
    is_masked = torch.zeros(3, 16, dtype=torch.bool).scatter(1, masked, True)
    assert torch.equal(grad > 0, is_masked)


def test_split_drawn_by_the_model_has_the_ratio_and_follows_the_generator(make_mae):
    model = make_mae(mask_ratio=0.7)
    images = images_for(model)
    first, again, other = (model(images, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.masked.shape == (3, round(16 * 0.7))
    assert first.visible.shape == (3, 5)
    assert first.prediction.shape == (3, 11, 4)
    assert torch.equal(first.masked, again.masked)
    assert not torch.equal(first.masked, other.masked)


@pytest.mark.parametrize("patch", [2, 4])
def test_predicting_the_mean_of_normalized_patches_gives_nearly_one(make_mae, patch):
    model = make_mae(patch_size=patch, mask_ratio=0.5)
    nn.init.zeros_(model.decoder_head.weight)
    loss = model(images_for(model, batch=64)).loss.item()
    n = patch * patch
    # The deviation of n pixels is normalized with n - 1, so the mean square of a target is (n - 1) / n.
    assert loss == pytest.approx((n - 1) / n, rel=1e-3)


def test_flat_patches_give_a_finite_loss_and_gradient(make_mae):
    model = make_mae()
    loss = model(torch.full((2, 1, 8, 8), 0.3)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_reconstruction_keeps_visible_patches_and_shows_a_perfect_prediction_exactly(make_mae):
    model = make_mae().eval()
    images, split = images_for(model), split_for(model)
    target = model.target(images, split[1])
    model.decode = lambda latent, visible, masked: target
    hidden, reconstruction = model.reconstruct(images, split)
    torch.testing.assert_close(reconstruction, images, rtol=1e-5, atol=1e-5)
    is_masked = torch.zeros(3, 16, dtype=torch.bool).scatter(1, split[1], True)
    patches = model.patchify(hidden)
    assert (patches[is_masked] == 0).all()
    assert torch.equal(patches[~is_masked], model.patchify(images)[~is_masked])


def test_encoder_given_as_an_instance_keeps_its_weights_bitwise(make_mae):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=2, num_heads=2
    )
    before = copy.deepcopy(vit.state_dict())
    model = make_mae(encoder=vit)
    assert model.encoder is vit
    after = model.encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model.encoder.pos_embed.requires_grad
    assert (model.image_size, model.patch_size, model.in_chans) == ((8, 8), (2, 2), 1)


def test_named_encoder_starts_as_in_the_paper(make_mae):
    model = make_mae(encoder_args={"embed_dim": 96}, decoder_dim=64)
    positions = build_sincos2d_pos_embed((4, 4), 96)
    assert torch.equal(model.encoder.pos_embed[0, 1:], positions.float())
    assert (model.encoder.pos_embed[0, 0] == 0).all()
    assert not model.encoder.pos_embed.requires_grad
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            limit = (6 / sum(module.weight.shape)) ** 0.5
            assert (module.bias == 0).all(), name
            assert 0.9 * limit < module.weight.abs().max() <= limit, name
    assert 0.01 < model.mask_token.std() < 0.03


def test_keys_of_the_encoder_are_timms_and_load_strictly(make_mae):
    model = perturbed(make_mae())
    vit, _ = plain_parts(model)
    images = images_for(model)
    torch.testing.assert_close(vit.eval().forward_features(images), model.eval().encode(images), rtol=1e-5, atol=2e-6)
    assert "decoder_positions" not in model.state_dict()


def test_copy_pickle_and_reload_compute_the_same(make_mae):
    model = perturbed(make_mae()).eval()
    images, split = images_for(model), split_for(model)
    loss = model(images, split).loss
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twins.append(make_mae(seed=5).eval())
    assert not torch.equal(twins[-1](images, split).loss, loss)
    twins[-1].load_state_dict(torch.load(file))
    for twin in twins:
        assert torch.equal(twin(images, split).loss, loss)
        assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.usefixtures("with_and_without_bf16_products")
def test_bf16_autocast_is_finite_and_close(make_mae):
    model = perturbed(make_mae(decoder_depth=2))
    images, split = images_for(model, batch=16), split_for(model, batch=16)
    exact = model(images, split)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, split)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.02, atol=0.0)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_forward_and_split_run_on_the_meta_device_where_nothing_can_be_read(make_mae):
    # `.item()`, `nonzero` and branches on values raise there: each would be a wait for the device.
    for strategy in ("random", "block", "grid"):
        model = make_mae(strategy=strategy).to("meta")
        output = model(torch.empty(4, 1, 8, 8, device="meta"))
        output.loss.backward()
        assert output.prediction.shape == (4, 12, 4)
    with pytest.raises(RuntimeError, match="meta"):
        output.loss.item()


@pytest.mark.usefixtures("compilable")
def test_model_compiles_into_one_graph_with_the_same_loss_and_gradients(make_mae):
    model = perturbed(make_mae())
    images, split = images_for(model), split_for(model)
    model(images, split).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = model(images, split).loss.item()
    model.zero_grad()
    # One graph, forward and backward, without a break; generating code for it takes a minute and is PyTorch's to test.
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(images, split)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-5)


BAD = {
    "ratio of zero": ({"mask_ratio": 0.0}, r"`mask_ratio`.*0\.0"),
    "ratio of one": ({"mask_ratio": 1.0}, r"`mask_ratio`.*1\.0"),
    "negative ratio": ({"mask_ratio": -0.2}, r"`mask_ratio`.*-0\.2"),
    "no visible patch": ({"mask_ratio": 0.99}, r"`mask_ratio`.*0\.99"),
    "no masked patch": ({"mask_ratio": 0.01}, r"`mask_ratio`.*0\.01"),
    "no regular grid": ({"mask_ratio": 0.6, "strategy": "grid"}, r"`mask_ratio`.*grid.*0\.6"),
    "height": ({"image_size": (9, 8)}, "Expected `image_size` height 9 to be a multiple of `patch_size` 2"),
    "width": ({"image_size": (8, 9)}, "Expected `image_size` width 9 to be a multiple of `patch_size` 2"),
    "size of the default patch": ({"image_size": 40, "patch_size": None}, "40.* multiple of .*16"),
    "unknown name": ({"encoder": "vit_tiny_patch16_225"}, "'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
    "convolutional": ({"encoder": "resnet18"}, "`encoder`.*(resnet18|ResNet)"),
    "another transformer": ({"encoder": "swin_tiny_patch4_window7_224"}, "`encoder`.*(swin|Swin)"),
    "two class tokens": ({"encoder": "deit_tiny_distilled_patch16_224"}, "`encoder`.*Distilled"),
    "decoder heads": ({"decoder_heads": 3}, "Expected `decoder_heads` to divide `decoder_dim`=16, got 3"),
    "decoder width": ({"decoder_dim": 18, "decoder_heads": 2}, "Expected `decoder_dim` .* multiple of 4, got 18"),
    "decoder depth": ({"decoder_depth": 0}, "Expected `decoder_depth` of at least 1, got 0"),
    "encoder width": ({"encoder_args": {"embed_dim": 22}}, "width.* multiple of 4, got 22"),
    "encoder heads": ({"encoder_args": {"num_heads": 5}}, "`encoder_args`"),
    "unknown override": ({"encoder_args": {"embed_dimm": 24}}, "embed_dimm"),
    "patch dropout": ({"encoder_args": {"patch_drop_rate": 0.5}}, "`patch_drop_rate`"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD.values(), ids=BAD)
def test_bad_values_raise_one_sentence(make_mae, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make_mae(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"image_size": 16}, {"patch_size": 4}, {"in_chans": 3}, {"encoder_args": {"depth": 3}}],
)
def test_values_that_contradict_a_given_encoder_raise(options):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=24, depth=1, num_heads=2
    )
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        MaskedAutoencoder(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options)


@pytest.mark.parametrize("network", [nn.Linear(2, 2), "resnet"])
def test_an_instance_that_is_no_vision_transformer_raises(network):
    network = timm.create_model("resnet10t") if network == "resnet" else network
    with pytest.raises(ValueError, match="Expected `encoder` to be a timm VisionTransformer, got a"):
        MaskedAutoencoder(network)
