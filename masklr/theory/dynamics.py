"""How singular values move while a deep linear network is trained: closed forms for small and for orthogonal starts."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.theory.arguments import check_integer, check_non_negative, check_number, float64

MAX_STEPS = 10_000_000  # some seconds


def saxe_mode(
    s: float | Float[Tensor, "..."], sigma0: float | Float[Tensor, "..."], t: float | Float[Tensor, "..."]
) -> Float64[Tensor, "..."]:
    r"""Singular value of the product of two balanced layers under gradient flow.

    .. math:: \sigma(t) = \frac{s \, e^{2 s t}}{e^{2 s t} - 1 + s / \sigma_0}

    for the loss :math:`\frac{1}{2} \|Y - U V^T\|_F^2` and factors that start aligned with the singular vectors of Y:
    large values are learned first, each after a time of about `log(s / sigma0) / (2 s)`. A loss without the factor 1/2,
    as elsewhere in `masklr.theory`, runs twice as fast. A value s of 0 decays as `sigma0 / (1 + 2 sigma0 t)`.

    Args:
        s: Singular values of the target, at least 0. The three arguments broadcast.
        sigma0: Singular values of the product at the start, above 0.
        t: Time, steps times learning rate, at least 0.

    Returns:
        Singular values of the product at time t, in the unit of s.

    Raises:
        ValueError: `s` or `t` is negative, `sigma0` is not above 0, or one is not finite.

    Example:
        >>> saxe_mode(3.0, 1e-3, 2.0)
        tensor(2.9457, dtype=torch.float64)

    Reference:
        Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
        networks", ICLR 2014.
    """
    target, start, time = (_numbers(x, name) for x, name in ((s, "s"), (sigma0, "sigma0"), (t, "t")))
    if not (start > 0).all():
        raise ValueError(f"Expected `sigma0` above 0, got {start.min().item()}.")
    decay = torch.exp(-2 * target * time)
    # (1 - e^{-2st}) / s, with its limit at s = 0; growing exponentials would overflow.
    learned = torch.where(target > 0, -torch.expm1(-2 * target * time) / torch.where(target > 0, target, 1), 2 * time)
    return 1 / (learned + decay / start)


def invariant_tail(eps: float, lr: float, weight_decay: float, depth: int, steps: int) -> Float64[Tensor, " times"]:
    r"""Singular value that all but a few directions of every layer share while a deep linear network is trained.

    .. math:: \rho_{t+1} = \rho_t \, \bigl(1 - \eta \mu - \eta \rho_t^{2 (L - 1)}\bigr), \qquad \rho_0 = \epsilon

    For square d x d layers that start as eps times orthogonal matrices, whitened inputs, a target of rank K, gradient
    descent on half the squared loss: d - 2K singular values of each layer are exactly this at step t, and of its update
    since the start exactly eps - rho_t, whatever the target is. All learning happens in the other 2K directions.

    Args:
        eps: Scale of the initial weights, at least 0.
        lr: Learning rate, at least 0.
        weight_decay: Added to the gradient as `weight_decay * W`, as by `torch.optim.SGD`; at least 0.
        depth: Number of layers, L, at least 1.
        steps: Number of steps, at least 0.

    Returns:
        The value after 0, 1, ... `steps` steps, in the unit of eps.

    Raises:
        ValueError: A number is outside its range or not finite, or `lr` so large that the first step turns the sign.

    Example:
        >>> invariant_tail(0.1, lr=0.05, weight_decay=0.0, depth=3, steps=400)[-1]
        tensor(0.0998, dtype=torch.float64)

    Reference:
        Yaras et al., "The law of parsimony in gradient descent for learning deep linear networks", arXiv 2306.01154,
        2023; "Compressible dynamics in deep overparameterized low-rank learning and adaptation", ICML 2024.
    """
    for value, name in ((eps, "eps"), (lr, "lr"), (weight_decay, "weight_decay")):
        check_non_negative(value, name)
    check_integer(depth, "depth")
    check_integer(steps, "steps")
    if steps > MAX_STEPS:
        raise ValueError(f"Expected `steps` of at most {MAX_STEPS:,}, got {steps}.")
    if depth < 1 or steps < 0:
        raise ValueError(f"Expected `depth` of at least 1 and `steps` of at least 0, got {depth} and {steps}.")
    try:
        rate = lr * (weight_decay + float(eps) ** (2 * (depth - 1)))
    except OverflowError:
        rate = math.inf
    if rate > 1:
        raise ValueError(f"Expected `lr` of at most {lr / rate:.3g}, above which the tail turns its sign, got {lr}.")
    values = [float(eps)]
    for _ in range(steps):
        values.append(values[-1] * (1 - lr * weight_decay - lr * values[-1] ** (2 * (depth - 1))))
    return torch.tensor(values, dtype=torch.float64)


def _numbers(x: float | Tensor, name: str) -> Tensor:
    """Numbers in float64, if they are finite and at least 0."""
    if not isinstance(x, Tensor):
        check_number(x, name)
    elif x.is_complex() or x.dtype == torch.bool or not x.numel():
        raise ValueError(f"Expected `{name}` of real numbers, at least one, got {x.numel()} of {x.dtype}.")
    values = float64(x.detach()) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
    smallest, largest = (value.item() for value in values.aminmax())
    if not (smallest >= 0 and math.isfinite(largest)):
        raise ValueError(f"Expected finite `{name}` of at least 0, got values from {smallest} to {largest}.")
    return values
