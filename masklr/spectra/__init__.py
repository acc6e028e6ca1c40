"""Singular values to ranks and norms; subspaces.

Measures are scalars in float64. They take singular values `sigma` (or, where said, eigenvalues: their squares, up to a
factor) in any order, and raise where the number does not exist: an empty, negative or non-finite spectrum always, one
that is zero for every measure but the norms.

The same words mean other numbers elsewhere. Here every measure has one definition:

===================  ===================================  ============================================================
here                 elsewhere                            difference
===================  ===================================  ============================================================
effective_rank       entropy of sigma^2 / sum sigma^2     smaller: 2.94 instead of 3.60 for 4, 3, 2, 1. It is
                     ("spectral", "von Neumann")          `effective_rank` of the squared values.
effective_rank       of features that are not centered    an offset hides the rest. Callbacks center;
                                                          `effective_rank_uncentered` does not.
rankme               of centered features                 published numbers are of uncentered ones, and so is ours.
rankme               of eigenvalues                       published numbers are of singular values.
rankme               epsilon of 1e-5 instead of 1e-7      4,096 values of which one is not zero read 1.60, and
                                                          decaying ones 1 to 9 % more.
rankme               of a queue of training batches       stale, with augmentation and masks. Callbacks take the
                                                          evaluation path over the whole validation split.
stable_rank          called numerical rank                the same number.
numerical_rank       `torch.linalg.matrix_rank`           counts above max(rows, cols) * eps(dtype) of the first:
                                                          4.9e-4 at 4096 x 4096 in float32. Here above 1e-3.
energy_rank          cumulative share of sigma            larger: here of sigma^2, which is the error of truncation.
nuclear_rank         participation ratio of sigma         the same number.
participation_ratio  of sigma                             here of eigenvalues, the squares of sigma.
alpha_req            fitted over a chosen range           here from the first to the last above 1e-6 of the first in
                                                          sigma; `first` and `last` choose.
hill_alpha           WeightWatcher's alpha                a maximum likelihood fit above a threshold that is fitted
                                                          too. Hill's takes the upper half. Both are density exponents.
hill_alpha           exponent of the decay over rank      a decay of j^-a has a density exponent of 1 + 1/a.
lidar                roots of the eigenvalues             here eigenvalues are normalized.
===================  ===================================  ============================================================
"""

from masklr.spectra.by_name import MEASURES, check_measures, measures
from masklr.spectra.checks import normalized
from masklr.spectra.decompositions import float64, gram, null_singular_values, singular_values
from masklr.spectra.norms import frobenius_norm, nuclear_norm, spectral_norm
from masklr.spectra.power_laws import alpha_req, hill_alpha
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
from masklr.spectra.scatter import lidar
from masklr.spectra.subspaces import leading_subspace, principal_angles, subspace_overlap

__all__ = [
    "MEASURES",
    "alpha_req",
    "check_measures",
    "effective_rank",
    "energy_rank",
    "float64",
    "frobenius_norm",
    "gram",
    "hill_alpha",
    "leading_subspace",
    "lidar",
    "measures",
    "normalized",
    "nuclear_norm",
    "nuclear_rank",
    "null_singular_values",
    "numerical_rank",
    "participation_ratio",
    "principal_angles",
    "rankme",
    "singular_values",
    "spectral_entropy",
    "spectral_norm",
    "stable_rank",
    "subspace_overlap",
]
