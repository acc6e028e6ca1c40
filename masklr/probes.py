"""Linear probes in closed form: ridge regression on streamed moments.

Features are seen once and not kept. What is kept is a sum for each fold, from which come the standardization, the
cross-validated error of every penalty, and the classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

MAX_DIM_FOR_ALL_FOLDS = 1024


class FoldMoments(NamedTuple):
    """Sums over the samples (x_i, y_i) of each fold, in float64; d features, K classes, y_i one-hot.

    Attributes:
        gram: Sum of x_i x_i^T.
        cross: Sum of y_i x_i^T.
        sum: Sum of x_i.
        class_count: Sum of y_i, the samples of each class.
    """

    gram: Float64[Tensor, "folds d d"]
    cross: Float64[Tensor, "folds k d"]
    sum: Float64[Tensor, "folds d"]
    class_count: Float64[Tensor, "folds k"]

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """Samples in each fold."""
        return self.class_count.sum(1)


class RidgeMoments(Metric):
    r"""Sums that ridge classification needs, by fold.

    The fold of a sample is a function of its position in the data set alone, so the sums do not depend on batches or
    ranks.

    Args:
        num_folds: Number of folds for cross-validation, at least 2.
        num_classes: Number of classes, K; grown from the labels when None, which waits for the device at each update.

    Raises:
        ValueError: `num_folds` is below 2 or `num_classes` below 2.

    Example:
        >>> moments = RidgeMoments(num_folds=2, num_classes=2)
        >>> moments.update(torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6))
        >>> moments.compute().gram.shape
        torch.Size([2, 3, 3])
    """

    full_state_update = True  # states may grow, so two cannot simply be added
    gram: Tensor
    cross: Tensor
    sum: Tensor
    class_count: Tensor

    def __init__(self, num_folds: int = 5, num_classes: int | None = None) -> None:
        if num_folds < 2:
            raise ValueError(f"Expected `num_folds` of at least 2, got {num_folds}.")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"Expected `num_classes` of at least 2, got {num_classes}.")
        super().__init__(dist_sync_fn=_gathered_summands)
        self.num_folds, self.num_classes = num_folds, num_classes
        sizes = {
            "gram": (num_folds, 0, 0),
            "cross": (num_folds, num_classes or 0, 0),
            "sum": (num_folds, 0),
            "class_count": (num_folds, num_classes or 0),
        }
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> None:
        """Add the samples of a batch.

        Args:
            features: One sample a row, of any floating type; cast to float64.
            labels: Classes, from 0.
            positions: Position of each sample in the data set, which decides its fold.

        Raises:
            ValueError: The number of features differs from that of earlier batches, or a label is out of range.
        """
        device = self.gram.device
        x, labels, positions = features.detach().to(device).double(), labels.to(device).long(), positions.to(device)
        if self.sum.shape[1] not in (0, x.shape[1]):
            raise ValueError(f"Expected `features` of size {self.sum.shape[1]}, got {x.shape[1]}.")
        self._grow(x.shape[1], self._checked_num_classes(labels))
        num_classes = self.class_count.shape[1]
        fold = folds(positions, self.num_folds)
        cell = fold * num_classes + labels
        self.cross.view(-1, x.shape[1]).index_add_(0, cell, x)
        self.class_count.view(-1).index_add_(0, cell, torch.ones_like(x[:, 0]))
        self.sum.index_add_(0, fold, x)
        for index in range(self.num_folds):
            rows = x[fold == index]
            self.gram[index].addmm_(rows.T, rows)

    def compute(self) -> FoldMoments:
        """Moments of all samples of all ranks.

        Returns:
            Sums by fold, in float64.

        Raises:
            ValueError: There was no sample, or a feature was NaN or infinite.
        """
        if not self.class_count.any():
            raise ValueError("Expected at least one sample, got none.")
        finite = self.gram.diagonal(dim1=1, dim2=2).isfinite().all(0)
        if not finite.all():
            raise ValueError(
                f"Expected finite features, got NaN or infinity in {int((~finite).sum())} of {len(finite)}."
            )
        return FoldMoments(self.gram, self.cross, self.sum, self.class_count)

    def _checked_num_classes(self, labels: Tensor) -> int:
        if not len(labels):
            return self.class_count.shape[1]
        smallest, largest = (int(v) for v in labels.aminmax())
        if smallest < 0 or (self.num_classes is not None and largest >= self.num_classes):
            limit = "" if self.num_classes is None else f" and below {self.num_classes}"
            raise ValueError(f"Expected `labels` of at least 0{limit}, got values from {smallest} to {largest}.")
        return max(largest + 1, self.class_count.shape[1])

    def _grow(self, dim: int, num_classes: int) -> None:
        sizes = {
            "gram": (self.num_folds, dim, dim),
            "cross": (self.num_folds, num_classes, dim),
            "sum": (self.num_folds, dim),
            "class_count": (self.num_folds, num_classes),
        }
        for name, size in sizes.items():
            state = _padded(getattr(self, name), size)
            if state.is_inference() and not torch.is_inference_mode_enabled():
                state = state.clone()  # a state reset inside a validation loop could not be added to outside it
            setattr(self, name, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # As in SecondMoment: no rounding of sums, and none on a device without float64.
        def moved(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state if device.type == "mps" else state.to(device)

        return super()._apply(moved, exclude_state)


def _padded(x: Tensor, size: Sequence[int]) -> Tensor:
    """The tensor with zeros after it along each axis, up to a size."""
    if tuple(x.shape) == tuple(size):
        return x
    return pad(x, [n for old, new in zip(reversed(x.shape), reversed(size), strict=True) for n in (0, new - old)])


def _gathered_summands(state: Tensor, group: Any = None) -> list[Tensor]:
    """Summands of all ranks, padded with zeros where a rank has seen fewer classes, or no sample."""
    gathered = gather_all_tensors(state, group)
    size = [max(sizes) for sizes in zip(*(summand.shape for summand in gathered), strict=True)]
    return [_padded(summand, size) for summand in gathered]


def folds(positions: Int[Tensor, " n"], num_folds: int) -> Int64[Tensor, " n"]:
    r"""Fold of each sample, from its position alone.

    .. math:: \lfloor F \,\mathrm{frac}(i \varphi) \rfloor, \qquad \varphi = (\sqrt 5 - 1) / 2

    Folds of equal size up to a few samples. The remainder i mod F would do for shuffled data, but where classes take
    turns (0, 1, ..., 9, 0, 1, ...) it puts whole classes into one fold.

    Args:
        positions: Positions in the data set, i.
        num_folds: Number of folds, F.

    Returns:
        Folds, from 0 to F - 1.

    Example:
        >>> folds(torch.arange(10), 5).bincount()
        tensor([2, 2, 2, 2, 2])

    Reference:
        Knuth, "The Art of Computer Programming", volume 3, section 6.4 (Fibonacci hashing).
    """
    golden = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 times the golden ratio, as int64, whose product wraps
    fraction = ((positions.long() * golden) >> 33) & ((1 << 31) - 1)
    return (fraction * num_folds) >> 31


@dataclass(frozen=True)
class RidgeClassifier:
    """Linear classifier on raw features.

    Attributes:
        weight: Weights (d, K), in classes per unit of the feature.
        bias: Biases (K,); minus infinity for a class that was never seen.
        penalty: Ridge penalty on the standardized features that was chosen.
        penalties: All penalties tried.
        errors: Cross-validated squared error of each, a sample.
    """

    weight: Float64[Tensor, "d k"]
    bias: Float64[Tensor, " k"]
    penalty: float
    penalties: Float64[Tensor, " p"]
    errors: Float64[Tensor, " p"]

    def scores(self, features: Float[Tensor, "n d"]) -> Float64[Tensor, "n k"]:
        """Score of each class.

        Args:
            features: One sample a row.

        Returns:
            Regressions on the one-hot classes.
        """
        x = features.detach().to(self.weight.device).double()
        return x @ self.weight + self.bias

    def predict(self, features: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """Class of each sample.

        Args:
            features: One sample a row.

        Returns:
            Classes, from 0.
        """
        return self.scores(features).argmax(1)


def ridge(moments: FoldMoments, penalties: Sequence[float] | None = None) -> RidgeClassifier:
    r"""Ridge regression on one-hot classes, with the penalty that cross-validates best.

    .. math:: \min_{W, b} \sum_i \|y_i - W^T z_i - b\|^2 + \alpha \|W\|_F^2, \qquad z = (x - \bar x) / \mathrm{std}(x)

    Features are standardized over all folds, the intercept is not penalized, and a constant feature gets weight zero.
    Each fold (of features wider than 1,024, one fold) is predicted from the others for all penalties at once, from one
    eigendecomposition; the classifier is then fitted to all folds. Nothing but sums over samples is needed.

    Args:
        moments: Sums by fold; at least two folds have samples.
        penalties: Values of alpha to choose from, above 0; when None, 25 from 1e-6 to 1e2 times the number of samples.

    Returns:
        The classifier, on the device of the moments.

    Raises:
        ValueError: A penalty is not above 0, or fewer than two classes or two folds have samples.

    Example:
        >>> moments = RidgeMoments(num_folds=2)
        >>> x = torch.tensor([[0.0], [1.0], [0.1], [0.9], [0.2], [1.1]])
        >>> moments.update(x, torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6))
        >>> ridge(moments.compute()).predict(torch.tensor([[0.3], [0.8]]))
        tensor([0, 1])

    Reference:
        Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 2nd edition, sections 3.4.1 and 7.10.
    """
    moments = FoldMoments(*(m.double() for m in moments))
    if (moments.count > 0).sum() < 2:
        raise ValueError(
            f"Expected samples in at least two folds, got {[int(c) for c in moments.count]} samples a fold."
        )
    seen = moments.class_count.sum(0) > 0
    if seen.sum() < 2:
        raise ValueError(f"Expected samples of at least two classes, got {int(seen.sum())}.")
    alphas = _alphas(penalties, moments)
    mean, scale, standard = _standardized(moments)
    # An eigendecomposition a fold: of wide features, whose take seconds each, one fold is held out instead of all.
    folds_used = [fold for fold in range(len(standard.gram)) if standard.count[fold] > 0]
    folds_used = folds_used if len(mean) <= MAX_DIM_FOR_ALL_FOLDS else folds_used[:1]
    errors = sum(_fold_errors(standard, fold, alphas) for fold in folds_used) / standard.count[folds_used].sum()
    alpha = alphas[errors.argmin()]
    gram, cross, _, class_mean = _centered(FoldMoments(*(m.sum(0, keepdim=True) for m in standard)), [0])
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    weight = scale[:, None] * torch.linalg.solve(gram + alpha * identity, cross.T, left=True)
    bias = (class_mean - mean @ weight).masked_fill(~seen, -torch.inf)
    return RidgeClassifier(weight, bias, alpha.item(), alphas, errors)


def _alphas(penalties: Sequence[float] | None, moments: FoldMoments) -> Tensor:
    alphas = torch.logspace(-6, 2, 25, dtype=torch.float64) * moments.count.sum().cpu()
    if penalties is not None:
        alphas = torch.tensor(list(penalties), dtype=torch.float64)
        if not len(alphas) or not (alphas > 0).all():
            raise ValueError(f"Expected `penalties` above 0, got {list(penalties)}.")
    return alphas.to(moments.gram.device)


def _standardized(moments: FoldMoments) -> tuple[Tensor, Tensor, FoldMoments]:
    """Mean and inverse deviation of each feature over all folds, and the moments of the standardized features."""
    total = moments.count.sum()
    mean = moments.sum.sum(0) / total
    shift = moments.sum[:, :, None] * mean
    count = moments.count[:, None, None]
    gram = moments.gram - shift - shift.mT + count * torch.outer(mean, mean)
    mean_square = moments.gram.diagonal(dim1=1, dim2=2).sum(0) / total
    variance = gram.diagonal(dim1=1, dim2=2).sum(0).clamp(min=0) / total
    # A constant leaves rounding for a variance; divided by its root it would be a feature of noise.
    varies = variance > 1e-12 * mean_square
    scale = torch.where(varies, variance, 1).rsqrt() * varies
    cross = (moments.cross - moments.class_count[:, :, None] * mean) * scale
    feature_sum = (moments.sum - moments.count[:, None] * mean) * scale
    return mean, scale, FoldMoments(gram * scale * scale[:, None], cross, feature_sum, moments.class_count)


def _centered(moments: FoldMoments, kept: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gram and cross moment of some folds about their own means, and these means."""
    gram, cross, feature_sum, class_count = (m[kept].sum(0) for m in moments)
    count = class_count.sum()
    mean, class_mean = feature_sum / count, class_count / count
    return gram - torch.outer(feature_sum, mean), cross - torch.outer(class_count, mean), mean, class_mean


def _fold_errors(moments: FoldMoments, held_out: int, alphas: Tensor) -> Tensor:
    """Sum of squared errors on one fold of the ridge fitted to the others, for each penalty.

    With A = Q L Q^T the Gram of the others, the weights are Q (L + alpha)^-1 P, P = Q^T B. So the error of the fold,
    tr(Y^T Y) - 2 tr(W^T X^T Y) + tr(W^T X^T X W) about the others' means, is a quadratic in 1 / (L + alpha).
    """
    gram, cross, feature_sum, class_count = (m[held_out] for m in moments)
    count = class_count.sum()
    if count == 0:
        return torch.zeros_like(alphas)
    others = [fold for fold in range(len(moments.gram)) if fold != held_out]
    fit_gram, fit_cross, mean, class_mean = _centered(moments, others)
    shift = torch.outer(feature_sum, mean)
    gram = gram - shift - shift.T + count * torch.outer(mean, mean)
    cross = cross - torch.outer(class_count, mean) - torch.outer(class_mean, feature_sum - count * mean)
    # One-hot: the sum of squares of y is the number of samples.
    target = count - 2 * class_count @ class_mean + count * class_mean.square().sum()
    eigenvalues, Q = torch.linalg.eigh(fit_gram)
    fit, held = fit_cross @ Q, cross @ Q
    shrink = 1 / (eigenvalues.clamp(min=0) + alphas[:, None])
    linear = shrink @ (fit * held).sum(0)
    quadratic = ((shrink @ ((Q.T @ gram @ Q) * (fit.T @ fit))) * shrink).sum(1)
    return target - 2 * linear + quadratic
