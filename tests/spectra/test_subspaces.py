import math

import numpy as np
import pytest
import scipy.linalg
import torch

from masklr.spectra import leading_subspace, principal_angles, singular_values, subspace_overlap
from tests.spectra.examples import orthogonal


def low_rank(rows, cols, sigma):
    left = torch.linalg.qr(torch.randn(rows, len(sigma), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(cols, len(sigma), dtype=torch.float64)).Q
    return left, right, left * sigma @ right.T


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 20), (20, 90)])
@pytest.mark.parametrize("scale", [1.0, 1e-120, 1e120])
def test_leading_vectors_are_those_of_the_singular_value_decomposition(shape, side, scale):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = (U if side == "left" else Vh.T)[:, :5]
    leading = leading_subspace(matrix * scale, 5, side)
    assert leading.basis.shape == expected.shape
    torch.testing.assert_close(leading.sigma, sigma * scale, rtol=1e-9, atol=0)
    torch.testing.assert_close((leading.basis * expected).sum(0).abs(), torch.ones(5).double(), rtol=0, atol=1e-9)
    assert subspace_overlap(leading.basis, expected) == pytest.approx(1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_directions_that_are_rounding_are_left_out(side):
    left, right, matrix = low_rank(30, 50, torch.tensor([3.0, 2.0, 1.0]).double())
    basis = leading_subspace(matrix, 8, side).basis
    assert basis.shape == ((30 if side == "left" else 50), 3)
    assert subspace_overlap(basis, left if side == "left" else right) == pytest.approx(1)


def test_zeros_have_no_direction():
    leading = leading_subspace(torch.zeros(4, 6), 2)
    assert leading.basis.shape == (4, 0)
    assert torch.equal(leading.sigma, torch.zeros(4).double())
    assert leading_subspace(torch.ones(4, 1), 3, "right").basis.shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_first(dtype):
    matrix = torch.randn(12, 10).to(dtype)
    assert torch.equal(leading_subspace(matrix, 2).sigma, singular_values(matrix.double()))


def test_no_rank_raises():
    with pytest.raises(ValueError, match="Expected `rank` of at least 1, got 0"):
        leading_subspace(torch.ones(2, 2), 0)


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-4, 0.5, 1.5, math.pi / 2])
def test_principal_angles_resolve_small_and_large_tilts(tilt):
    Qa = torch.eye(5, dtype=torch.float64)[:, :2]
    Qb = torch.zeros(5, 2, dtype=torch.float64)
    Qb[0, 0], Qb[2, 0], Qb[1, 1] = math.cos(tilt), math.sin(tilt), 1
    angles = principal_angles(Qa, Qb)
    assert angles.tolist() == pytest.approx([0, tilt], abs=1e-14)
    assert subspace_overlap(Qa, Qb).item() == pytest.approx((1 + math.cos(tilt) ** 2) / 2)


@pytest.mark.parametrize(("a", "b"), [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_principal_angles_equal_those_of_scipy(a, b):
    Qa, Qb = orthogonal(9, a, 1), orthogonal(9, b, 2)
    expected = np.sort(scipy.linalg.subspace_angles(Qa.numpy(), Qb.numpy()))
    np.testing.assert_allclose(principal_angles(Qa, Qb), expected, atol=1e-12)
    assert subspace_overlap(Qa, Qb).item() == pytest.approx((np.cos(expected) ** 2).mean())


def test_columns_that_are_not_orthonormal_raise():
    with pytest.raises(ValueError, match="orthonormal columns of `Qb`"):
        subspace_overlap(torch.eye(3), 2 * torch.eye(3))
