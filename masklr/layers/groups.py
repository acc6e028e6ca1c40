"""Structured dropout: disjoint groups of channels are dropped as a whole."""

from jaxtyping import Float
from torch import Tensor, nn

from masklr.masks import check_probability, unit_keep


class GroupDropout(nn.Module):
    """Dropout of disjoint groups of neighbouring channels, with the deterministic scale 1 / (1 - p).

    Channels `g * group_size` to `(g + 1) * group_size - 1` share one draw; every other position (sample, token, pixel)
    has its own, as in `nn.Dropout`. Exactly the identity in evaluation and at p = 0. The scale is 1 / E[mask], not the
    realised share as in common DropBlock code, so that the induced penalty is the one of theory.

    Args:
        p: Probability that a group is dropped, in [0, 1). May be set at any time.
        group_size: Channels in a group, at least 1; 1 is `nn.Dropout`. It divides the size of the axis.
        dim: Axis of the channels: -1 for features and tokens, 1 for the (batch, channels, height, width) of
            convolutions.

    Raises:
        ValueError: An argument is outside its range, or (in training) `group_size` does not divide the axis.

    Example:
        >>> import torch
        >>> layer = GroupDropout(0.5, group_size=2).train()
        >>> pairs = layer(torch.ones(3, 8)).unflatten(-1, (4, 2))
        >>> torch.equal(pairs[..., 0], pairs[..., 1])
        True

    Reference:
        Pal, Lane, Vidal, Haeffele, "On the regularization properties of structured dropout", CVPR 2020.
    """

    def __init__(self, p: float, group_size: int, dim: int = -1) -> None:
        check_probability(p)
        if group_size < 1:
            raise ValueError(f"Expected `group_size` of at least 1, got {group_size}.")
        super().__init__()
        self.p, self.group_size, self.dim = p, group_size, dim

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The groups that are kept, scaled."""
        return group_dropout(x, self.p, self.group_size, self.dim) if self.training else x

    def extra_repr(self) -> str:
        """Arguments, for `print`."""
        return f"p={self.p}, group_size={self.group_size}, dim={self.dim}"


def group_dropout(x: Tensor, p: float, group_size: int, dim: int = -1) -> Tensor:
    """What `GroupDropout` does in training, as a function."""
    channels = x.shape[dim]
    if channels % group_size:
        raise ValueError(
            f"Expected `group_size` to divide the size {channels} of axis {dim} of an input {tuple(x.shape)}, got "
            f"{group_size}; channels of convolutions lie along `dim` 1."
        )
    if p == 0:
        return x
    grouped = x.unflatten(dim, (channels // group_size, group_size))
    inner = dim % x.ndim + 1
    keep = unit_keep([1 if axis == inner else size for axis, size in enumerate(grouped.shape)], p, device=x.device)
    # The scale is a Python number: in bf16 a tensor that holds it would be rounded, and the mean would not be one.
    return (grouped * keep * (1 / (1 - p))).reshape(x.shape)


def drop_path(x: Tensor, p: float) -> Tensor:
    """Drop whole samples (entries of the first axis), the others scaled by 1 / (1 - p), as timm's `DropPath` does."""
    if p == 0:
        return x
    keep = unit_keep((x.shape[0], *[1] * (x.ndim - 1)), p, device=x.device)
    return x * keep * (1 / (1 - p))
