"""Spectra and matrices that several tests take."""

import torch

from masklr.spectra import (
    effective_rank,
    frobenius_norm,
    nuclear_norm,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    spectral_norm,
    stable_rank,
)

PRINTED = torch.tensor([4.0, 3.0, 2.0, 1.0])
NORMS = [nuclear_norm, frobenius_norm, spectral_norm]
RANKS = [effective_rank, stable_rank, nuclear_rank, numerical_rank, participation_ratio]


def orthogonal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw)[0]
