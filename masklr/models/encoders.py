"""Encoders of masked autoencoders: timm vision transformers, by name or as instances."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from masklr.models.timm_models import pair, size_options, timm_model


def encoder_options(
    image_size: int | Sequence[int] | None,
    patch_size: int | Sequence[int] | None,
    in_chans: int | None,
    encoder_args: dict[str, Any],
) -> dict[str, Any]:
    """Options of `timm.create_model` for the encoder of a masked autoencoder: without a head, the norm kept.

    Args:
        image_size: Height and width in pixels, one number if equal. None: the architecture's own.
        patch_size: Height and width of a patch in pixels, one number if equal. None: the architecture's own.
        in_chans: Number of image channels. None: the architecture's own.
        encoder_args: Overrides.

    Raises:
        ValueError: The patches do not divide the image.
    """
    image, patch = pair(image_size), pair(patch_size)
    if image and patch:
        _check_divides(image, patch)
    # Without a class token timm must not pool by it; its final norm has to stay before pooling, where the decoder
    # reads.
    pooling = {"global_pool": "token" if encoder_args.get("class_token", True) else "avg", "fc_norm": False}
    return {"num_classes": 0, **size_options(image, patch, in_chans), **pooling, **encoder_args}


def named_encoder(
    name: str,
    image_size: int | tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    in_chans: int | None,
    encoder_args: dict[str, Any],
) -> Any:
    """A timm vision transformer by name, without a head, for these sizes."""
    from timm.layers import build_sincos2d_pos_embed

    options = encoder_options(image_size, patch_size, in_chans, encoder_args)
    encoder = timm_model("encoder", name, options, family="vit_*")
    _check_vision_transformer(encoder)
    if not encoder_args.get("pretrained"):
        encoder.apply(init_as_in_paper)
        # The authors' xavier initialization at their size (768 inputs, width 768), for any size: patches of few pixels
        # would otherwise be drowned by their positions.
        nn.init.normal_(encoder.patch_embed.proj.weight, std=encoder.patch_embed.proj.weight[0].numel() ** -0.5)
        if encoder.pos_embed is not None:
            if encoder.embed_dim % 4:
                raise ValueError(f"Expected the encoder's width to be a multiple of 4, got {encoder.embed_dim}.")
            positions = build_sincos2d_pos_embed(list(encoder.patch_embed.grid_size), encoder.embed_dim)
            with torch.no_grad():
                encoder.pos_embed.zero_()  # prefix tokens have no place in the image
                encoder.pos_embed[:, -len(positions) :] = positions
            encoder.pos_embed.requires_grad_(False)
    return encoder


def _check_divides(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if patch < 1 or size % patch:
            raise ValueError(f"Expected `image_size` {side} {size} to be a multiple of `patch_size` {patch}.")


def _check_vision_transformer(encoder: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    kind = type(encoder).__name__
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"Expected `encoder` to be a timm VisionTransformer, got a {kind}.")
    if type(encoder)._pos_embed is not VisionTransformer._pos_embed:
        # A distilled one has a second class token, which `encode` would leave out.
        raise ValueError(f"Expected `encoder` to place its tokens as timm's VisionTransformer; a {kind} does not.")
    projection = getattr(encoder.patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        raise ValueError(f"Expected `encoder` to embed patches by one convolution; that of this {kind} does not.")
    if not isinstance(encoder.patch_drop, nn.Identity):
        raise ValueError("Expected `encoder` without `patch_drop_rate`: the masked autoencoder drops patches itself.")
    _check_divides(tuple(encoder.patch_embed.img_size), tuple(encoder.patch_embed.patch_size))


def checked_instance(
    encoder: Any,
    image_size: int | tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    in_chans: int | None,
    encoder_args: dict[str, Any] | None,
) -> Any:
    """An encoder that came as an instance, if the other arguments agree with it."""
    _check_vision_transformer(encoder)
    if encoder_args:
        raise ValueError("Expected no `encoder_args` beside an `encoder` that is an instance; it is already built.")
    embed = encoder.patch_embed
    own = {"image_size": tuple(embed.img_size), "patch_size": tuple(embed.patch_size)}
    for argument, value in (("image_size", pair(image_size)), ("patch_size", pair(patch_size))):
        if value is not None and value != own[argument]:
            raise ValueError(f"Expected `{argument}` {own[argument]}, that of the `encoder` given, got {value}.")
    if in_chans is not None and in_chans != embed.proj.in_channels:
        raise ValueError(f"Expected `in_chans` {embed.proj.in_channels}, that of the `encoder` given, got {in_chans}.")
    return encoder


def init_as_in_paper(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as the masked autoencoder's authors initialize them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
