"""Measures by the names under which they are logged."""

import difflib
import re
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float

from masklr.spectra.checks import checked, relative_above
from masklr.spectra.decompositions import float64
from masklr.spectra.norms import frobenius_norm, nuclear_norm, spectral_norm
from masklr.spectra.power_laws import EQUAL, alpha_req, hill_alpha
from masklr.spectra.ranks import (
    effective_rank,
    energy_rank,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    rankme,
    spectral_entropy,
    stable_rank,
)

MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "nuclear_rank": nuclear_rank,
    "numerical_rank": numerical_rank,
    "spectral_entropy": spectral_entropy,
    "energy_rank_90": lambda sigma: energy_rank(sigma, 0.90),
    "energy_rank_95": lambda sigma: energy_rank(sigma, 0.95),
    "energy_rank_99": lambda sigma: energy_rank(sigma, 0.99),
    "participation_ratio": lambda sigma: participation_ratio(float64(sigma).square()),
    "rankme": rankme,
    "alpha_req": lambda sigma: alpha_req(float64(sigma).square()),
    "hill_alpha": lambda sigma: hill_alpha(float64(sigma).square()),
    "frobenius_norm": frobenius_norm,
    "nuclear_norm": nuclear_norm,
    "spectral_norm": spectral_norm,
}

POWER_LAWS = ("alpha_req", "hill_alpha")  # measures of the tail, on singular values above 1e-6 of the first


def check_measures(names: Iterable[str]) -> None:
    """Raise unless every name is one of `MEASURES` or `energy_rank_{percent}`.

    Args:
        names: Names as in logged keys.

    Raises:
        ValueError: A name is unknown; the message has the nearest valid one.

    Example:
        >>> check_measures(["stable_rank", "energy_rank_80"])
    """
    for name in names:
        if name not in MEASURES and _percent(name) is None:
            nearest = difflib.get_close_matches(name, MEASURES, n=1, cutoff=0.0)[0]
            raise ValueError(f"Expected the name of a measure, such as {nearest}, got {name!r}.")


def measures(sigma: Float[torch.Tensor, " r"], names: Iterable[str]) -> dict[str, float]:
    """Several measures of one spectrum, by the names under which they are logged.

    Args:
        sigma: Singular values, non-negative, in any order. `participation_ratio`, `alpha_req` and `hill_alpha` take
            their squares; `rankme` expects those of features that are not centered.
        names: Names in `MEASURES`, or `energy_rank_{percent}`.

    Returns:
        A number for each name, in that order. Of an exactly zero spectrum only the norms that were asked for: it has no
        rank. Nor has a spectrum of one direction, or a flat one, the power law that `alpha_req` or `hill_alpha` fit.

    Raises:
        ValueError: A name is unknown, or the spectrum negative or not finite.

    Example:
        >>> measures(torch.tensor([2.0, 2.0]), ["effective_rank", "frobenius_norm"])
        {'effective_rank': 2.0, 'frobenius_norm': 2.8284271247461903}
        >>> measures(torch.zeros(2), ["effective_rank", "frobenius_norm"])
        {'frobenius_norm': 0.0}
    """
    names = list(names)
    check_measures(names)
    sigma = checked(sigma, "sigma").cpu()  # one transfer, instead of one a measure
    if not sigma.any():
        return {name: 0.0 for name in names if name.endswith("_norm")}
    return {name: _measure(name)(sigma).item() for name in names if not _lacks_power_law(name, sigma)}


def _lacks_power_law(name: str, sigma: torch.Tensor) -> bool:
    if name not in POWER_LAWS:
        return False
    tail = relative_above(sigma.square(), 1e-12)
    k = len(tail) // 2
    return len(tail) < 2 or (name == "hill_alpha" and bool((tail[:k] / tail[k]).log().mean() <= EQUAL))


def _percent(name: str) -> int | None:
    found = re.fullmatch(r"energy_rank_([1-9]\d?|100)", name)
    return int(found[1]) if found else None


def _measure(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    percent = _percent(name)
    return MEASURES[name] if percent is None else lambda sigma: energy_rank(sigma, percent / 100)
