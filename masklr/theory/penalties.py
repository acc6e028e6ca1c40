r"""What a mask adds to the expected loss of a linear network: exact penalties of two layers.

Conventions of the whole room. `p` is the probability of being dropped; masks are divided by 1 - p, so that their mean
is one and their variance is

.. math:: \lambda = p / (1 - p)

The loss is the sum over outputs of squared errors, averaged over samples; with PyTorch's `MSELoss()`, which averages
over outputs too, divide the penalty by their number. A penalty is the expectation of the loss over masks, minus the
loss without masks. `C` is the uncentered second moment of the inputs, E[x x^T], the identity when None. The target does
not matter, nor does it matter whether a mask is drawn for each sample or shared by a batch. All is computed and
returned in float64, on the device of the weights (the CPU where that has no float64), and is differentiable in weights
and C. Weights are not searched for NaN, which would make a training step wait for the device: it shows in the result.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.theory.arguments import (
    check_integer,
    check_probability,
    check_second_moment,
    check_tensor,
    float64,
)


def mask_variance(p: float) -> float:
    r"""Variance of a Bernoulli mask that is divided by its mean.

    .. math:: \lambda = p / (1 - p)

    Schemes are compared at equal variance: it is what their penalties are proportional to.

    Args:
        p: Probability of being dropped, in [0, 1).

    Returns:
        A number of at least 0, without unit: 1 at p = 0.5, 3 at 0.75, 9 at 0.9.

    Raises:
        ValueError: `p` is outside [0, 1).

    Example:
        >>> mask_variance(0.75)
        3.0

    Reference:
        Cavazza et al., "Dropout as a low-rank regularizer for matrix factorization", AISTATS 2018.
    """
    check_probability(p)
    return p / (1 - p)


def dropout_penalty(
    U: Float[Tensor, "m d"], V: Float[Tensor, "n d"], p: float, C: Float[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    r"""Penalty of dropout on the hidden units of the network x -> U V^T x.

    .. math:: \lambda \sum_i \|u_i\|^2 \, v_i^T C v_i, \qquad \lambda = p / (1 - p)

    At least `lambda / d * |U V^T C^(1/2)|_*^2`, and equal to it for some factors of every product of rank up to d.
    DropConnect on the output layer has the same. For a nonlinear last hidden layer h(x) it is exact too: pass the
    identity as V and E[h h^T] as C. It sees E[h^2], not the variance: a unit of large mean is penalized.

    Args:
        U: Weight of the output layer, as `nn.Linear` holds it; column i is what unit i writes.
        V: Weight of the hidden layer, transposed; column i is what unit i reads.
        p: Probability that a unit is dropped, in [0, 1).
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss.

    Raises:
        ValueError: `p` is outside [0, 1), sizes do not fit, or `C` is not finite and symmetric.

    Example:
        >>> dropout_penalty(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.0]]), p=0.5)
        tensor(37., dtype=torch.float64)

    Reference:
        Cavazza et al., "Dropout as a low-rank regularizer for matrix factorization", AISTATS 2018; Mianjy, Arora and
        Vidal, "On the implicit bias of dropout", ICML 2018.
    """
    variance = mask_variance(p)
    U, V, C = _factors(U, V, C)
    energy = (V * times(C, V)).sum(0)
    return variance * (U.square().sum(0) * energy).sum()


def dropblock_penalty(
    U: Float[Tensor, "m d"], V: Float[Tensor, "n d"], p: float, block_size: int, C: Float[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    r"""Penalty of dropping disjoint groups of hidden units of the network x -> U V^T x.

    .. math:: \lambda \sum_b \|U_b V_b^T C^{1/2}\|_F^2

    over groups b of consecutive units. Equals `dropout_penalty` for groups of one. At least `lambda r / d` times the
    squared spectral r-support norm of the product. It supposes division by 1 - p, not by the realized share of kept
    units.

    Args:
        U: Weight of the output layer; column i is what unit i writes.
        V: Weight of the hidden layer, transposed; column i is what unit i reads.
        p: Probability that a group is dropped, in [0, 1).
        block_size: Units in a group, r, a divisor of d.
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss.

    Raises:
        ValueError: `p` is outside [0, 1), `block_size` does not divide d, sizes do not fit, or `C` is not finite and
            symmetric.

    Example:
        >>> dropblock_penalty(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.0]]), p=0.5, block_size=2)
        tensor(49., dtype=torch.float64)

    Reference:
        Pal, Lane, Vidal and Haeffele, "On the regularization properties of structured dropout", CVPR 2020.
    """
    variance = mask_variance(p)
    U, V, C = _factors(U, V, C)
    width = U.shape[1]
    check_integer(block_size, "block_size")
    if block_size < 1 or width % block_size:
        raise ValueError(f"Expected `block_size` to divide the width {width}, got {block_size}.")
    shape = (width // block_size, block_size)
    written = torch.einsum("mbi,mbj->bij", U.unflatten(1, shape), U.unflatten(1, shape))
    read = torch.einsum("nbi,nbj->bij", V.unflatten(1, shape), times(C, V).unflatten(1, shape))
    return variance * (written * read).sum()


def fixed_count_penalty(
    U: Float[Tensor, "m d"], V: Float[Tensor, "n d"], keep_count: int, C: Float[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    r"""Penalty of keeping exactly k of the d hidden units of the network x -> U V^T x, all subsets alike.

    .. math:: \frac{\lambda d}{d - 1} \sum_i \|u_i\|^2 \, v_i^T C v_i - \frac{\lambda}{d - 1} \|U V^T C^{1/2}\|_F^2,
        \qquad \lambda = (d - k) / k

    Kept units are multiplied by d / k. Below `dropout_penalty` of the same share by up to the second term.

    Args:
        U: Weight of the output layer; column i is what unit i writes.
        V: Weight of the hidden layer, transposed; column i is what unit i reads.
        keep_count: Units that are kept, k, from 1 to d; d is no mask at all.
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss.

    Raises:
        ValueError: `keep_count` is outside 1 to d, sizes do not fit, or `C` is not finite and symmetric.

    Example:
        >>> fixed_count_penalty(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.0]]), keep_count=1)
        tensor(25., dtype=torch.float64)

    Reference:
        Cochran, "Sampling Techniques", 3rd edition, section 2.5 (covariance of a sample without replacement).
    """
    U, V, C = _factors(U, V, C)
    width = U.shape[1]
    check_integer(keep_count, "keep_count")
    if not 1 <= keep_count <= width:
        raise ValueError(f"Expected `keep_count` from 1 to the width {width}, got {keep_count}.")
    # With d = k = 1 the formula is 0 / 0, and the penalty 0.
    variance = (width - keep_count) / keep_count / max(width - 1, 1)
    read = times(C, V)
    separate = (U.square().sum(0) * (V * read).sum(0)).sum()
    joint = ((U.T @ U) * (V.T @ read)).sum()
    return variance * (width * separate - joint)


def covariance_penalty(
    U: Float[Tensor, "m d"],
    V: Float[Tensor, "n d"],
    covariance: Float[Tensor, "d d"],
    C: Float[Tensor, "n n"] | None = None,
) -> Float64[Tensor, ""]:
    r"""Penalty of any mask of mean one on the hidden units of the network x -> U V^T x.

    .. math:: \sum_{ij} K_{ij} \, (u_i \cdot u_j) \, v_i^T C v_j

    Only the covariance K of the mask counts: a Gaussian mask acts as a Bernoulli mask of the same variance. The other
    penalties of two layers are special cases, and overlapping blocks are a fourth: kept where no seed of probability g
    lies in a window of w, divided by (1 - g)^w, they have `K_ij = (1 - g)^-o_ij - 1` with `o_ij = max(0, w - |i - j|)`.

    Args:
        U: Weight of the output layer; column i is what unit i writes.
        V: Weight of the hidden layer, transposed; column i is what unit i reads.
        covariance: Covariance of the mask, without unit.
        C: Second moment of the inputs; the identity when None.

    Returns:
        A scalar, in the unit of the loss.

    Raises:
        ValueError: Sizes do not fit, or `C` is not finite and symmetric.

    Example:
        >>> covariance_penalty(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.0]]), covariance=torch.ones(2, 2))
        tensor(49., dtype=torch.float64)

    Reference:
        Pal, Lane, Vidal and Haeffele, "On the regularization properties of structured dropout", CVPR 2020 (general
        sampling distributions); Ghiasi, Lin and Le, "DropBlock", NeurIPS 2018 (overlapping blocks).
    """
    U, V, C = _factors(U, V, C)
    check_tensor(covariance, "covariance", 2)
    if covariance.shape != (U.shape[1], U.shape[1]):
        raise ValueError(f"Expected `covariance` of the width {U.shape[1]}, got the shape {tuple(covariance.shape)}.")
    return (float64(covariance) * (U.T @ U) * (V.T @ times(C, V))).sum()


def gauss_newton_penalty(
    jacobian: Float[Tensor, "batch classes units"],
    output_hessian: Float[Tensor, "batch classes classes"],
    activations: Float[Tensor, "batch units"],
    p: float,
) -> Float64[Tensor, ""]:
    r"""Penalty of dropout on one layer of any network, to second order and without the curvature of the network.

    .. math:: \frac{\lambda}{2} \, \mathbb{E}_x \sum_i h_i(x)^2 \, \bigl(J(x)^T H(x) J(x)\bigr)_{ii}

    Exact for a squared loss if the network is linear from that layer on (H = 2 I for a sum of squares). For
    cross-entropy, `H = diag(q) - q q^T` with the predicted probabilities q: no labels are needed. For masks on several
    layers add their penalties.

    Args:
        jacobian: Derivative of the outputs with respect to the layer's activations, a sample.
        output_hessian: Second derivative of the loss with respect to the outputs, a sample.
        activations: The layer's activations where the mask multiplies them, h.
        p: Probability that a unit is dropped, in [0, 1).

    Returns:
        A scalar, in the unit of the loss, averaged over samples.

    Raises:
        ValueError: `p` is outside [0, 1), or sizes do not fit.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> gauss_newton_penalty(one, 2 * one, torch.tensor([[3.0]]), p=0.5)
        tensor(9., dtype=torch.float64)

    Reference:
        Wei, Kakade and Ma, "The implicit and explicit regularization effects of dropout", ICML 2020.
    """
    variance = mask_variance(p)
    check_tensor(jacobian, "jacobian", 3)
    check_tensor(output_hessian, "output_hessian", 3)
    check_tensor(activations, "activations", 2)
    batch, classes, units = jacobian.shape
    if output_hessian.shape != (batch, classes, classes):
        raise ValueError(
            f"Expected `output_hessian` of shape {(batch, classes, classes)}, got {tuple(output_hessian.shape)}."
        )
    if activations.shape != (batch, units):
        raise ValueError(f"Expected `activations` of shape {(batch, units)}, got {tuple(activations.shape)}.")
    J = float64(jacobian)
    curvature = (J * (float64(output_hessian) @ J)).sum(1)
    return variance / 2 * (curvature * float64(activations).square()).sum(1).mean()


def times(C: Tensor | None, x: Tensor) -> Tensor:
    """C x; no C is the identity."""
    return x if C is None else C @ x


def _factors(U: Tensor, V: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors and C in float64, if they fit."""
    check_tensor(U, "U", 2)
    check_tensor(V, "V", 2)
    if U.shape[1] != V.shape[1]:
        raise ValueError(f"Expected `U` and `V` with the same number of columns, got {U.shape[1]} and {V.shape[1]}.")
    if C is not None:
        check_second_moment(C, V.shape[0])
    return float64(U), float64(V), None if C is None else float64(C)
