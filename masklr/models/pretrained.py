"""Weights of vision transformers and masked autoencoders from files, whoever wrote them.

Three layouts are read: masklr's own (checkpoints of a run, what `masklr export` writes), timm's, and that of the
original release of the masked autoencoder, with or without its decoder.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masklr.state_dicts import checkpoint_state_dict

DECODER = ("decoder_", "mask_token")
# Where a transformer lives in checkpoints of masklr's tasks and in their models.
PREFIXES = ("model.encoder.", "model.backbone.", "encoder.", "backbone.")
# Axis of a decoder's weights that is the residual stream, where it is not the first.
RESIDUAL_AXES = {"qkv.weight": 1, "fc1.weight": 1, "decoder_head.weight": 1, "mask_token": 2}


def mae_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file under the names of `MaskedAutoencoder`: `encoder.*` and, if it has one, the decoder.

    The heads of classifiers are left out. The decoder of the original release is brought to masklr's order of pixels
    in a patch, (channel, y, x) instead of (y, x, channel), and of the channels of its positions.

    Args:
        path: A checkpoint of Lightning, torch or safetensors; no code of it is run.

    Returns:
        Tensors by key, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or a decoder whose positions are not the original ones.
    """
    state = {_plain(key): tensor for key, tensor in checkpoint_state_dict(path).items()}
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None)
    if prefix is None:
        decoder = {key: tensor for key, tensor in state.items() if key.startswith(DECODER)}
        encoder = {key: t for key, t in state.items() if key not in decoder and not key.startswith("head.")}
        if "decoder_pred.weight" in decoder:
            decoder = _from_original(decoder, encoder, path)
    else:
        encoder = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        outside = prefix.removesuffix("encoder.").removesuffix("backbone.")
        inside = {key.removeprefix(outside): tensor for key, tensor in state.items() if key.startswith(outside)}
        decoder = {key: tensor for key, tensor in inside.items() if key.startswith(DECODER)}
    return {f"encoder.{key}": tensor for key, tensor in encoder.items()} | decoder


def load_weights(model: Any, path: str | Path, argument: str = "weights") -> None:
    """Give a masked autoencoder the weights of a file, in place; its decoder stays as it is if the file has none.

    Args:
        model: A `MaskedAutoencoder`.
        path: The file; see `mae_state_dict`.
        argument: The argument that the path came by, for errors.

    Raises:
        ValueError: The file is of another architecture; the sentence names the first three mismatches.
    """
    state = mae_state_dict(path)
    whole = any(key.startswith(DECODER) for key in state)
    wanted = {key: t for key, t in model.state_dict().items() if whole or key.startswith("encoder.")}
    _fit_positions(state, "encoder.pos_embed", model.encoder)
    _check_same(wanted, state, argument, path)
    model.load_state_dict(state, strict=False)


def load_encoder(vit: nn.Module, path: str | Path, argument: str = "weights") -> None:
    """Give a timm vision transformer without a head the encoder's weights of a file, in place.

    Position embeddings of another number of patches are interpolated.

    Args:
        vit: The transformer.
        path: The file; see `mae_state_dict`.
        argument: The argument that the path came by, for errors.

    Raises:
        ValueError: The file is of another architecture; the sentence names the first three mismatches.
    """
    state = {k.removeprefix("encoder."): t for k, t in mae_state_dict(path).items() if k.startswith("encoder.")}
    _fit_positions(state, "pos_embed", vit)
    _check_same(vit.state_dict(), state, argument, path)
    vit.load_state_dict(state, strict=True)


def _plain(key: str) -> str:
    """A key without what compilation and data-parallel wrappers put into it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _fit_positions(state: dict[str, Tensor], key: str, vit: Any) -> None:
    """Interpolate the position embeddings of a square image, where the transformer has another number of patches."""
    from timm.layers import resample_abs_pos_embed

    found, own = state.get(key), getattr(vit, "pos_embed", None)
    if found is None or own is None or found.ndim != 3 or found.shape[1] == own.shape[1]:
        return
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    num_patches = found.shape[1] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    if side and side * side == num_patches:
        grid = list(vit.patch_embed.grid_size)
        state[key] = resample_abs_pos_embed(found, grid, old_size=[side, side], num_prefix_tokens=num_prefix)


def _check_same(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], argument: str, path: str | Path) -> None:
    """Raise unless both have the same keys and shapes."""
    mismatches = [
        f"{key} is missing" if key not in found else f"{key} is {_shape(found[key])}, not {_shape(tensor)}"
        for key, tensor in wanted.items()
        if key not in found or found[key].shape != tensor.shape
    ]
    mismatches += [f"{key} is too many" for key in found if key not in wanted]
    if mismatches:
        first = ", ".join(mismatches[:3])
        more = f" ({len(mismatches)} mismatches in all)" if len(mismatches) > 3 else ""
        raise ValueError(f"Expected `{argument}` of this architecture, got {path}, in which {first}{more}.")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _from_original(decoder: dict[str, Tensor], encoder: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The decoder of the original release in masklr's names and orders."""
    _, channels, height, width = encoder["patch_embed.proj.weight"].shape
    state = {
        key.replace("decoder_pred.", "decoder_head."): tensor
        for key, tensor in decoder.items()
        if key != "decoder_pos_embed"
    }
    for key in ("decoder_head.weight", "decoder_head.bias"):
        pixels = state[key].unflatten(0, (height, width, channels))
        state[key] = pixels.movedim(2, 0).flatten(0, 2)
    # Quarters of a position: sine and cosine of x, then of y, there; sines of y and x, then cosines, here. Everything
    # that reads from the decoder's residual stream or writes to it follows.
    order = torch.arange(state["mask_token"].shape[-1]).unflatten(0, (4, -1))[[2, 0, 3, 1]].flatten()
    _check_positions(decoder.get("decoder_pos_embed"), order, path)
    for key, tensor in state.items():
        if not key.endswith(("qkv.bias", "fc1.bias", "decoder_head.bias")):
            axis = next((axis for suffix, axis in RESIDUAL_AXES.items() if key.endswith(suffix)), 0)
            state[key] = tensor.index_select(axis, order)
    return state


def _check_positions(positions: Tensor | None, order: Tensor, path: str | Path) -> None:
    """Raise unless the decoder's positions, in masklr's order, are the fixed ones that masklr computes."""
    from timm.layers import build_sincos2d_pos_embed

    if positions is None:
        return
    side = math.isqrt(positions.shape[1] - 1)
    expected = build_sincos2d_pos_embed([side, side], len(order))
    found = positions[0, -len(expected) :][:, order].float()
    if not torch.allclose(found, expected, atol=1e-3):
        raise ValueError(f"Expected the fixed sine-cosine positions of the original decoder, got others in {path}.")
