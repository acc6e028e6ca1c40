"""Put masks and low-rank layers into any model, and take the masks out again."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from masklr.layers.dropconnect import DropConnectConv2d, DropConnectLinear
from masklr.layers.factories import Dropout, LayerFactory, MaskFactory, become, output_mask, timm_drop_path
from masklr.layers.groups import GroupDropout
from masklr.names import matching

PLAIN = {DropConnectLinear: nn.Linear, DropConnectConv2d: nn.Conv2d}


def insert(
    model: nn.Module, masks: Mapping[str, LayerFactory], *, optimizer: torch.optim.Optimizer | None = None
) -> list[str]:
    """Replace layers of a model by what factories make of them, in place.

    Everything is checked before anything changes. Masks change neither parameters nor state_dict keys nor what the
    model computes in evaluation. A layer that the model holds under several names changes under all of them. Insert
    before the model is compiled: hooks that are set later do not fire.

    Args:
        model: Any module. It is not replaced itself, only what is inside it.
        masks: Factories by patterns of names in `named_modules()` (see `masklr.names.matching`). A layer may match
            one pattern only.
        optimizer: One that exists already: a factory that would replace parameters that it holds is then refused.

    Returns:
        Names of the layers that changed.

    Raises:
        ValueError: A pattern matches nothing, two match the same layer, a factory can't replace a layer that its
            pattern matches (the sentence names it), or `optimizer` holds a parameter that would be replaced.

    Example:
        >>> from masklr.layers import DropConnect
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> insert(model, {"2": DropConnect(0.5)})
        ['2']
        >>> remove(model), type(model[2]).__name__
        (['2'], 'Linear')
    """
    layers = _layers(model)
    chosen = _chosen(layers, masks)
    for name, factory in chosen.items():
        factory.check(layers[name], f"{name!r}")
        _check_place(name, factory)
        if optimizer is not None and not factory.keeps_parameters:
            _check_not_held(name, layers[name], optimizer)
    replacements: dict[int, nn.Module] = {}
    # New layers are made before any layer changes in place: should one fail (a weight that is not finite has no
    # decomposition), the model is as it was.
    for name, factory in sorted(chosen.items(), key=lambda item: item[1].keeps_parameters):
        if id(layers[name]) not in replacements:
            replacements[id(layers[name])] = factory.replacement(layers[name])
    changed = [name for name, layer in layers.items() if id(layer) in replacements]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and replacements.get(id(child), child) is not child:
                setattr(parent, name, replacements[id(child)])
    return changed


def remove(model: nn.Module) -> list[str]:
    """Take out what `insert` put in: the plain classes come back, bitwise the same parameters, hooks off.

    An `nn.Dropout`, `DropPath` or `nn.Identity` has its own class and p again. DropConnect layers that were built as
    such become plain too. Low-rank layers stay: their weight is no longer the original one.

    Args:
        model: Any module.

    Returns:
        Names of the layers that changed.
    """
    layers = _layers(model)
    changed = {id(layer) for layer in layers.values() if _remove_from(layer)}
    return [name for name, layer in layers.items() if id(layer) in changed]


@runtime_checkable
class Mask(Protocol):
    """Whatever drops something with an adjustable probability."""

    p: float


class _PathMask:
    """timm's DropPath under the name `p`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def p(self) -> float:
        """Probability that a sample is dropped."""
        return float(self.layer.drop_prob)  # type: ignore[arg-type]

    @p.setter
    def p(self, value: float) -> None:
        self.layer.drop_prob = value  # type: ignore[assignment]


def masking(model: nn.Module) -> dict[str, Mask]:
    """All masks of a model, each with a `p` that may be read and set.

    DropConnect layers, `GroupDropout`, torch's dropouts, timm's `DropPath` and inserted output masks. A dropout or
    `DropPath` with p = 0 that was not inserted is left out: timm's models are full of them.

    Args:
        model: Any module.

    Returns:
        Masks by the layer's name. A layer that drops weights and whose output is masked too appears twice, the output
        as `{name}.output`. A layer with several names appears under the first.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
        >>> {name: mask.p for name, mask in masking(model).items()}
        {'1': 0.3}
    """
    masks: dict[str, Mask] = {}
    seen: set[int] = set()
    for name, layer in {"": model, **_layers(model)}.items():
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        own, hook = _own_mask(layer), output_mask(layer)
        if own is not None and (own.p > 0 or hasattr(layer, "_before_mask") or type(layer) in PLAIN):
            masks[name] = own
        if hook is not None:
            masks[f"{name}.output".strip(".") if name in masks else name] = hook
    return masks


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise if an optimizer holds parameters that the model no longer has.

    Args:
        model: The model that the optimizer trains.
        optimizer: Any optimizer.

    Raises:
        ValueError: It holds at least one orphaned parameter.
    """
    owned = {id(parameter) for parameter in model.parameters()}
    shapes = [tuple(parameter.shape) for parameter in _held(optimizer) if id(parameter) not in owned]
    if shapes:
        raise ValueError(
            f"Expected `optimizer` to hold parameters of the model alone, got {len(shapes)} that it no longer has, "
            f"the first of shape {shapes[0]}; make the optimizer after `insert`."
        )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules inside a model under all their names, without the prefix of compiled modules."""
    names = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if plain:
            names[plain] = layer
    return names


def _chosen(layers: Mapping[str, nn.Module], masks: Mapping[str, LayerFactory]) -> dict[str, LayerFactory]:
    chosen: dict[str, LayerFactory] = {}
    pattern_of: dict[int, str] = {}
    for pattern, factory in masks.items():
        if not isinstance(factory, LayerFactory):
            raise ValueError(f"Expected factories such as `Dropout(0.1)` in `masks`, got {factory!r} at {pattern!r}.")
        for name in matching(layers, [pattern], "masks"):
            other = pattern_of.setdefault(id(layers[name]), pattern)
            if other != pattern:
                raise ValueError(
                    f"Expected `masks` to match each layer once, got {other!r} and {pattern!r}, which match {name!r}."
                )
            chosen[name] = factory
    return chosen


def _check_place(name: str, factory: LayerFactory) -> None:
    if name.rpartition(".")[2] == "attn_drop" and isinstance(factory, MaskFactory) and not isinstance(factory, Dropout):
        raise ValueError(
            f"Expected Dropout for {name!r}, got {type(factory).__name__}: "
            "fused attention reads the layer's p and drops single probabilities."
        )


def _check_not_held(name: str, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for parameter in _held(optimizer)}
    if any(id(parameter) in held for key, parameter in layer.named_parameters() if key != "bias"):
        raise ValueError(
            f"Expected `optimizer` to hold no parameter that is replaced, got one of {name!r}; "
            "make the optimizer after `insert`."
        )


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remove_from(layer: nn.Module) -> bool:
    """Take masks out of one layer; whether there were any."""
    hooks = [key for key, hook in layer._forward_hooks.items() if hook is output_mask(layer)]
    for key in hooks:
        del layer._forward_hooks[key]
    before = layer.__dict__.pop("_before_mask", None)
    if before is not None:
        become(layer, before)
    if type(layer) in PLAIN:
        layer.__class__ = PLAIN[type(layer)]
        del layer.p, layer.per
        return True
    return bool(hooks) or before is not None


def _own_mask(layer: nn.Module) -> Mask | None:
    if isinstance(layer, (*PLAIN, GroupDropout, nn.modules.dropout._DropoutNd)):
        return layer  # type: ignore[return-value]
    return _PathMask(layer) if type(layer) is timm_drop_path() else None
