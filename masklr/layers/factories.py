"""What `insert` puts into a model: factories that YAML can name."""

import sys
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from masklr.layers.dropconnect import DropConnectConv2d, DropConnectLinear, Per, check_dropconnect
from masklr.layers.groups import GroupDropout, drop_path, group_dropout
from masklr.layers.low_rank import LowRankConv2d, LowRankLinear
from masklr.masks import check_probability


class Original(NamedTuple):
    """What a layer was before a mask took its place: its class, and those of its attributes that the mask needs."""

    layer_class: type[nn.Module]
    attributes: dict[str, Any]


class OutputMask:
    """Forward hook that masks what a layer gives, in training only.

    Args:
        factory: What masks; its `masked` is called.
        p: Probability of being dropped, in [0, 1). May be set at any time.
    """

    def __init__(self, factory: "MaskFactory", p: float) -> None:
        self.factory, self.p = factory, p

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
        """The masked output; None, which leaves the output as it is, where nothing is dropped."""
        if not layer.training or self.p == 0:
            return None
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Expected a layer that gives a tensor for {self.factory!r}, "
                f"got {type(layer).__name__}, which gives {type(output).__name__}."
            )
        return self.factory.masked(output, self.p)

    def __repr__(self) -> str:
        return f"OutputMask({self.factory!r}, p={self.p})"


class LayerFactory(ABC):
    """What makes a layer out of a layer: the base of all that `insert` takes.

    Called with a layer, it returns the replacement. Masks return the layer itself, with another class or with a hook,
    so that its parameters, their keys, its hooks and whoever refers to it stay as they are.
    """

    #: Whether the replacement holds the layer's own parameters under the same keys.
    keeps_parameters = True

    @abstractmethod
    def refusal(self, layer: nn.Module) -> str | None:
        """Why the factory can't replace a layer, as the end of a sentence; None if it can."""

    @abstractmethod
    def replacement(self, layer: nn.Module) -> nn.Module:
        """The replacement of a layer that is not refused."""

    def __call__(self, layer: nn.Module) -> nn.Module:
        """The replacement of a layer; masks change the layer in place and return it.

        Raises:
            ValueError: The factory can't replace that layer.
        """
        self.check(layer, type(layer).__name__)
        return self.replacement(layer)

    def check(self, layer: nn.Module, name: str) -> None:
        """Raise a ValueError that names the layer if the factory can't replace it."""
        if reason := self.refusal(layer):
            raise ValueError(f"Expected a layer that {type(self).__name__} can replace, got {name}, {reason}.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class DropConnect(LayerFactory):
    """Drops weights of `nn.Linear` and `nn.Conv2d` layers: makes them `DropConnectLinear` and `DropConnectConv2d`.

    Only these exact classes are taken: a subclass may compute something else, or may never be called, as the output
    projection of `nn.MultiheadAttention`.

    Args:
        p: Probability that a weight is dropped, in [0, 1).
        per: One mask for the whole `batch`, or one for each `sample` (entry of the first axis).

    Raises:
        ValueError: `p` is outside [0, 1), or `per` is neither batch nor sample.

    Example:
        >>> DropConnect(0.2)(nn.Linear(3, 2))
        DropConnectLinear(in_features=3, out_features=2, bias=True, p=0.2, per=batch)
    """

    def __init__(self, p: float = 0.5, per: Per = "batch") -> None:
        check_dropconnect(p, per)
        self.p, self.per = p, per

    def refusal(self, layer: nn.Module) -> str | None:
        """Why the factory can't replace a layer."""
        if isinstance(layer, (DropConnectLinear, DropConnectConv2d)):
            return "which drops weights already (set its `p`, or call `remove` first)"
        if type(layer) not in (nn.Linear, nn.Conv2d):
            return f"a {type(layer).__name__} (it takes exactly nn.Linear and nn.Conv2d)"
        return None

    def replacement(self, layer: nn.Module) -> nn.Module:
        """The layer, with weights that are dropped in training."""
        layer.__class__ = DropConnectLinear if type(layer) is nn.Linear else DropConnectConv2d
        layer.p, layer.per = self.p, self.per  # type: ignore[assignment]
        return layer


class MaskFactory(LayerFactory):
    """Base of the factories that mask activations.

    On an `nn.Dropout`, timm `DropPath`, `GroupDropout` or `nn.Identity` the mask takes the layer's place; any other
    layer gets a forward hook that masks its output in training. Neither adds a key.
    """

    p: float

    @abstractmethod
    def masked(self, x: Tensor, p: float) -> Tensor:
        """A mask of mean one and drop probability p applied to x."""

    @abstractmethod
    def module(self) -> nn.Module:
        """A layer that does the same."""

    def refusal(self, layer: nn.Module) -> str | None:
        """Why the factory can't replace a layer."""
        if hasattr(layer, "_before_mask") or output_mask(layer) is not None:
            return "which has an inserted mask already (set its `p`, or call `remove` first)"
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            return f"a {type(layer).__name__}, which is never called"
        if type(layer) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            return "a part of nn.MultiheadAttention, which is never called"
        return None

    def replacement(self, layer: nn.Module) -> nn.Module:
        """The layer, as a mask of this kind, or with a hook."""
        if type(layer) not in (nn.Dropout, nn.Identity, GroupDropout, timm_drop_path()):
            layer.register_forward_hook(OutputMask(self, self.p))
            return layer
        before = Original(type(layer), {key: vars(layer)[key] for key in MASK_ATTRIBUTES & vars(layer).keys()})
        mask = self.module()
        become(layer, Original(type(mask), {key: vars(mask)[key] for key in MASK_ATTRIBUTES & vars(mask).keys()}))
        layer._before_mask = before  # type: ignore[assignment]
        return layer


class Dropout(MaskFactory):
    """Drops single activations, as `nn.Dropout` does.

    Args:
        p: Probability that an activation is dropped, in [0, 1).

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> Dropout(0.2)(nn.Identity())
        Dropout(p=0.2, inplace=False)

    Reference:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.
    """

    def __init__(self, p: float = 0.5) -> None:
        check_probability(p)
        self.p = p

    def masked(self, x: Tensor, p: float) -> Tensor:
        """What is left of x when activations are dropped."""
        return nn.functional.dropout(x, p)

    def module(self) -> nn.Module:
        """The layer that does the same."""
        return nn.Dropout(self.p)


class DropPath(MaskFactory):
    """Drops whole samples (entries of the first axis), as timm's `DropPath` does: for the branches of residual blocks.

    Args:
        p: Probability that a sample's branch is dropped, in [0, 1).

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> DropPath(0.1)(nn.Identity())
        DropPath(drop_prob=0.100)

    Reference:
        Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """

    def __init__(self, p: float) -> None:
        check_probability(p)
        self.p = p

    def masked(self, x: Tensor, p: float) -> Tensor:
        """What is left of x when samples are dropped."""
        return drop_path(x, p)

    def module(self) -> nn.Module:
        """The layer that does the same."""
        from timm.layers import DropPath

        return DropPath(self.p)


class Groups(MaskFactory):
    """Drops disjoint groups of neighbouring channels, as `GroupDropout` does.

    Args:
        p: Probability that a group is dropped, in [0, 1).
        group_size: Channels in a group; it divides the number of channels.
        dim: Axis of the channels: -1 for features and tokens, 1 for the outputs of convolutions.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> Groups(0.2, group_size=4)(nn.Identity())
        GroupDropout(p=0.2, group_size=4, dim=-1)

    Reference:
        Pal, Lane, Vidal, Haeffele, "On the regularization properties of structured dropout", CVPR 2020.
    """

    def __init__(self, p: float, group_size: int, dim: int = -1) -> None:
        GroupDropout(p, group_size, dim)  # checks them
        self.p, self.group_size, self.dim = p, group_size, dim

    def masked(self, x: Tensor, p: float) -> Tensor:
        """What is left of x when groups are dropped."""
        return group_dropout(x, p, self.group_size, self.dim)

    def module(self) -> nn.Module:
        """The layer that does the same."""
        return GroupDropout(self.p, self.group_size, self.dim)

    def refusal(self, layer: nn.Module) -> str | None:
        """Why the factory can't replace a layer."""
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)) and self.dim not in (1, -3):
            return f"a {type(layer).__name__}, whose channels are axis 1 (set `dim` to 1)"
        width = {-1: getattr(layer, "out_features", None), 1: getattr(layer, "out_channels", None)}.get(self.dim)
        if isinstance(width, int) and width % self.group_size:
            return f"whose {width} channels `group_size` {self.group_size} does not divide"
        return super().refusal(layer)


class LowRank(LayerFactory):
    """Replaces `nn.Linear` and `nn.Conv2d` layers by two thin factors, from the truncated decomposition of the weight.

    Unlike the masks, this gives new layers with new parameters under new keys (`down.weight`, `up.weight`, `up.bias`;
    the bias is the same object): insert it before the optimizer is made. `remove` leaves it in place.

    Args:
        rank: Rank of the new weight, from 1 to the smaller size of the layer's matrix.

    Raises:
        ValueError: `rank` is below 1.

    Example:
        >>> LowRank(2)(nn.Linear(6, 4)).effective_weight().shape
        torch.Size([4, 6])
    """

    keeps_parameters = False

    def __init__(self, rank: int) -> None:
        if rank < 1:
            raise ValueError(f"Expected `rank` of at least 1, got {rank}.")
        self.rank = rank

    def refusal(self, layer: nn.Module) -> str | None:
        """Why the factory can't replace a layer."""
        if type(layer) not in (nn.Linear, nn.Conv2d):
            return f"a {type(layer).__name__} (it takes exactly nn.Linear and nn.Conv2d)"
        if getattr(layer, "groups", 1) != 1:
            return f"a convolution of {layer.groups} groups"
        if output_mask(layer) is not None:
            return "which has an inserted mask (insert the mask after `LowRank`)"
        smallest = min(layer.weight.flatten(1).shape)  # type: ignore[operator]
        if self.rank > smallest:
            return f"whose matrix has rank {smallest} at most, below `rank` {self.rank}"
        return None

    def replacement(self, layer: nn.Module) -> nn.Module:
        """Two factors in place of the layer."""
        if isinstance(layer, nn.Linear):
            return LowRankLinear.from_linear(layer, self.rank)
        assert isinstance(layer, nn.Conv2d)
        return LowRankConv2d.from_conv(layer, self.rank)


#: What the classes that masks stand in for keep of their own.
MASK_ATTRIBUTES = {"p", "inplace", "drop_prob", "scale_by_keep", "group_size", "dim"}


def become(layer: nn.Module, other: Original) -> None:
    """Give a layer another class and the attributes that go with it, in place."""
    for key in MASK_ATTRIBUTES & vars(layer).keys():
        delattr(layer, key)
    layer.__class__ = other.layer_class
    for key, value in other.attributes.items():
        setattr(layer, key, value)


def output_mask(layer: nn.Module) -> OutputMask | None:
    """The inserted hook of a layer, if it has one."""
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, OutputMask)), None)


def timm_drop_path() -> type[nn.Module] | None:
    """The class of timm, without importing it: where it was not imported, no layer is one."""
    drop = sys.modules.get("timm.layers.drop")
    return None if drop is None else drop.DropPath
