"""Weights without a model: checkpoint files of tensors, and the matrices of a state dict."""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from masklr.names import matching

# Where checkpoints keep the state dict: Lightning and timm, facebookresearch, many others.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state")
# Fused projections, and the separate ones of `nn.MultiheadAttention`: key's own name, and the names of the parts.
IN_PROJECTIONS = {"in_proj_weight": "qkv", "q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


def checkpoint_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file: of Lightning (`.ckpt`), torch (`.pt`, `.pth`, `.bin`) or safetensors.

    No code of the file is run: what is more than tensors and plain values is refused.

    Args:
        path: The file.

    Returns:
        Tensors by key, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, is truncated, has no weights, or needs code to be run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint, but there is no file {path}.")
    if path.is_dir():
        raise ValueError(f"Expected a checkpoint file, got the folder {path}.")
    loaded = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    for held in (*(loaded.get(name) for name in CONTAINERS), loaded):
        tensors = {k: v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, Mapping) else {}
        if tensors:
            return tensors
    keys = ", ".join(str(key) for key in list(loaded)[:5]) or "none"
    raise ValueError(f"Expected a checkpoint with weights, got {path} with the keys {keys}.")


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Cannot read {path}: it is truncated, or no safetensors file.") from error


def _torch_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # zip; pickle's protocols
            raise ValueError(f"Cannot read {path}: it is truncated, or no checkpoint.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|function|class:|instance of type) ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"Refused to read {path}: it needs code to be run, {code[1]}; save its state dict alone."
            ) from error
        raise ValueError(f"Cannot read {path}: it is truncated, or no checkpoint.") from error
    except Exception as error:  # torch's reader raises of every kind when bytes are not what they should be
        raise ValueError(f"Cannot read {path}: it is truncated, or no checkpoint.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected a checkpoint with a state dict, got {path} with a {type(loaded).__name__}.")
    return loaded


def state_dict_matrices(
    state: Mapping[str, Tensor], *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Shaped[Tensor, "rows cols"]]:
    """Weight matrices of a state dict, named as `masklr.matrices.measured_matrices` names those of its model.

    * `{layer}.weight` of two axes or more: the matrix `{layer}`, flattened to (out, rest). Linear layers, convolutions
      and embeddings are not to be told apart, and are all there.
    * `{...}.qkv.weight` with rows in three equal parts: `{...}.qkv.q`, `...k`, `...v`; likewise the input projection of
      `nn.MultiheadAttention`, as `{...}.in_proj.q` and so on.
    * Any other parameter, such as `pos_embed`, only if a pattern in `include` ends in its name: axes of length 1 are
      left out, one row an entry of the first that remains.
    * Layers of several weights (low-rank factors, adapters) are listed by their parts: what they do together only the
      model knows.

    Weights that share memory are returned once, under the first name; `_orig_mod.` of compiled modules is left out.

    Args:
        state: Tensors by key.
        include: Patterns of names (see `masklr.names.matching`) to keep. None keeps all.
        exclude: Patterns of names to leave out.

    Returns:
        Matrices in the order of the keys; views where that is possible.

    Raises:
        ValueError: A pattern matches nothing, or no matrix is left.

    Example:
        >>> shapes = {"attn.qkv.weight": (6, 2), "norm.weight": (2,), "conv.weight": (4, 3, 5, 5)}
        >>> state = {key: torch.zeros(shape) for key, shape in shapes.items()}
        >>> {name: tuple(matrix.shape) for name, matrix in state_dict_matrices(state).items()}
        {'attn.qkv.q': (2, 2), 'attn.qkv.k': (2, 2), 'attn.qkv.v': (2, 2), 'conv': (4, 75)}
    """
    asked = {pattern.rpartition(".")[2] for pattern in include or ()}
    matrices: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for key, tensor in state.items():
        memory = (tensor.data_ptr(), tuple(tensor.shape))
        if not tensor.is_floating_point() or (tensor.numel() and memory in seen):
            continue
        seen.add(memory)
        matrices |= dict(_matrices_of(key.replace("_orig_mod.", ""), tensor.detach(), asked))
    kept = list(matrices) if include is None else matching(matrices, include, "include")
    left_out = set(matching(matrices, exclude or (), "exclude"))
    selected = {name: matrices[name] for name in kept if name not in left_out}
    if not selected:
        raise ValueError(
            f"Expected a matrix to measure, got none of {len(state)} tensors, such as {next(iter(state))!r}."
        )
    return selected


def _matrices_of(key: str, tensor: Tensor, asked: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The matrices of one tensor by name; none of a bias, a norm or a token."""
    layer, _, own_name = key.rpartition(".")
    if own_name in IN_PROJECTIONS and tensor.ndim == 2:
        parts = IN_PROJECTIONS[own_name]
        for part, matrix in zip(parts, tensor.chunk(len(parts)), strict=True):
            yield f"{layer}.in_proj.{part}".strip("."), matrix
    elif own_name == "weight" and tensor.ndim > 1:
        matrix = tensor.flatten(1)
        if layer.rpartition(".")[2] == "qkv" and len(matrix) % 3 == 0:
            for part, third in zip("qkv", matrix.chunk(3), strict=True):
                yield f"{layer}.{part}", third
        else:
            yield layer or "weight", matrix
    elif own_name in asked and sum(size > 1 for size in tensor.shape) > 1:
        yield key, tensor.squeeze().flatten(1)
