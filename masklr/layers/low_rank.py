"""Linear and convolutional layers whose weight is a product of two thin factors."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """Linear layer with a weight of rank at most `rank`: a layer `down` to `rank` features and a layer `up` from them.

    Starts as the best approximation of a freshly initialized `nn.Linear`. Its state_dict has `down.weight`
    (rank, in), `up.weight` (out, rank) and `up.bias`, not the `weight` and `bias` of `nn.Linear`.

    Args:
        in_features: Size of each input vector.
        out_features: Size of each output vector.
        rank: Size between the two factors, from 1 to the smaller of the two above.
        bias: Whether there is a bias.

    Raises:
        ValueError: `rank` is outside its range.

    Example:
        >>> layer = LowRankLinear(6, 4, rank=2)
        >>> layer.effective_weight().shape, int(torch.linalg.matrix_rank(layer.effective_weight()))
        (torch.Size([4, 6]), 2)

    Reference:
        Khodak, Tenenholtz, Mackey, Fusi, "Initialization and regularization of factorized neural layers", ICLR 2021.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self._factorize(nn.Linear(in_features, out_features, bias), rank)

    @classmethod
    def from_linear(cls, layer: nn.Linear, rank: int) -> "LowRankLinear":
        """The best approximation of a linear layer in the Frobenius norm, with the same bias parameter.

        Args:
            layer: Any linear layer; it is not changed.
            rank: Rank of the result, from 1 to the smaller size of the weight.

        Raises:
            ValueError: `rank` is outside its range.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._factorize(layer, rank)
        return new

    def _factorize(self, plain: nn.Linear, rank: int) -> None:
        up, down = truncated_factors(plain.weight, rank)
        self.in_features, self.out_features, self.rank = plain.in_features, plain.out_features, rank
        self.down = nn.Linear(self.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, self.out_features, bias=False, device="meta")
        self.down.weight, self.up.weight = nn.Parameter(down), nn.Parameter(up)
        self.up.bias = plain.bias
        self.train(plain.training)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The layer's output, by two thin products."""
        return self.up(self.down(x))

    def effective_weight(self) -> Float[Tensor, "out in"]:
        """The product of the factors: the weight of the `nn.Linear` that computes the same."""
        return self.up.weight @ self.down.weight


class LowRankConv2d(nn.Module):
    """Convolution by `rank` filters, `down`, and a 1 x 1 convolution, `up`, that mixes what they give.

    As a matrix of filters (out, in * height * width) its weight has rank at most `rank`. Starts as the best
    approximation of a freshly initialized `nn.Conv2d`. Its state_dict has `down.weight` (rank, in, height, width),
    `up.weight` (out, rank, 1, 1) and `up.bias`, not the `weight` and `bias` of `nn.Conv2d`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the filters.
        rank: Number of filters, from 1 to the smaller of out and in * height * width.
        stride: Step of the filters.
        padding: Rows and columns of padding on each side, or `same` or `valid`.
        dilation: Spacing within the filters.
        bias: Whether there is a bias.
        padding_mode: What the padding holds, as in `nn.Conv2d`.

    Raises:
        ValueError: `rank` is outside its range.

    Example:
        >>> LowRankConv2d(3, 8, 3, rank=2, padding=1)(torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])

    Reference:
        Zhang, Zou, He, Sun, "Accelerating very deep convolutional networks for classification and detection", TPAMI
        2016.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self._factorize(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                bias=bias,
                padding_mode=padding_mode,  # type: ignore[arg-type]
            ),
            rank,
        )

    @classmethod
    def from_conv(cls, layer: nn.Conv2d, rank: int) -> "LowRankConv2d":
        """The best approximation of a convolution's matrix of filters in the Frobenius norm, with the same bias.

        Args:
            layer: A convolution with one group; it is not changed.
            rank: Rank of the result, from 1 to the smaller of out and in * height * width.

        Raises:
            ValueError: `rank` is outside its range, or the convolution has several groups.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._factorize(layer, rank)
        return new

    def _factorize(self, plain: nn.Conv2d, rank: int) -> None:
        if plain.groups != 1:
            raise ValueError(f"Expected `layer` to be a convolution with one group, got {plain.groups} groups.")
        up, down = truncated_factors(plain.weight.flatten(1), rank)
        self.in_channels, self.out_channels, self.rank = plain.in_channels, plain.out_channels, rank
        self.down = nn.Conv2d(
            plain.in_channels,
            rank,
            plain.kernel_size,  # type: ignore[arg-type]
            plain.stride,  # type: ignore[arg-type]
            plain.padding,  # type: ignore[arg-type]
            plain.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=plain.padding_mode,
            device="meta",
        )
        self.up = nn.Conv2d(rank, plain.out_channels, 1, bias=False, device="meta")
        self.down.weight = nn.Parameter(down.unflatten(1, plain.weight.shape[1:]))
        self.up.weight = nn.Parameter(up[:, :, None, None])
        self.up.bias = plain.bias
        self.train(plain.training)

    def forward(self, x: Float[Tensor, "*batch in height width"]) -> Float[Tensor, "*batch out new_height new_width"]:
        """The layer's output, by two convolutions."""
        return self.up(self.down(x))

    def effective_weight(self) -> Float[Tensor, "out in height width"]:
        """The weight of the `nn.Conv2d` that computes the same."""
        return (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).unflatten(1, self.down.weight.shape[1:])


@torch.no_grad()
def truncated_factors(
    weight: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Balanced factors of the best approximation of a matrix of that rank in the Frobenius norm.

    Args:
        weight: Any matrix.
        rank: From 1 to the smaller size of the matrix.

    Returns:
        `up` and `down` with product the truncated singular value decomposition and equal Gram matrices
        `up.T @ up = down @ down.T`, in the matrix's dtype.

    Raises:
        ValueError: `rank` is outside its range.

    Example:
        >>> up, down = truncated_factors(torch.diag(torch.tensor([4.0, 1.0])), 1)
        >>> up @ down
        tensor([[4., 0.],
                [0., 0.]])

    Reference:
        Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"Expected `rank` from 1 to {min(weight.shape)} for a weight {tuple(weight.shape)}, got {rank}."
        )
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return up.to(weight.dtype), down.to(weight.dtype)
