"""What one validation adds up of the features of one layer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from masklr.moments import Moments, SecondMoment, ViewScatter
from masklr.spectra import effective_rank, lidar, measures, null_singular_values, numerical_rank

TAIL = ("alpha_req", "hill_alpha", "numerical_rank")  # what rounding in a Gram matrix could spoil
UNCENTERED = "_uncentered"  # ending of measures of features as they are


class Results(NamedTuple):
    """What was found of one layer.

    Attributes:
        sigma: Singular values of the centered features; None without features.
        values: Measures by name.
        counts: What stands beside them: `samples`, `lidar_images`, and how many values each measure of the tail used.
    """

    sigma: Tensor | None
    values: dict[str, float]
    counts: dict[str, int]


class LayerFeatures:
    """Second moments of a layer's features, and of the features of views, in constant memory.

    Args:
        device: Where they are summed.
    """

    def __init__(self, device: torch.device) -> None:
        self.moment = SecondMoment().to(device)
        self.scatter = ViewScatter().to(device)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def add(self, found: Tensor) -> None:
        """Add features (n, d); samples that are not finite are left out and counted."""
        self.moment.update(self._finite(found, found.isfinite().all(1)))

    def add_views(self, found: Tensor) -> None:
        """Add features (q, n, d) of q views of n images."""
        self.scatter.update(self._finite(found, found.isfinite().all(2).all(0)))

    def _finite(self, found: Tensor, finite: Tensor) -> Tensor:
        self.skipped += (~finite).sum()
        return found[..., finite, :]

    def results(self, names: Sequence[str], total: Callable[[Tensor], int]) -> Results:
        """Measures of all processes' features; every process must call it.

        Args:
            names: Names of measures, some with the ending `_uncentered`.
            total: The sum of a count over all processes.
        """
        samples, lidar_images = total(self.moment.count), total(self.scatter.means.count)
        counts = {"samples": samples}
        if not samples or (samples < 2 and total(self.skipped)):
            return Results(None, {}, counts)
        moments = self.moment.compute()
        sigma = moments.singular_values()
        values = layer_measures(moments, sigma, names)
        resolved = int(numerical_rank(sigma, rtol=1e-6)) if sigma.any() else 0
        counts |= {f"{name}_values": resolved for name in names if name in TAIL}
        if lidar_images > 1:
            between, within, _ = self.scatter.compute()
            if not within.any():
                raise ValueError("Expected `augmentation` to change images, got views that are all alike.")
            counts["lidar_images"] = lidar_images
            values |= {"lidar": lidar(between, within).item()} if between.any() else {}
        return Results(sigma, values, counts)


def layer_measures(moments: Moments, sigma: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Measures by name, of centered features unless the name or the definition says otherwise.

    Args:
        moments: Of the features.
        sigma: Singular values of the centered features.
        names: Names of measures, some with the ending `_uncentered`.

    Example:
        >>> moment = SecondMoment()
        >>> moment.update(torch.tensor([[1.0], [3.0]]))
        >>> layer_measures(moment.compute(), torch.tensor([2.0]).sqrt(), ["stable_rank", "spectral_norm_uncentered"])
        {'stable_rank': 1.0, 'spectral_norm_uncentered': 3.1622776601683795}
    """
    uncentered = [name for name in names if name.endswith(UNCENTERED) or name == "rankme"]
    values = measures(sigma, [name for name in names if name not in uncentered])
    if uncentered:
        whole = moments.singular_values(centered=False)
        found = measures(whole, [name.removesuffix(UNCENTERED) for name in uncentered])
        values |= {name: found[plain] for name in uncentered if (plain := name.removesuffix(UNCENTERED)) in found}
    if "effective_rank" in values:
        null = null_singular_values(int(moments.count), len(moments.sum), centered=True)
        values["effective_rank_null"] = effective_rank(null).item()
    return values
