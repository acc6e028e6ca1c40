import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.spectra import (
    alpha_req,
    effective_rank,
    frobenius_norm,
    gram,
    hill_alpha,
    nuclear_rank,
    null_singular_values,
    numerical_rank,
    participation_ratio,
    rankme,
    singular_values,
    spectral_entropy,
    stable_rank,
)
from tests.spectra.examples import NORMS, RANKS, orthogonal

SHAPES = [(48, 48), (40, 90), (300, 33), (1, 50), (50, 1), (1, 1)]
DECAYS = {
    "flat": lambda r: torch.ones(r),
    "geometric": lambda r: torch.logspace(0, -8, r),
    "one small value": lambda r: torch.cat([torch.linspace(1, 0.5, r)[: r - 1], torch.tensor([2e-6])]),
    "power": lambda r: torch.arange(1, r + 1) ** -1.0,
    "rank one": lambda r: torch.eye(r)[0],
    "zero tail": lambda r: (torch.arange(r) <= r // 4).float(),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_measures_of_a_matrix_agree_with_a_float64_svd_to_six_digits(shape, decay, dtype):
    r = min(shape)
    matrix = (orthogonal(shape[0], r, 1) * DECAYS[decay](r).double() @ orthogonal(shape[1], r, 2).T).to(dtype)
    sigma = singular_values(matrix)
    expected = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))
    assert sigma.dtype == torch.float64
    assert sigma.shape == expected.shape
    assert (sigma.diff() <= 0).all()
    for measure in (spectral_entropy, stable_rank, nuclear_rank, effective_rank, *NORMS):
        assert measure(sigma).item() == pytest.approx(measure(expected).item(), rel=1e-6, abs=1e-12)
    ratio = participation_ratio(expected**2).item()
    assert participation_ratio(sigma**2).item() == pytest.approx(ratio, rel=1e-6)
    # The tail: numpy's values above a millionth of the first, and ours; both must find the same ones.
    tail = expected[expected > 1e-6 * expected[0]]
    assert numerical_rank(sigma, rtol=1e-6) == len(tail)
    assert numerical_rank(sigma) == (tail > 1e-3 * tail[0]).sum()
    for measure in (alpha_req, hill_alpha):
        try:
            exact = measure(tail**2, rtol=0.0).item()
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)[:20]):
                measure(sigma**2)
        else:
            assert measure(sigma**2).item() == pytest.approx(exact, rel=1e-6, abs=1e-12)


@given(
    shape=st.sampled_from([(7, 7), (4, 9), (9, 4), (1, 5), (5, 1)]),
    decay=st.sampled_from(["flat", "geometric", "power", "zero tail"]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-150, 1e-20, -0.3, 7.0, 1e20, 1e150]),
)
@settings(max_examples=40, deadline=None)
def test_measures_of_a_matrix_do_not_change_if_it_is_scaled_and_rotated(shape, decay, seed, scale):
    r = min(shape)
    left, right = orthogonal(shape[0], r, seed), orthogonal(shape[1], r, seed + 1)
    sigma = singular_values(left * DECAYS[decay](r).double() @ right.T)
    turned = orthogonal(shape[0], shape[0], seed + 2) @ left * DECAYS[decay](r).double() @ right.T
    moved = singular_values(scale * turned @ orthogonal(shape[1], shape[1], seed + 3))
    for measure in (*RANKS, spectral_entropy, rankme):
        assert measure(moved).item() == pytest.approx(measure(sigma).item(), rel=1e-6)
    for measure in NORMS:
        assert measure(moved).item() / abs(scale) == pytest.approx(measure(sigma).item(), rel=1e-6)
    if decay in ("geometric", "power") and r > 2:
        assert alpha_req(moved**2).item() == pytest.approx(alpha_req(sigma**2).item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 40), (20, 60), (60, 20)])
def test_integer_matrix_of_rank_one_reads_one(shape):
    # Its rounding is exactly zero in every type, so that the entropy must be too; a float32 Gram matrix reads 1.2.
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.randint(-8, 8, (n,), generator=generator).float() for n in shape)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        sigma = singular_values(torch.outer(column, row).to(dtype))
        assert effective_rank(sigma).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_singular_values_scale_with_the_matrix(scale):
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(singular_values(matrix * scale) / scale, singular_values(matrix), rtol=1e-12)


def test_singular_values_of_zeros_are_zero():
    assert singular_values(torch.zeros(3, 5)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_singular_values_of_a_matrix_that_is_not_finite_raise(bad):
    matrix = torch.ones(3, 3)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="finite entries"):
        singular_values(matrix)
    with pytest.raises(ValueError, match="with entries"):
        singular_values(torch.zeros(0, 3))


def test_singular_values_do_not_touch_the_matrix_or_need_its_gradient():
    matrix = torch.randn(5, 5, requires_grad=True)
    before = matrix.detach().clone()
    assert not singular_values(matrix).requires_grad
    assert torch.equal(matrix, before)


def test_singular_values_survive_solvers_that_do_not_converge(monkeypatch):
    def failing(*_):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-12)
    monkeypatch.setattr(torch.linalg, "svdvals", failing)
    with pytest.warns(UserWarning, match="did not converge"):
        np.testing.assert_allclose(singular_values(matrix), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (9000, 4), (3, 300), (40, 513), (0, 4)])
def test_gram_equals_the_product_and_is_exactly_symmetric(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = gram(x)
    np.testing.assert_allclose(result, x.double().numpy().T @ x.double().numpy(), rtol=1e-10, atol=1e-10)
    assert torch.equal(result, result.T)


@pytest.mark.parametrize(("rows", "cols"), [(60, 60), (400, 20), (20, 400), (3, 5)])
@pytest.mark.parametrize("centered", [False, True])
def test_null_spectrum_is_distributed_as_that_of_gaussian_matrices(rows, cols, centered):
    def values(sigma: torch.Tensor) -> list[float]:
        return [effective_rank(sigma).item(), stable_rank(sigma).item(), frobenius_norm(sigma).item()]

    generator = torch.Generator().manual_seed(0)
    ours, direct = [], []
    for seed in range(150):
        ours.append(values(null_singular_values(rows, cols, centered=centered, seed=seed)))
        x = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
        direct.append(values(torch.linalg.svdvals(x - x.mean(0) if centered else x)))
    ours, direct = torch.tensor(ours), torch.tensor(direct)
    error = ((ours.var(0) + direct.var(0)) / 150).sqrt()
    assert ((ours.mean(0) - direct.mean(0)).abs() < 5 * error).all()
    assert ((ours.std(0) / direct.std(0)).log().abs() < 5 / math.sqrt(150)).all()


def test_null_spectrum_has_the_shape_of_the_matrix_and_a_zero_where_centering_takes_a_direction():
    assert null_singular_values(5, 8).shape == null_singular_values(8, 5).shape == (5,)
    assert (null_singular_values(5, 8) > 0).all()
    assert null_singular_values(5, 8, centered=True)[-1] == 0
    assert (null_singular_values(5, 8, centered=True)[:-1] > 0).all()
    assert (null_singular_values(9, 8, centered=True) > 0).all()


def test_null_spectrum_is_kept_but_not_shared_and_touches_no_generator():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = null_singular_values(30, 10)
    first.zero_()
    second = null_singular_values(30, 10)
    assert (second > 0).all()
    assert not torch.equal(second, null_singular_values(30, 10, seed=1))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_null_spectrum_of_a_million_samples_is_nearly_flat():
    assert effective_rank(null_singular_values(10**6, 64)).item() == pytest.approx(64, rel=1e-4)


def test_null_spectrum_without_samples_raises():
    with pytest.raises(ValueError, match="at least 2"):
        null_singular_values(1, 4, centered=True)
