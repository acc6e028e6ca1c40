"""Product of matrices with masks: the network whose theory is exact."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from masklr.layers import DropConnectLinear, GroupDropout
from masklr.masks import block_keep, num_masked, patch_split


class DeepLinear(nn.Module):
    r"""Linear layers without biases and activations, with masks on hidden units, weights or inputs.

    .. math:: f(x) = W_L B_{L-1} W_{L-1} \cdots B_1 W_1 B_0 x

    In training every mask is drawn anew and has mean one: what is kept is divided by the probability of being kept. In
    evaluation the network is the matrix :math:`M = W_L \cdots W_1`, which `product` returns.

    Args:
        sizes: Number of inputs, of hidden units layer by layer, and of outputs; at least two numbers.
        p: Probability that a hidden unit, group or weight is dropped, in [0, 1). A list has one value a hidden layer,
            for `dropconnect` one value a layer (0: not masked).
        mask: What is dropped: hidden units (`dropout`), disjoint `groups` of them, or weights (`dropconnect`).
        group_size: Hidden units in a group; it divides every hidden size.
        per: One mask of weights for the whole batch, or one for each sample. Units and groups are drawn for each.
        input_mask: What is masked of the inputs: nothing, `units` one by one, or `patches` of consecutive ones.
        input_p: Share of the inputs that is masked, in (0, 1).
        patch_size: Inputs in a patch; it divides the number of inputs.
        exact_count: Whether exactly round(N * input_p) of the N units or patches are masked, as in a masked
            autoencoder, instead of each independently.
        init: `normal`, with standard deviation init_scale / sqrt(inputs of the layer), or `orthogonal`: init_scale
            times a matrix with orthonormal rows or columns.
        init_scale: Scale of the initial weights, above 0.
        init_seed: Seed of the initial weights; the global generator if None.

    Raises:
        ValueError: A value outside its range; sizes that a group or patch does not divide; a wrong number of `p`.

    Reference:
        Mianjy and Arora, "On dropout and nuclear norm regularization", ICML 2019.
    """

    def __init__(
        self,
        sizes: list[int],
        p: float | list[float] = 0.0,
        mask: Literal["dropout", "dropconnect", "groups"] = "dropout",
        group_size: int = 1,
        per: Literal["batch", "sample"] = "batch",
        input_mask: Literal["none", "units", "patches"] = "none",
        input_p: float = 0.0,
        patch_size: int = 1,
        exact_count: bool = False,
        init: Literal["normal", "orthogonal"] = "normal",
        init_scale: float = 1.0,
        init_seed: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(sizes)
        if mask not in ("dropout", "dropconnect", "groups"):
            raise ValueError(f"Expected `mask` dropout, dropconnect or groups, got {mask!r}.")
        if group_size != 1 and mask != "groups":
            raise ValueError(f"Expected `group_size` only beside `mask` groups, got {group_size} beside {mask}.")
        if group_size < 1 or any(size % group_size for size in sizes[1:-1]):
            raise ValueError(f"Expected `group_size` to divide the hidden sizes {sizes[1:-1]}, got {group_size}.")
        if init not in ("normal", "orthogonal"):
            raise ValueError(f"Expected `init` normal or orthogonal, got {init!r}.")
        if not init_scale > 0:
            raise ValueError(f"Expected `init_scale` above 0, got {init_scale}.")
        self.sizes, self.mask, self.group_size = list(sizes), mask, group_size
        self._take_input_mask(input_mask, input_p, patch_size, exact_count)
        self.layers, self.dropouts = nn.ModuleList(), nn.ModuleList()
        drops = _one_each(p, len(sizes) - (1 if mask == "dropconnect" else 2))
        if mask == "dropconnect":
            for (inputs, outputs), drop in zip(pairwise(sizes), drops, strict=True):
                self.layers.append(DropConnectLinear(inputs, outputs, bias=False, p=drop, per=per))
        else:
            self.layers.extend(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairwise(sizes))
            self.dropouts.extend(self._dropout(drop) for drop in drops)
        self._initialize(init, init_scale, init_seed)

    def _dropout(self, p: float) -> nn.Module:
        if self.mask == "dropout":
            return nn.Dropout(p)
        return GroupDropout(p, self.group_size)

    def _take_input_mask(self, kind: str, p: float, patch_size: int, exact_count: bool) -> None:
        if kind not in ("none", "units", "patches"):
            raise ValueError(f"Expected `input_mask` none, units or patches, got {kind!r}.")
        if kind == "none" and (p != 0 or exact_count):
            raise ValueError(f"Expected an `input_mask` beside `input_p` and `exact_count`, got {kind} and {p}.")
        if kind != "none" and not 0 < p < 1:
            raise ValueError(f"Expected `input_p` in (0, 1) beside `input_mask` {kind}, got {p}.")
        if kind != "patches" and patch_size != 1:
            raise ValueError(f"Expected `patch_size` only beside `input_mask` patches, got {patch_size} beside {kind}.")
        if patch_size < 1 or self.sizes[0] % patch_size:
            raise ValueError(f"Expected `patch_size` to divide the {self.sizes[0]} inputs, got {patch_size}.")
        num_patches = self.sizes[0] // patch_size
        if exact_count and not 0 < round(num_patches * p) < num_patches:
            raise ValueError(f"Expected `input_p` to mask some and keep some of {num_patches} exactly, got {p}.")
        self.input_mask, self.input_p, self.patch_size, self.exact_count = kind, p, patch_size, exact_count

    def _initialize(self, init: str, scale: float, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for weight in self.weights:
            if init == "orthogonal":
                nn.init.orthogonal_(weight, gain=scale, generator=generator)
            else:
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5, generator=generator)

    @property
    def weights(self) -> list[Tensor]:
        """Weights (out, in) of the layers, first layer first."""
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    @property
    def drop_probabilities(self) -> list[float]:
        """What `p` is now: one value a hidden layer, for `dropconnect` one value a layer."""
        return [masked.p for masked in (self.layers if self.mask == "dropconnect" else self.dropouts)]  # type: ignore[misc]

    def product(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix that the network is in evaluation, differentiable in the weights."""
        return reduce(lambda product, weight: weight @ product, self.weights)

    @property
    def input_keep_probability(self) -> float:
        """Probability that an input is kept, by which kept inputs are divided."""
        if self.exact_count:
            num_patches = self.sizes[0] // self.patch_size
            return 1 - num_masked(num_patches, self.input_p) / num_patches
        return 1 - self.input_p

    def draw_input_keep(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch inputs"]:
        """Mask of the inputs, True where kept, drawn anew for each sample.

        Args:
            batch: Number of samples.
            generator: Source of the draws; the default generator of the device when None.
            device: Where the mask is made; the generator's device when None.

        Example:
            >>> model = DeepLinear([6, 6], input_mask="patches", input_p=0.5, patch_size=3, exact_count=True)
            >>> model.draw_input_keep(2).sum(1)
            tensor([3, 3])
        """
        inputs = self.sizes[0]
        if not self.exact_count:
            return block_keep((batch, inputs), self.input_p, self.patch_size, generator=generator, device=device)
        num_patches = inputs // self.patch_size
        visible, _ = patch_split(batch, (1, num_patches), self.input_p, generator=generator, device=device)
        keep = visible.new_zeros(batch, num_patches, dtype=torch.bool).scatter_(1, visible, True)
        return keep.repeat_interleave(self.patch_size, dim=1)

    def input_mask_covariance(self) -> Float64[Tensor, "inputs inputs"]:
        r"""Covariance K of the factors, of mean one, by which the input mask multiplies.

        With :math:`\lambda = (1 - \theta) / \theta` for inputs that are kept with probability :math:`\theta`: lambda
        between inputs of one patch and 0 elsewhere, or for an exact count among N patches lambda and -lambda / (N - 1).
        The masked input has the second moment C + K * C, entry by entry.
        """
        inputs, theta = self.sizes[0], self.input_keep_probability
        if self.input_mask == "none":
            return torch.zeros(inputs, inputs, dtype=torch.float64)
        patch = torch.arange(inputs) // self.patch_size
        same = (patch == patch[:, None]).double()
        others = -1 / (inputs // self.patch_size - 1) if self.exact_count else 0.0
        return (1 - theta) / theta * (same + others * (1 - same))

    def forward(
        self, x: Float[Tensor, "batch inputs"], input_keep: Bool[Tensor, "batch inputs"] | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Outputs, masked in training.

        Args:
            x: Inputs.
            input_keep: Which inputs are kept, in training and in evaluation. None draws that in training and keeps all
                in evaluation.
        """
        if input_keep is None and self.training and self.input_mask != "none":
            input_keep = self.draw_input_keep(len(x), device=x.device)
        if input_keep is not None:
            x = x * input_keep / self.input_keep_probability
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.dropouts):
                x = self.dropouts[i](x)
        return x


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise unless these can be the layer sizes of a network, inputs first."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"Expected `sizes` of at least two numbers of at least 1, inputs first, got {list(sizes)}.")


def _one_each(p: float | Sequence[float], count: int) -> list[float]:
    """One drop probability for each of `count` places."""
    if not isinstance(p, Sequence):
        if not 0 <= p < 1:
            raise ValueError(f"Expected `p` in [0, 1), got {p}.")
        return [p] * count
    if len(p) != count:
        raise ValueError(f"Expected `p` of {count} values, got {list(p)}.")
    if not all(0 <= value < 1 for value in p):
        raise ValueError(f"Expected `p` in [0, 1), got {list(p)}.")
    return list(p)
