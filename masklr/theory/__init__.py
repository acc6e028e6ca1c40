"""What masks induce, in closed form: penalties, the spectra that minimize them, linear MAE, training dynamics.

Pure functions in float64. `masklr.theory.penalties` states the conventions: `p` is the probability of being dropped,
the loss is a sum over outputs and a mean over samples, `C` is the uncentered second moment of the inputs.
"""

from masklr.theory.deep_penalties import deep_dropout_factor, deep_dropout_penalty, dropconnect_penalty
from masklr.theory.dynamics import invariant_tail, saxe_mode
from masklr.theory.linear_mae import LinearMAE, linear_mae
from masklr.theory.minimizers import critical_variances, k_support_norm, shrunk_spectrum, shrunk_value
from masklr.theory.penalties import (
    covariance_penalty,
    dropblock_penalty,
    dropout_penalty,
    fixed_count_penalty,
    gauss_newton_penalty,
    mask_variance,
)

__all__ = [
    "LinearMAE",
    "covariance_penalty",
    "critical_variances",
    "deep_dropout_factor",
    "deep_dropout_penalty",
    "dropblock_penalty",
    "dropconnect_penalty",
    "dropout_penalty",
    "fixed_count_penalty",
    "gauss_newton_penalty",
    "invariant_tail",
    "k_support_norm",
    "linear_mae",
    "mask_variance",
    "saxe_mode",
    "shrunk_spectrum",
    "shrunk_value",
]
