"""Multilayer perceptron."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from masklr.models.linear import check_sizes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "tanh": nn.functional.tanh,
}


class MLP(nn.Module):
    """Linear layers with an activation and dropout after each but the last.

    Args:
        sizes: Number of inputs, of hidden units layer by layer, and of outputs; at least two numbers. Images are
            flattened: channels x height x width inputs.
        activation: What follows each hidden layer.
        p: Probability that a hidden unit is dropped, in [0, 1).

    Raises:
        ValueError: A value outside its range.

    Example:
        >>> import torch
        >>> MLP([64, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: list[int], activation: Literal["relu", "gelu", "tanh"] = "relu", p: float = 0.0) -> None:
        super().__init__()
        check_sizes(sizes)
        if activation not in ACTIVATIONS:
            raise ValueError(f"Expected `activation` relu, gelu or tanh, got {activation!r}.")
        if not 0 <= p < 1:
            raise ValueError(f"Expected `p` in [0, 1), got {p}.")
        self.sizes, self.activation, self.num_classes = list(sizes), activation, sizes[-1]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.dropouts = nn.ModuleList(nn.Dropout(p) for _ in sizes[1:-1])

    def check_size(self, images: Tensor) -> None:
        """Raise unless a sample of the batch has as many values as the network has inputs."""
        if images[0].numel() != self.sizes[0]:
            found = " x ".join(str(size) for size in images.shape[1:])
            raise ValueError(f"Expected samples of {self.sizes[0]} values, the first of `sizes`, got {found}.")

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        """Outputs of the last layer: logits, where the network classifies."""
        self.check_size(x)
        x = x.flatten(1)
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            x = dropout(ACTIVATIONS[self.activation](layer(x)))
        return self.layers[-1](x)
