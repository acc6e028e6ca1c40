r"""Linear masked autoencoders: the best map of masked inputs to inputs, and its loss.

An input x of second moment C = E[x x^T] is cut into patches of `patch_size` consecutive coordinates; masked patches are
set to 0 and visible ones divided by the keep probability, so that the mask m has mean one:

.. math:: \min_W \, \mathbb{E} \, \|x - W (m \circ x)\|^2

Closed forms for independent masks and for an exact number of visible patches, for the loss on all coordinates and on
those that are masked, and for a bottleneck. Independent masks shrink but cut nothing: low rank needs the bottleneck.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from masklr.theory.arguments import check_integer, check_probability, semidefinite


class LinearMAE(NamedTuple):
    """The best linear masked autoencoder, in float64.

    Attributes:
        W: Map (n, n) of masked inputs, divided by the keep probability, to reconstructions. A network that is fed
            masked inputs as they are learns W divided by the keep probability.
        loss: Its expected squared error, summed over the coordinates that count, in the unit of C.
    """

    W: Float64[Tensor, "n n"]
    loss: Float64[Tensor, ""]


def linear_mae(
    C: Float[Tensor, "n n"],
    mask_ratio: float,
    patch_size: int = 1,
    loss_on: Literal["all", "masked"] = "all",
    bottleneck: int | None = None,
    exact_count: bool = False,
) -> LinearMAE:
    r"""Best linear masked autoencoder of inputs with a given second moment, in closed form.

    With :math:`\lambda = p / (1 - p)` and the block diagonal B of C over patches,

    .. math:: W = C (C + N)^{-1}, \qquad \text{loss} = \mathrm{tr}(W N), \qquad N = \lambda B

    for the loss on all coordinates, and :math:`N = \lambda (P B - C) / (P - 1)` for exactly `round(P * mask_ratio)` of
    P patches masked. A bottleneck projects the outputs on the leading eigenvectors of :math:`C (C + N)^{-1} C`. The
    loss on masked coordinates is a regression of each patch on the others; its own block of W is irrelevant, and set to
    0.

    A singular C is no problem (constant zero pixels, fewer samples than coordinates): the loss is the minimum, and W
    the map of least norm among those that reach it (for the bottleneck: that map, projected).

    Args:
        C: Second moment of the inputs, not centered unless the inputs are.
        mask_ratio: Probability that a patch is masked, in [0, 1); above 0 for the loss on masked coordinates.
        patch_size: Coordinates in a patch, a divisor of n; patches are consecutive.
        loss_on: Which coordinates count: all, or in each draw those that are masked.
        bottleneck: Rank that W may have at most, from 1 to n; no limit when None. Not with `masked`, which has no
            closed form then.
        exact_count: Whether in each draw the same number of patches is masked, all subsets alike, as `patch_split`
            draws them; otherwise each patch is masked by itself. Losses differ: by a quarter for 16 pixels of
            correlation 0.9^distance at ratio 0.75.

    Returns:
        The map W and its loss.

    Raises:
        ValueError: `C` is not square, finite, symmetric and positive semi-definite, or another argument is outside its
            range, or an exact count leaves no visible or no masked patch.

    Example:
        >>> linear_mae(torch.tensor([[1.0, 0.8], [0.8, 1.0]]), mask_ratio=0.5).W
        tensor([[0.4048, 0.2381],
                [0.2381, 0.4048]], dtype=torch.float64)

    Reference:
        Chen, Xu, Weinberger and Sha, "Marginalized denoising autoencoders for domain adaptation", ICML 2012; Bisulco,
        Ramesh, Balestriero and Chaudhari, "From linearity to non-linearity: how masked autoencoders capture spatial
        correlations", ICCV 2025.
    """
    check_probability(mask_ratio, "mask_ratio")
    C = semidefinite(C)
    num_patches = _num_patches(len(C), patch_size)
    if loss_on not in ("all", "masked"):
        raise ValueError(f"Expected `loss_on` to be all or masked, got {loss_on}.")
    num_masked = _num_masked(num_patches, mask_ratio) if exact_count else None
    share = mask_ratio if num_masked is None else num_masked / num_patches
    if loss_on == "masked":
        if bottleneck is not None:
            raise ValueError(f"Expected no `bottleneck` with the loss on masked coordinates, got {bottleneck}.")
        if not mask_ratio > 0:
            raise ValueError(f"Expected `mask_ratio` above 0 with the loss on masked coordinates, got {mask_ratio}.")
        return _regressions(C, patch_size, share, *_visibilities(num_patches, share, num_masked))
    variance = share / (1 - share)
    noise = variance * _patch_blocks(C, patch_size)
    if num_masked:
        noise = (num_patches * noise - variance * C) / (num_patches - 1)
    W = _solved(C + noise, C).T
    if bottleneck is None:
        return LinearMAE(W, (W * noise).sum())
    return _narrowed(C, W, (W * noise).sum(), bottleneck)


def _num_patches(size: int, patch_size: int) -> int:
    check_integer(patch_size, "patch_size")
    if patch_size < 1 or size % patch_size:
        raise ValueError(f"Expected `patch_size` to divide the number of coordinates {size}, got {patch_size}.")
    return size // patch_size


def _num_masked(num_patches: int, mask_ratio: float) -> int:
    count = round(num_patches * mask_ratio)
    if count == num_patches or (count == 0) != (mask_ratio == 0):
        raise ValueError(
            f"Expected `mask_ratio` to leave visible and masked patches, got {mask_ratio}, "
            f"which leaves no {'visible' if count else 'masked'} patch of {num_patches}."
        )
    return count


def _patch_blocks(C: Tensor, patch_size: int) -> Tensor:
    """The block diagonal of C over patches."""
    patch = torch.arange(len(C), device=C.device) // patch_size
    return torch.where(patch[:, None] == patch, C, 0)


def _visibilities(num_patches: int, share: float, num_masked: int | None) -> tuple[float, float]:
    """Probabilities that another patch, and that two others, are visible where one patch is masked."""
    if num_masked is None:
        return 1 - share, (1 - share) ** 2
    num_visible, pairs = num_patches - num_masked, (num_patches - 1) * (num_patches - 2)
    return num_visible / (num_patches - 1), num_visible * (num_visible - 1) / pairs if pairs else 0.0


def _regressions(C: Tensor, patch_size: int, share: float, same: float, other: float) -> LinearMAE:
    """Each patch from the others: the map and its loss, by one solve for all patches where C allows it.

    With Q = `other` C + (`same` - `other`) B, the second moment of a visible input, patch b is regressed by
    `same C_b Q'^-1`, Q' being Q without b.
    """
    n = len(C)
    Q = other * C + (same - other) * _patch_blocks(C, patch_size)
    if other > 0 and (factor := _cholesky(Q)) is not None:
        # Rows b of the inverse P of Q hold the regression on the rest: Q_b Q'^-1 = -(P_bb)^-1 P_b.
        precision = torch.cholesky_inverse(factor)
        rows = precision.unflatten(0, (-1, patch_size))
        own = torch.stack([rows[b, :, b * patch_size : (b + 1) * patch_size] for b in range(n // patch_size)])
        W = -(same / other) * torch.linalg.solve(own, rows).flatten(0, 1)
        W = W - _patch_blocks(W, patch_size)
    else:
        W = torch.zeros_like(C)
        for start in range(0, n, patch_size):
            patch = torch.arange(start, start + patch_size, device=C.device)
            rest = torch.cat([torch.arange(start), torch.arange(start + patch_size, n)]).to(C.device)
            W[patch[:, None], rest] = same * _solved(Q[rest[:, None], rest], C[rest[:, None], patch]).T
    loss = share * (C.trace() - same * (W * C).sum())
    return LinearMAE((1 - share) * W, loss.clamp(min=0))


def _narrowed(C: Tensor, W: Tensor, loss: Tensor, bottleneck: int) -> LinearMAE:
    """Reduced-rank regression: outputs projected on the leading eigenvectors of what W explains."""
    check_integer(bottleneck, "bottleneck")
    if not 1 <= bottleneck <= len(C):
        raise ValueError(f"Expected `bottleneck` from 1 to the number of coordinates {len(C)}, got {bottleneck}.")
    explained = W @ C
    eigenvalues, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    leading = vectors[:, len(C) - bottleneck :]
    return LinearMAE(leading @ (leading.T @ W), loss + eigenvalues[: len(C) - bottleneck].clamp(min=0).sum())


def _cholesky(Q: Tensor) -> Tensor | None:
    """Cholesky factor; None if the matrix is singular up to rounding."""
    factor, info = torch.linalg.cholesky_ex(Q)
    pivots = factor.diagonal().square()
    tolerance = len(Q) * torch.finfo(Q.dtype).eps
    return factor if info == 0 and bool((pivots > tolerance * Q.diagonal()).all()) else None


def _solved(Q: Tensor, right: Tensor) -> Tensor:
    """Q^+ right for a symmetric, positive semi-definite Q."""
    factor = _cholesky(Q)
    if factor is not None:
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(Q, hermitian=True) @ right
