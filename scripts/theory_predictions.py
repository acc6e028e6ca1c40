"""What theory says comes out of a row of the theory table."""

import itertools
from dataclasses import dataclass

import torch
from theory_rows import Row, product
from torch import Tensor

from masklr import theory

RANK_RTOL = 1e-2


@dataclass(frozen=True)
class Prediction:
    """What theory says of a row.

    Args:
        spectrum: Singular values, in descending order.
        rank: How many of them are above RANK_RTOL times the largest.
        objective: The least expected loss; None where theory is silent.
        bound: Lower bound of the objective, where that is all that theory has: spectrum and objective are then those
            of a minimization of the exact expected loss.
    """

    spectrum: Tensor
    rank: int
    objective: float | None
    bound: float | None = None


def rank(sigma: Tensor) -> int:
    """Number of singular values above RANK_RTOL times the largest."""
    return int((sigma > RANK_RTOL * sigma.max()).sum())


def prediction(row: Row, num_steps: int) -> Prediction:
    """Spectrum, rank and objective after training, or for a path after that many steps."""
    model = row.model
    s = torch.linalg.svdvals(row.target @ row.root)
    if row.name == "small_init_invariant":
        K = rank(s)
        tail = invariant_tail(row, num_steps)[-1]
        return Prediction(tail.expand(model.sizes[0] - 2 * K), 2 * K, None)
    if row.name == "small_init_modes":
        sigma = modes(row, torch.tensor(num_steps))
        return Prediction(sigma, rank(sigma), float((s - sigma).square().sum()))
    if model.input_p:
        best = theory.linear_mae(
            row.C,
            model.input_p,
            model.patch_size,
            loss_on="masked" if row.loss_on_masked else "all",
            bottleneck=model.sizes[1] if len(model.sizes) > 2 else None,
            exact_count=model.exact_count,
        )
        sigma = torch.linalg.svdvals(best.W)
        return Prediction(sigma, rank(sigma), float(best.loss))
    if model.mask == "dropconnect" and model.drop_probabilities[0]:
        sigma, value = dropconnect_first_minimum(row)
        return Prediction(sigma, rank(sigma), value)
    p, block_size = model.drop_probabilities[-1], model.group_size
    deep = len(model.sizes) > 3
    if deep:
        kappa = theory.deep_dropout_factor(model.sizes[1:-1], model.drop_probabilities)
    else:
        kappa = theory.mask_variance(p) * block_size / model.sizes[1]
    sigma = theory.shrunk_spectrum(s, kappa, block_size, row.weight_decay)
    value = float(theory.shrunk_value(s, kappa, block_size, row.weight_decay))
    if deep and rank(sigma) > 1:
        # The envelope is attained by no network of rank above one.
        sigma, least = deep_dropout_minimum(row)
        return Prediction(sigma, rank(sigma), least, bound=value)
    return Prediction(sigma, rank(sigma), value)


def invariant_tail(row: Row, num_steps: int) -> Tensor:
    """Value of the singular values that stay together in every layer, after 0, 1, ... steps."""
    # The theory is of half our loss.
    eps, depth = row.arguments["init_scale"], len(row.model.sizes) - 1
    return theory.invariant_tail(eps, 2 * row.schedule.lr, row.weight_decay, depth, num_steps)


def modes(row: Row, step: Tensor) -> Tensor:
    """Singular values of the product of two layers after these steps, (..., r)."""
    s = torch.linalg.svdvals(row.target)
    return theory.saxe_mode(s, row.arguments["init_scale"] ** 2, 2 * row.schedule.lr * step[..., None].double())


def dropconnect_first_minimum(row: Row) -> tuple[Tensor, float]:
    """Spectrum and value of the minimum for DropConnect on the first of two layers, for any C.

    With D = diag(C), the least penalty of a matrix M is lambda / d |M D^(1/2)|_*^2: convex, so that there is one
    minimum, but data are measured by C, so that it has a closed form for diagonal C only. Proximal gradient descent on
    N = M D^(1/2) finds it; the proximal map of a squared nuclear norm is `shrunk_spectrum`.
    """
    kappa = theory.mask_variance(row.model.drop_probabilities[0]) / row.model.sizes[1]
    scale = row.C.diagonal().sqrt()
    correlation = row.C / scale / scale[:, None]
    step = 1 / (2 * torch.linalg.eigvalsh(correlation)[-1])
    goal, N, last = row.target * scale, torch.zeros_like(row.target), None
    while last is None or (N - last).abs().max() > 1e-13:
        last = N
        left, s, right = torch.linalg.svd(N - 2 * step * (N - goal) @ correlation, full_matrices=False)
        N = left * theory.shrunk_spectrum(s, float(2 * step * kappa)) @ right
    M, nuclear_norm = N / scale, torch.linalg.svdvals(N).sum()
    value = ((row.target - M) @ row.root).square().sum() + kappa * nuclear_norm.square()
    return torch.linalg.svdvals(M @ row.root), float(value)


def deep_dropout_minimum(row: Row, starts: int = 8) -> tuple[Tensor, float]:
    """Spectrum and value of the least exact expected loss that L-BFGS finds from several starts."""
    found = []
    for seed in range(starts):
        weights = [W.requires_grad_() for W in row.initial_weights(seed)]
        optimizer = torch.optim.LBFGS(weights, max_iter=1000, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(weights: list[Tensor] = weights, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = objective(row, weights)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        weights = [W.detach() for W in weights]
        found.append((float(objective(row, weights)), seed, row.spectrum(weights)))
    least, _, sigma = min(found)
    return sigma, least


def objective(row: Row, weights: list[Tensor], control: bool = False) -> Tensor:
    """Expected loss over all inputs and masks, exactly, with weight decay: what training minimizes.

    Args:
        row: The row.
        weights: Of one network, first layer first.
        control: Whether masks are left out, and weight decay too if there are no masks.
    """
    model, M = row.model, product(weights)
    mu = 0.0 if control and not row.p else row.weight_decay
    decay = mu * sum(W.square().sum() for W in weights)
    if control or not row.p:
        penalty = torch.zeros_like(M[0, 0])
    elif model.input_p:
        return masked_input_loss(row, M) + decay
    elif model.mask == "dropconnect":
        penalty = theory.dropconnect_penalty(weights, model.drop_probabilities, row.C)
    elif model.mask == "groups":
        first, last = weights
        penalty = theory.dropblock_penalty(last, first.mT, model.drop_probabilities[0], model.group_size, row.C)
    else:
        penalty = theory.deep_dropout_penalty(weights, model.drop_probabilities, row.C)
    return ((row.target - M) @ row.root).square().sum() + penalty + decay


def masked_input_loss(row: Row, M: Tensor) -> Tensor:
    """Mean loss over all masks of the inputs, each with its probability: enumerated, not by a formula of theory."""
    model = row.model
    num_patches, p = model.sizes[0] // model.patch_size, 1 - model.input_keep_probability
    keep = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_patches)), dtype=M.dtype)
    kept = keep.sum(1)
    probability = p ** (num_patches - kept) * (1 - p) ** kept
    if model.exact_count:
        probability = (kept == round(num_patches * (1 - p))).double()
        probability = probability / probability.sum()
    keep = keep.repeat_interleave(model.patch_size, 1)
    error = ((row.target - M * keep[:, None] / (1 - p)) @ row.root).square().sum(2)
    if row.loss_on_masked:
        error = error * (1 - keep)
    return probability @ error.sum(1)
