"""Where a model masks, and what each mask multiplies: the ground on which induced penalties are predicted and measured.

A mask is a tensor m of mean one, with independent entries of variance p / (1 - p), that multiplies activations or
weights. `multiplied` puts any other m in its place, in evaluation mode; `masks_on` turns the real masks on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from masklr.callbacks.features import plain
from masklr.layers import DropConnectConv2d, DropConnectLinear, Dropout, DropPath, GroupDropout, Groups, masking
from masklr.layers.factories import OutputMask
from masklr.names import matching

Kind = Literal["units", "channels", "groups", "paths", "weights", "unseen"]

# Per-sample gradients of a weight are formed for as many samples at a time as fit into this many entries (128 MB).
MAX_ENTRIES = 2**25


@dataclass(frozen=True)
class Site:
    """A place where a model masks.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        p: Probability of being dropped.
        kind: What one draw multiplies: single `units`; `channels` of a sample; `groups` of channels; the whole branch
            of a sample (`paths`); `weights`; or something that only training mode shows (`unseen`: patches that are
            left out, probabilities inside fused attention).
        output_mask: The inserted hook, where the mask is on the layer's output.
        group_size: Channels in a group.
        dim: Axis of the groups.
        owner: The layer whose training mode turns the mask on, where that is not the layer itself.
    """

    name: str
    layer: nn.Module
    p: float
    kind: Kind
    output_mask: OutputMask | None = None
    group_size: int = 1
    dim: int = -1
    owner: nn.Module | None = None

    @property
    def variance(self) -> float:
        """Variance of the mask, p / (1 - p)."""
        return self.p / (1 - self.p)

    def shape(self, output: Tensor) -> tuple[int, ...]:
        """Shape of the independent draws for an output of the layer."""
        if self.kind == "weights":
            return tuple(self.layer.weight.shape)  # type: ignore[arg-type]
        sizes = list(output.shape)
        if self.kind == "groups":
            sizes[self.dim] //= self.group_size
        elif self.kind in ("paths", "channels"):
            kept = 1 if self.kind == "paths" else 2
            sizes[kept:] = [1] * (len(sizes) - kept)
        return tuple(sizes)

    def masked(self, args: tuple[Any, ...], output: Tensor, m: Tensor) -> Tensor:
        """The layer's output when what the site masks is multiplied by m."""
        if self.kind == "weights":
            layer: Any = self.layer
            if isinstance(layer, nn.Conv2d):
                return layer._conv_forward(args[0], layer.weight * m, layer.bias)
            return nn.functional.linear(args[0], layer.weight * m, layer.bias)
        if self.kind == "groups":
            m = m.repeat_interleave(self.group_size, dim=self.dim)
        return output * m


def find_sites(model: nn.Module, include: Sequence[str] | None = None) -> list[Site]:
    """All places where a model drops something with p > 0, in the order of `named_modules()`.

    Args:
        model: Any module.
        include: Patterns of their names; all if None.

    Raises:
        ValueError: There is none, or a pattern matches nothing.
    """
    layers = {plain(name): layer for name, layer in model.named_modules()}
    found = {plain(name): site for name, mask in masking(model).items() if (site := _site(name, mask, layers)).p > 0}
    for name, layer in layers.items():
        if type(layer).__name__ == "PatchDropout" and getattr(layer, "prob", 0) > 0:
            found[name] = Site(name, layer, float(layer.prob), "unseen")
    if not found:
        raise ValueError(f"Expected a {type(model).__name__} with masks of p > 0, found none.")
    order = {name: index for index, name in enumerate(layers)}
    chosen = sorted(
        matching(found, include or ["**"], "include"), key=lambda n: order.get(n.removesuffix(".output"), 0)
    )
    return [found[name] for name in chosen]


def _site(name: str, mask: Any, layers: dict[str, nn.Module]) -> Site:
    name = plain(name)
    if isinstance(mask, OutputMask):
        layer, factory = layers[name.removesuffix(".output")], mask.factory
        if isinstance(factory, Groups):
            return Site(name, layer, mask.p, "groups", mask, factory.group_size, factory.dim)
        kind: Kind = "paths" if isinstance(factory, DropPath) else "units" if isinstance(factory, Dropout) else "unseen"
        return Site(name, layer, mask.p, kind, mask)
    layer = layers[name]
    parent = layers.get(name.rpartition(".")[0])
    if name.rpartition(".")[2] == "attn_drop" and hasattr(parent, "fused_attn"):
        return Site(name, layer, mask.p, "unseen", owner=parent)
    if isinstance(layer, DropConnectLinear | DropConnectConv2d):
        return Site(name, layer, mask.p, "weights")
    if isinstance(layer, GroupDropout):
        return Site(name, layer, mask.p, "groups", None, layer.group_size, layer.dim)
    if type(layer) is nn.Dropout:
        return Site(name, layer, mask.p, "units")
    if type(layer) in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return Site(name, layer, mask.p, "channels")
    return Site(name, layer, mask.p, "paths" if type(layer).__name__ == "DropPath" else "unseen")


@contextmanager
def hooked(sites: Sequence[Site], hook: Callable[[Site, tuple[Any, ...], Tensor], Tensor]) -> Iterator[None]:
    """Let a function replace the output of each site's layer; it is given the site, the layer's inputs and output."""
    with ExitStack() as stack:
        for site in sites:

            def replace(layer: nn.Module, args: tuple[Any, ...], output: Tensor, site: Site = site) -> Tensor:
                return hook(site, args, output)

            stack.callback(site.layer.register_forward_hook(replace).remove)
        yield


@contextmanager
def multiplied(sites: Sequence[Site], draw: Callable[[Site, tuple[int, ...], Tensor], Tensor]) -> Iterator[None]:
    """Multiply what each site masks by what `draw` gives for the site, the shape of its draws, and a tensor like it."""
    with hooked(sites, lambda site, args, output: site.masked(args, output, draw(site, site.shape(output), output))):
        yield


@contextmanager
def masks_on(sites: Sequence[Site]) -> Iterator[None]:
    """Turn the real masks of some sites on in a model that is in evaluation mode; batch norms stay as they are."""
    outputs = [site for site in sites if site.output_mask is not None]
    owners = [
        part for site in sites if site.output_mask is None for part in (site.layer, site.owner) if part is not None
    ]
    flags = [(part, part.training) for part in owners]
    for part in owners:
        part.training = True

    def draw(site: Site, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert site.output_mask is not None
        return site.output_mask.factory.masked(output, site.output_mask.p)

    try:
        with hooked(outputs, draw):
            yield
    finally:
        for part, training in flags:
            part.training = training


class Captured:
    """What one forward pass leaves behind for the gradients of each sample's loss in what the sites mask.

    Activations are multiplied by ones that require a gradient: the gradient in them is g * h, summed over what shares
    a draw. Of layers whose weights are masked, inputs and outputs are kept.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.tensors: list[Tensor] = []
        self._sites: list[tuple[Site, Tensor | None]] = []

    def hook(self, site: Site, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output of a site's layer, captured."""
        if site.kind == "weights":
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self._sites.append((site, args[0].detach()))
            self.tensors.append(output)
            return output
        ones = torch.ones(site.shape(output), dtype=output.dtype, device=output.device, requires_grad=True)
        self._sites.append((site, None))
        self.tensors.append(ones)
        return site.masked(args, output, ones)

    def squared_sums(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """For each site, the sum over samples and draws of (g h)^2, g w for weights, in float64.

        Args:
            gradients: Of a sum of each sample's loss, in `tensors`.
        """
        sums: dict[str, Tensor] = {}
        for (site, inputs), gradient in zip(self._sites, gradients, strict=True):
            if gradient is None:  # the loss does not depend on it
                found = torch.zeros((), dtype=torch.float64)
            elif inputs is None:
                found = gradient.double().square().sum()
            else:
                found = self._of_weights(site, inputs, gradient)
            sums[site.name] = sums[site.name] + found if site.name in sums else found
        return sums

    def _of_weights(self, site: Site, inputs: Tensor, gradient: Tensor) -> Tensor:
        layer: Any = site.layer
        groups = 1
        if isinstance(layer, DropConnectConv2d):
            groups = layer.groups
            inputs, padding = layer._padded(inputs)
            columns = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, tuple(padding), layer.stride)
            inputs, gradient = columns.transpose(1, 2), gradient.flatten(2).transpose(1, 2)
        # Windows of a sample may lie along the first axis; they are neighbours there.
        inputs = inputs.reshape(self.num_samples, -1, groups, inputs.shape[-1] // groups)
        gradient = gradient.reshape(self.num_samples, -1, groups, gradient.shape[-1] // groups)
        weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
        chunk = max(1, MAX_ENTRIES // weight.numel())
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for a, g in zip(inputs.split(chunk), gradient.split(chunk), strict=True):
            total += (torch.einsum("btgo,btgi->bgoi", g, a) * weight).double().square().sum()
        return total
