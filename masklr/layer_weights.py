"""The weights of single layers as matrices: what a layer's matrix is, and the names of its parts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix of a model, read when it is asked for.

    Attributes:
        layer: The module that applies it.
        source: Gives the parameter, or the effective weight, of which it is a view.
        view: Makes a matrix of it, or of its gradient.
    """

    layer: nn.Module
    source: Callable[[], Tensor]
    view: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, cols = self.view(torch.empty(self.source().shape, device="meta")).shape
        return rows, cols

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter it is a view of; None of an effective weight that is computed."""
        source = self.source()
        return source if isinstance(source, nn.Parameter) else None

    def value(self) -> Tensor:
        """The matrix, detached; gathered from all processes if they hold shards of it, so that all must ask."""
        with torch.no_grad():
            return self.view(_gathered(self.source().detach()))

    def gradient(self) -> Tensor | None:
        """The same view of the parameter's gradient, gathered like the matrix; None if there is none."""
        parameter = self.parameter
        if parameter is None or parameter.grad is None:
            return None
        gradient = parameter.grad.detach()
        return self.view(_gathered(gradient.to_dense() if gradient.is_sparse else gradient))

    def part(self, view: Callable[[Tensor], Tensor]) -> "Weight":
        """A part of the matrix, such as the rows of one head."""
        return Weight(self.layer, self.source, lambda source: view(self.view(source)))


def outermost_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without what lies inside a layer with an effective weight, and without `_orig_mod`.

    A module that stands in several places comes with each of its names.

    Args:
        module: Any module.
        name: Its name.
    """
    yield name, module
    if hasattr(module, "effective_weight"):
        return
    for child_name, child in module.named_children():
        yield from outermost_modules(child, name if child_name == "_orig_mod" else joined(name, child_name))


def joined(name: str, part: str) -> str:
    """Two names with a dot between them, if neither is empty.

    Args:
        name: Name of a module, or nothing.
        part: Name of a part, or nothing.
    """
    return f"{name}.{part}".strip(".")


def layer_weights(modules: list[tuple[str, nn.Module]], asked: set[str]) -> tuple[dict[str, Weight], set[str]]:
    """The matrices of all layers by name.

    Args:
        modules: Modules by name, as `outermost_modules` gives them.
        asked: Own names of parameters to be measured though they belong to no layer, such as `pos_embed`.

    Returns:
        All matrices, shared ones under each of their names; and the names that repeat a matrix of an earlier one.
    """
    by_name = dict(modules)
    weights: dict[str, Weight] = {}
    repeated: set[str] = set()
    seen: set[tuple[int, ...]] = set()
    for name, module in modules:
        parent_name, _, own_name = name.rpartition(".")
        fused = own_name == "qkv" and _is_attention(by_name.get(parent_name))
        parts = _parts(module, fused) or _bare(module, asked)
        named = {joined(name, part) or "weight": weight for part, weight in parts.items()}
        shared = tuple(id(p) for n, p in module.named_parameters() if n.rpartition(".")[2] != "bias")
        if named and shared in seen:
            repeated |= named.keys()
        elif named:
            seen.add(shared)
        weights |= named
    return weights, repeated


def _is_attention(module: nn.Module | None) -> bool:
    return module is not None and (hasattr(module, "num_heads") or "attention" in type(module).__name__.lower())


def _parts(module: nn.Module, fused: bool) -> dict[str, Weight]:
    """The matrices of one module by the part of the name that follows the module's; empty if it has none."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return {f"in_proj.{part}": w for part, w in _thirds(_weight(module, "in_proj_weight")).items()}
        return {f"in_proj.{part}": _weight(module, f"{part}_proj_weight") for part in "qkv"}
    if not hasattr(module, "effective_weight") and not isinstance(module, (nn.Linear, *CONVOLUTIONS, *EMBEDDINGS)):
        return {}
    weight = _weight(module, "weight")
    return _thirds(weight) if fused and weight.shape[0] % 3 == 0 else {"": weight}


def _weight(module: nn.Module, attribute: str) -> Weight:
    def source() -> Tensor:
        if hasattr(module, "effective_weight"):
            with torch.no_grad():
                return module.effective_weight()  # type: ignore[operator]
        return getattr(module, attribute)

    return Weight(module, source, lambda weight: weight.flatten(1))


def _thirds(weight: Weight) -> dict[str, Weight]:
    def third(i: int) -> Callable[[Tensor], Tensor]:
        return lambda matrix: matrix.chunk(3)[i]

    return {part: weight.part(third(i)) for i, part in enumerate("qkv")}


def _bare(module: nn.Module, asked: set[str]) -> dict[str, Weight]:
    """The parameters that were asked for of a module that is no layer, if they have two axes longer than 1."""
    parameters = module.named_parameters(recurse=False)
    names = [name for name, p in parameters if name in asked and sum(size > 1 for size in p.shape) > 1]
    return {name: Weight(module, partial(getattr, module, name), lambda p: p.squeeze().flatten(1)) for name in names}


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a DTensor); a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
