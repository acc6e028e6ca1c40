"""Which matrices of a model are measured, and under which names.

Every weight of a linear or convolutional layer is seen as a matrix without being copied; fused projections are split.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from masklr.names import matching

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def measured_matrices(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Shaped[Tensor, "rows cols"]]:
    """Weight matrices of a model by name, as detached views of its parameters.

    * Linear layer: its weight (out, in), under the layer's name in `named_modules()`.
    * Convolution: one row a filter, (out, in / groups * kernel). A depthwise one is the matrix of its filters too: the
      blocks of its block-diagonal matrix are vectors, whose rank says nothing. A transposed convolution is measured as
      the convolution that it is the adjoint of, (in, out / groups * kernel).
    * Fused projection `qkv` of an attention: three matrices `...qkv.q`, `...qkv.k`, `...qkv.v`. The input projection of
      `nn.MultiheadAttention`: `...in_proj.q`, `...in_proj.k`, `...in_proj.v`.
    * A layer with a method `effective_weight()`: what that returns, and nothing inside the layer.

    Weights that several layers share are returned once, under the first name. The prefix `_orig_mod.` of compiled
    modules is left out of names. If the model is itself such a layer, the name is `weight`.

    Args:
        model: Any module.
        include: Patterns of names (see `masklr.names.matching`) to keep. None keeps all.
        exclude: Patterns of names to leave out.

    Returns:
        Matrices in the order of `named_modules()`. They share memory with the parameters (a convolution stored
        channels-last is copied, as is an effective weight): writing to one changes the model.

    Raises:
        ValueError: A pattern matches nothing, or no matrix is left.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8, 2))
        >>> {name: tuple(matrix.shape) for name, matrix in measured_matrices(model).items()}
        {'0': (8, 75), '2': (2, 8)}
    """
    matrices: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for name, module in _outermost(model, ""):
        weights = tuple(id(p) for n, p in module.named_parameters() if n.rpartition(".")[2] != "bias")
        parts = None if weights in seen else _parts(module, _is_fused(model, name, module))
        if parts:
            seen.add(weights)
            matrices |= {_joined(name, part) or "weight": matrix for part, matrix in parts.items()}
    return _selected(matrices, include, exclude)


def _outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without what lies inside a layer with an effective weight, and without `_orig_mod`."""
    yield name, module
    if hasattr(module, "effective_weight"):
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, name if child_name == "_orig_mod" else _joined(name, child_name))


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}".strip(".")


def _is_fused(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a layer is the fused projection of an attention: its name is qkv and its parent has heads."""
    parent_name, _, own_name = name.rpartition(".")
    if own_name != "qkv" or getattr(module, "out_features", 1) % 3:
        return False
    parent = dict(_outermost(model, "")).get(parent_name)
    return parent is not None and (hasattr(parent, "num_heads") or "attention" in type(parent).__name__.lower())


def _parts(module: nn.Module, fused: bool) -> dict[str, Tensor]:
    """The matrices of one module by the part of the name that follows the module's; empty if it has none."""
    if isinstance(module, nn.MultiheadAttention):
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = separate if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
        return {f"in_proj.{part}": w.detach() for part, w in zip("qkv", weights, strict=True)}
    if hasattr(module, "effective_weight"):
        with torch.no_grad():
            weight = module.effective_weight().detach()  # type: ignore[operator]
    elif isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        weight = module.weight.detach()
    else:
        return {}
    matrix = weight.flatten(1)
    if fused:
        return dict(zip("qkv", matrix.chunk(3), strict=True))
    return {"": matrix}


def _selected(
    matrices: dict[str, Tensor], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Tensor]:
    kept = list(matrices) if include is None else matching(matrices, include, "include")
    left_out = set(matching(matrices, exclude or (), "exclude"))
    selected = {name: matrices[name] for name in kept if name not in left_out}
    if not selected:
        raise ValueError(
            f"Expected a matrix to measure, got `include` {include} and `exclude` {exclude} of {len(matrices)}."
        )
    return selected
