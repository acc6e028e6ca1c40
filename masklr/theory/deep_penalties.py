"""What a mask adds to the expected loss of a linear network of any depth; conventions as in `penalties`."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.theory.arguments import (
    check_integer,
    check_second_moment,
    check_tensor,
    float64,
    probabilities,
)
from masklr.theory.penalties import mask_variance, times


def dropconnect_penalty(
    weights: Sequence[Float[Tensor, "_ _"]], p: float | Sequence[float], C: Float[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    r"""Penalty of dropping the entries of the weights of a linear network of any depth.

    The second moment of what leaves layer l, with :math:`\lambda_l = p_l / (1 - p_l)` and :math:`A_0 = C`, is

    .. math:: A_l = W_l A_{l-1} W_l^T + \lambda_l \, \mathrm{Diag}\bigl((W_l \circ W_l) \, \mathrm{diag}(A_{l-1})\bigr)

    and the penalty is tr(A_L) minus what it is without masks. Only the part that masks add is carried along, so that
    nothing cancels at small p. On the output layer of two it is the penalty of dropout on the hidden units; on the
    first layer it is so only if C is diagonal.

    Args:
        weights: Weights, first layer first, each (out, in), as `nn.Linear` holds them.
        p: Probability that an entry is dropped, in [0, 1): one for all layers, or one each; 0 is no mask.
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss.

    Raises:
        ValueError: A `p` is outside [0, 1) or one is missing, sizes do not fit, or `C` is not finite and symmetric.

    Example:
        >>> dropconnect_penalty([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])], p=[0.5, 0.0])
        tensor(45., dtype=torch.float64)

    Reference:
        Wan et al., "Regularization of neural networks using DropConnect", ICML 2013; Pal, Lane, Vidal and Haeffele, "On
        the regularization properties of structured dropout", CVPR 2020.
    """
    layers, C = _layers(weights, C)
    first, *rest = zip(layers, probabilities(p, len(layers), "layer"), strict=True)
    W, probability = first
    energy = W.new_ones(W.shape[1]) if C is None else C.diagonal()
    added = torch.diag(mask_variance(probability) * (W.square() @ energy))
    clean = W @ times(C, W.T)
    for W, probability in rest:
        energy = (clean + added).diagonal()
        added = W @ added @ W.T + torch.diag(mask_variance(probability) * (W.square() @ energy))
        clean = W @ clean @ W.T
    return added.trace()


def deep_dropout_penalty(
    weights: Sequence[Float[Tensor, "_ _"]], p: float | Sequence[float], C: Float[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    r"""Penalty of dropout on every hidden layer of a linear network of any depth.

    The second moment of what leaves layer l, with :math:`A_1 = W_1 C W_1^T` and
    :math:`\lambda_l = p_l / (1 - p_l)` of the mask between layers l and l + 1, is

    .. math:: A_{l+1} = W_{l+1} \bigl(A_l + \lambda_l \, \mathrm{Diag}(A_l)\bigr) W_{l+1}^T

    and the penalty is tr(A_L) minus what it is without masks. Only the part that masks add is carried along, so that
    nothing cancels at small p. At least `deep_dropout_factor` times the squared nuclear norm of the product (times
    C^(1/2)); above it in general where the product has rank above one and there are two hidden layers or more.

    Args:
        weights: Weights, first layer first, each (out, in), as `nn.Linear` holds them.
        p: Probability that a unit is dropped, in [0, 1): one for all hidden layers, or one each; 0 is no mask.
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss; 0 without a hidden layer.

    Raises:
        ValueError: A `p` is outside [0, 1) or one is missing, sizes do not fit, or `C` is not finite and symmetric.

    Example:
        >>> deep_dropout_penalty([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 1.0]])], p=0.5)
        tensor(13., dtype=torch.float64)

    Reference:
        Mianjy and Arora, "On dropout and nuclear norm regularization", ICML 2019.
    """
    layers, C = _layers(weights, C)
    chances = probabilities(p, len(layers) - 1, "hidden layer")
    clean = layers[0] @ times(C, layers[0].T)
    added = torch.zeros_like(clean)
    for W, probability in zip(layers[1:], chances, strict=True):
        noise = mask_variance(probability) * (clean + added).diagonal()
        added = W @ (added + torch.diag(noise)) @ W.T
        clean = W @ clean @ W.T
    return added.trace()


def deep_dropout_factor(widths: Sequence[int], p: float | Sequence[float]) -> float:
    r"""Least ratio of the penalty of deep dropout to the squared nuclear norm of the network's map.

    .. math:: \nu = \prod_j (1 + \lambda_j / d_j) - 1, \qquad \lambda_j = p_j / (1 - p_j)

    For one hidden layer it is lambda / d, and reached for every map. For more it is reached by maps of rank one (all
    hidden units equal), so that if `nu >= s_2 / (s_1 - s_2)` the best map is of rank one with singular value
    `s_1 / (1 + nu)`; for others it is a lower bound.

    Args:
        widths: Numbers of hidden units, one a hidden layer.
        p: Probability that a unit is dropped, in [0, 1): one for all hidden layers, or one each.

    Returns:
        A number of at least 0, without unit.

    Raises:
        ValueError: A width is below 1, or a `p` is outside [0, 1) or missing.

    Example:
        >>> round(deep_dropout_factor([5, 5], p=0.5), 12)
        0.44

    Reference:
        Mianjy and Arora, "On dropout and nuclear norm regularization", ICML 2019.
    """
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise ValueError(f"Expected `widths` to be a sequence of integers, got a {type(widths).__name__}.")
    for width in widths:
        check_integer(width, "widths")
    if any(width < 1 for width in widths):
        raise ValueError(f"Expected `widths` of at least 1, got {list(widths)}.")
    chances = probabilities(p, len(widths), "hidden layer")
    logs = (math.log1p(mask_variance(chance) / width) for chance, width in zip(chances, widths, strict=True))
    return math.expm1(sum(logs))


def _layers(weights: Sequence[Tensor], C: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The weights and C in float64, if they fit."""
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise ValueError(f"Expected `weights` to be a sequence of matrices, got a {type(weights).__name__}.")
    for W in weights:
        check_tensor(W, "weights", getattr(W, "ndim", 2))  # their shapes are told together, below
    shapes = [tuple(W.shape) for W in weights]
    fits = all(len(shape) == 2 for shape in shapes)
    if not shapes or not fits or any(a[0] != b[1] for a, b in pairwise(shapes)):
        raise ValueError(f"Expected `weights` (out, in) of at least one layer, each fitting the next, got {shapes}.")
    if C is not None:
        check_second_moment(C, shapes[0][1])
    return [float64(W) for W in weights], None if C is None else float64(C)
