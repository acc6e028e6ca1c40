"""Streamed second moments, and the spectra of the data behind them.

A Gram matrix is exact over the whole set, takes d x d memory whatever the number of samples, and is summed exactly over
ranks. It squares the condition number, so it is accumulated and solved in float64.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from masklr.spectra import float64, gram


class Moments(NamedTuple):
    """Sums over N samples x_i of dimension d, in float64.

    Attributes:
        gram: Sum of x_i x_i^T, not centered.
        sum: Sum of x_i.
        count: N.
    """

    gram: Float64[Tensor, "d d"]
    sum: Float64[Tensor, " d"]
    count: Int64[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, which makes no sense here

    @property
    def mean(self) -> Tensor:
        """Mean of the samples."""
        return self.sum / self.count

    @property
    def centered_gram(self) -> Tensor:
        """Sum of (x_i - mean)(x_i - mean)^T."""
        mean = self.mean
        return self.gram - self.count * torch.outer(mean, mean)

    def singular_values(self, *, centered: bool = True) -> Tensor:
        """Singular values of the N x d matrix of samples.

        Args:
            centered: Whether the mean is subtracted from the samples first.

        Returns:
            min(N, d) values, descending, in float64. Those below some 1e-7 of the largest, or a millionth of what
            centering takes away, are read as zero.

        Raises:
            ValueError: `centered` with fewer than two samples.
        """
        num_samples = int(self.count)
        if centered and num_samples < 2:
            raise ValueError(f"Expected at least 2 samples to center, got {num_samples}.")
        # Centering subtracts two numbers of the size of the uncentered ones, and leaves their rounding.
        offset = self.count * self.mean.square().sum() if centered else 0.0
        sigma = singular_values_from_gram(self.centered_gram if centered else self.gram, float(offset))
        sigma[num_samples - centered :] = 0  # the rest is rounding: the samples have no more directions
        return sigma[:num_samples]


class SecondMoment(Metric):
    r"""Sum of x x^T, of x, and of 1 over all samples seen, in float64.

    .. math:: G = \sum_i x_i x_i^T, \qquad s = \sum_i x_i, \qquad N

    Memory is of order d^2, however many samples come. The order of the samples and their split over batches and ranks
    move only the last digits. An update does not wait for the device.

    Args:
        dim: Number of features, d; that of the first update when None. A rank without samples is then no problem.

    Raises:
        ValueError: `dim` is below 1, or a batch has another number of features.

    Example:
        >>> metric = SecondMoment()
        >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> metric.compute().gram
        tensor([[10., 14.],
                [14., 20.]], dtype=torch.float64)

    Reference:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 1983.
    """

    full_state_update = True  # states may grow from size 0 at the first update, so two cannot simply be added
    gram: Tensor
    sum: Tensor
    count: Tensor

    def __init__(self, dim: int | None = None) -> None:
        if dim is not None and dim < 1:
            raise ValueError(f"Expected `dim` of at least 1, got {dim}.")
        super().__init__(dist_sync_fn=gathered_summands)
        # Registered even when the size is unknown: ranks must agree on what there is to gather.
        size = dim or 0
        self.add_state("gram", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Add the samples of a batch.

        Args:
            x: One sample a row, of any floating type; cast to float64.
        """
        if not len(self.sum):
            self.gram, self.sum = self.gram.new_zeros(x.shape[1], x.shape[1]), self.sum.new_zeros(x.shape[1])
        if x.shape[1] != len(self.sum):
            raise ValueError(f"Expected `x` with {len(self.sum)} features, got {x.shape[1]}.")
        x = x.detach()
        # Out of place: a state that was reset inside inference mode may be added to outside it.
        self.gram = self.gram + gram(x).to(self.gram.device)
        for rows in x.split(4096):
            self.sum = self.sum + rows.to(self.sum.device).double().sum(0)
        self.count = self.count + len(x)

    def compute(self) -> Moments:
        """Moments of all samples of all ranks.

        Returns:
            Sums in float64.

        Raises:
            ValueError: There was no sample, or a feature was NaN or infinite.
        """
        if self.count == 0:
            raise ValueError("Expected at least one sample, got none.")
        finite = self.gram.diagonal().isfinite()
        if not finite.all():
            raise ValueError(
                f"Expected finite features, got NaN or infinity in {int((~finite).sum())} of {len(finite)}."
            )
        return Moments(self.gram, self.sum, self.count)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics takes the axes from tensors of one element; of one feature, a Gram matrix is 1 x 1.
        wrapped = super()._wrap_compute(compute)

        @wraps(compute)
        def with_axes(*args: Any, **kwargs: Any) -> Moments:
            moments = wrapped(*args, **kwargs)
            dim = moments.sum.numel()
            return Moments(moments.gram.view(dim, dim), moments.sum.view(dim), moments.count)

        return with_axes

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # `.to(torch.bfloat16)` of a module that holds this metric must not round its sums, and a device without
        # float64 cannot hold them.
        def moved(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state if device.type == "mps" else state.to(device)

        return super()._apply(moved, exclude_state)


class ViewScatter(nn.Module):
    r"""Scatter between images and between the views of one image, for `masklr.spectra.lidar`.

    .. math:: S_b = \frac{1}{n} \sum_i (\bar x_i - \bar x)(\bar x_i - \bar x)^T, \qquad
        S_w = \frac{1}{n q} \sum_i \sum_v (x_{iv} - \bar x_i)(x_{iv} - \bar x_i)^T

    with n images of q views each, in float64, summed exactly over ranks. Memory is of order d^2 and of one batch.

    Example:
        >>> scatter = ViewScatter()
        >>> scatter.update(torch.tensor([[[0.0], [4.0]], [[2.0], [6.0]]]))
        >>> scatter.compute()
        (tensor([[4.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64), 2)

    Reference:
        Thilak et al., "LiDAR: sensing linear probing performance in joint embedding SSL architectures", ICLR 2024.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means, self.deviations = SecondMoment(), SecondMoment()

    def update(self, views: Float[Tensor, "q n d"]) -> None:
        """Add the q views of n images.

        Args:
            views: Features, at least two views of each image.

        Raises:
            ValueError: There is one view.
        """
        if len(views) < 2:
            raise ValueError(f"Expected at least 2 `views` of an image, got {len(views)}.")
        views = float64(views)
        means = views.mean(0)
        self.means.update(means)
        self.deviations.update((views - means).flatten(0, 1))

    def compute(self) -> tuple[Tensor, Tensor, int]:
        """Scatter of all images of all ranks.

        Returns:
            Scatter between images, scatter within an image, number of images.

        Raises:
            ValueError: There was no image, or a feature was NaN or infinite.
        """
        means, deviations = self.means.compute(), self.deviations.compute()
        # What centering leaves of equal means is rounding.
        differ = means.count > 1 and means.singular_values().any()
        between = means.centered_gram / means.count if differ else torch.zeros_like(means.gram)
        return between, deviations.gram / deviations.count, int(means.count)


def gathered_summands(state: Tensor, group: Any = None) -> list[Tensor]:
    """Summands of all ranks, with zeros for a rank that has seen no sample and so does not know the size.

    Args:
        state: A state of this rank.
        group: Process group; the default one when None.

    Returns:
        One tensor a rank, all of one shape.

    Raises:
        ValueError: Two ranks have seen different numbers of features. Every rank raises.
    """
    gathered = gather_all_tensors(state, group)
    sizes = {tuple(summand.shape) for summand in gathered if summand.numel() or not summand.ndim}
    if len(sizes) > 1:
        raise ValueError(f"Expected the same number of features on all ranks, got the shapes {sorted(sizes)}.")
    size = sizes.pop() if sizes else state.shape
    return [summand if summand.shape == size else state.new_zeros(size) for summand in gathered]


def singular_values_from_gram(gram: Float[Tensor, "d d"], offset: float = 0.0) -> Float64[Tensor, " d"]:
    r"""Singular values of X from X^T X.

    .. math:: \sigma_i = \lambda_i(X^T X)^{1/2}

    Rounding hides values below some 1e-7 of the largest; they are read as zero, since d square roots of rounding would
    add up to a visible rank.

    Args:
        gram: Symmetric, positive semi-definite up to rounding.
        offset: Largest eigenvalue of what was subtracted to center the Gram matrix, at least 0. Values below a
            millionth of its root are read as zero too.

    Returns:
        d values, descending.

    Raises:
        ValueError: An entry is not finite.

    Example:
        >>> singular_values_from_gram(torch.diag(torch.tensor([9.0, 16.0])))
        tensor([4., 3.], dtype=torch.float64)

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 8.6.
    """
    gram = gram.detach()
    gram = (gram.cpu() if gram.device.type == "mps" else gram).double()
    if not gram.isfinite().all():
        raise ValueError("Expected a finite `gram`, got NaN or infinity.")
    try:
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    except torch.linalg.LinAlgError:
        # For a positive semi-definite matrix they are its singular values, which another solver finds.
        eigenvalues = torch.linalg.svdvals(gram)
    # Rounding of the sums and of the solver: up to some 8 units of the largest eigenvalue at d = 768.
    # What was subtracted had been summed over many samples: rounding adds up to some 600 units at 20,000 equal ones.
    floor = 10 * torch.finfo(torch.float64).eps * eigenvalues[0] + 1e-12 * offset
    return torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()
