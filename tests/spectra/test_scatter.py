import math

import numpy as np
import pytest
import scipy.linalg
import torch

from masklr.spectra import (
    lidar,
)


def test_lidar_equals_the_effective_rank_of_whitened_scatter():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    between, within = a @ a.T, b @ b.T
    root = np.linalg.inv(scipy.linalg.sqrtm(within.numpy() + 0.1 * np.eye(6)))
    eigenvalues = np.linalg.eigvalsh(root @ between.numpy() @ root)
    p = eigenvalues / eigenvalues.sum()
    assert lidar(between, within, delta=0.1).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_of_singular_within_scatter_raises():
    with pytest.raises(ValueError, match="positive definite"):
        lidar(torch.eye(2), torch.zeros(2, 2), delta=0.0)
    with pytest.raises(ValueError, match="finite `within`"):
        lidar(torch.eye(2), torch.full((2, 2), math.nan))
