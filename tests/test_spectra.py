import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr import spectra
from masklr.spectra import (
    MEASURES,
    alpha_req,
    effective_rank,
    energy_rank,
    frobenius_norm,
    gram,
    hill_alpha,
    lidar,
    measures,
    nuclear_norm,
    nuclear_rank,
    null_singular_values,
    numerical_rank,
    participation_ratio,
    principal_angles,
    rankme,
    singular_values,
    spectral_entropy,
    spectral_norm,
    stable_rank,
    subspace_overlap,
)

PRINTED = torch.tensor([4.0, 3.0, 2.0, 1.0])
NORMS = [nuclear_norm, frobenius_norm, spectral_norm]
RANKS = [effective_rank, stable_rank, nuclear_rank, numerical_rank, participation_ratio]
SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(torch.tensor)


def orthogonal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw)[0]


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (stable_rank(PRINTED), 1.875),
        (nuclear_rank(PRINTED), 3.333333),
        (participation_ratio(PRINTED**2), 2.542373),
        (effective_rank(PRINTED), 3.596115),
        (effective_rank(PRINTED**2), 2.940198),
        (spectral_entropy(PRINTED), 0.923220),
        (energy_rank(PRINTED, 0.90), 3),
        (energy_rank(PRINTED, 0.95), 3),
        (energy_rank(PRINTED, 0.99), 4),
        (alpha_req(torch.arange(1.0, 101.0) ** -1.5), 1.5),
        (hill_alpha(torch.arange(1.0, 101.0) ** -1.5, k=50), 1.692806),
        (
            lidar(torch.diag(torch.tensor([4.0, 2, 1, 1])), torch.diag(torch.tensor([1.0, 1, 1, 4])), delta=0.0),
            2.923377,
        ),
        (rankme(torch.eye(512)[0]), 1.000824),
        (rankme(torch.ones(512)), 512.137),
    ],
)
def test_measures_have_their_printed_values(value, printed):
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(printed, rel=1e-6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("size", [1, 2, 64, 4096])
def test_rank_of_flat_spectrum_is_its_length(rank, size):
    assert rank(torch.full((size,), 0.3)).item() == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_rank_of_one_direction_is_exactly_one(rank):
    assert rank(torch.eye(4096)[7] * 1e-30).item() == 1


@given(sigma=SPECTRA, scale=st.sampled_from([1e-30, 0.1, 1.0, 1e30]))
@settings(max_examples=50, deadline=None)
def test_ranks_are_bounded_and_do_not_depend_on_scale_order_or_zeros(sigma, scale):
    padded = torch.cat([sigma.flip(0).double() * scale, torch.zeros(3, dtype=torch.float64)])
    for rank in RANKS:
        value = rank(sigma).item()
        assert 1 - 1e-12 <= value <= len(sigma) * (1 + 1e-12)
        assert rank(padded).item() == pytest.approx(value, rel=1e-9)


@given(sigma=SPECTRA)
@settings(max_examples=50, deadline=None)
def test_measures_equal_a_loop_in_plain_python(sigma):
    s = sorted((float(x) for x in sigma), reverse=True)
    total, energy = math.fsum(s), math.fsum(x * x for x in s)
    entropy = -math.fsum(x / total * math.log(x / total) for x in s)
    assert effective_rank(sigma).item() == pytest.approx(math.exp(entropy), rel=1e-9)
    assert spectral_entropy(sigma, normalized=False).item() == pytest.approx(entropy, abs=1e-9)
    assert stable_rank(sigma).item() == pytest.approx(energy / s[0] ** 2, rel=1e-9)
    assert nuclear_rank(sigma).item() == pytest.approx(total**2 / energy, rel=1e-9)
    assert nuclear_norm(sigma).item() == pytest.approx(total, rel=1e-9)
    assert frobenius_norm(sigma).item() == pytest.approx(math.sqrt(energy), rel=1e-9)
    assert spectral_norm(sigma).item() == s[0]
    assert numerical_rank(sigma, rtol=0.1) == sum(x > 0.1 * s[0] for x in s)


def test_spectral_entropy_of_one_value_is_one():
    assert spectral_entropy(torch.tensor([3.0])) == 1


@given(size=st.integers(1, 200), percent=st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_energy_rank_of_flat_spectrum_is_the_fraction_of_its_length_rounded_up(size, percent):
    assert energy_rank(torch.full((size,), 0.1), percent / 100) == -(-size * percent // 100)


@pytest.mark.parametrize("measure", [*RANKS, spectral_entropy, rankme, alpha_req, hill_alpha, spectra.normalized])
def test_a_measure_of_all_zeros_raises(measure):
    with pytest.raises(ValueError, match="got 5 zeros"):
        measure(torch.zeros(5))


def test_norms_of_all_zeros_are_zero():
    assert frobenius_norm(torch.zeros(5)) == nuclear_norm(torch.zeros(5)) == spectral_norm(torch.zeros(5)) == 0


@pytest.mark.parametrize(
    "measure", [*RANKS, rankme, alpha_req, hill_alpha, nuclear_norm, frobenius_norm, spectral_norm]
)
@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, -1e-9], "non-negative"), ([1.0, math.nan], "finite"), ([math.inf, 1.0], "finite"), ([], "at least one")],
)
def test_what_is_no_spectrum_raises(measure, values, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.tensor(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_measures_are_taken_in_float64(dtype):
    sigma = torch.full((2048,), 0.01, dtype=dtype)
    for rank in RANKS:
        assert rank(sigma).dtype == torch.float64
        assert rank(sigma).item() == pytest.approx(2048, rel=1e-12)


def test_rankme_is_the_effective_rank_without_its_epsilon():
    assert rankme(PRINTED, eps=0.0) == effective_rank(PRINTED)


def test_rankme_with_the_epsilon_of_a_peer_reads_what_the_peer_reads():
    # 1e-5 added after normalizing: the defect that the definition of the paper avoids.
    assert rankme(torch.eye(4096)[0], eps=1e-5).item() == pytest.approx(1.60, abs=0.005)


@pytest.mark.parametrize("decay", [0.99, 0.98])
def test_epsilon_of_the_paper_moves_a_decaying_spectrum_by_little_and_that_of_a_peer_by_percents(decay):
    sigma = decay ** torch.arange(768, dtype=torch.float64)
    assert rankme(sigma).item() == pytest.approx(effective_rank(sigma).item(), rel=2e-3)
    assert 1.01 < rankme(sigma, eps=1e-5).item() / effective_rank(sigma).item() < 1.1


def test_flat_spectrum_exceeds_the_dimension_by_an_epsilon_only_in_rankme():
    flat = torch.ones(768)
    assert rankme(flat, eps=1e-5).item() == pytest.approx(802, abs=0.5)
    assert rankme(flat).item() > 768.2
    assert effective_rank(flat).item() == pytest.approx(768, rel=1e-12)


def test_rankme_of_eigenvalues_would_be_another_number():
    assert rankme(PRINTED).item() == pytest.approx(3.596115, abs=1e-5)
    assert rankme(PRINTED**2).item() == pytest.approx(2.940198, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_alpha_req_recovers_the_exponent_and_fits_only_its_range(alpha):
    eigenvalues = torch.arange(1, 200, dtype=torch.float64) ** -alpha
    assert alpha_req(eigenvalues).item() == pytest.approx(alpha)
    bent = eigenvalues.clone()
    bent[50:] *= 1e-3
    assert alpha_req(torch.cat([bent, torch.zeros(9)]).flip(0), first=3, last=50).item() == pytest.approx(alpha)
    slope = np.polyfit(np.log(np.arange(1, 200)), np.log(bent.numpy()), 1)[0]
    assert alpha_req(bent).item() == pytest.approx(-slope)


def test_alpha_req_needs_two_eigenvalues():
    for eigenvalues in ([1.0, 0.0], [1.0, 1e-13]):
        with pytest.raises(ValueError, match="two eigenvalues above `rtol`"):
            alpha_req(torch.tensor(eigenvalues))
    with pytest.raises(ValueError, match=r"Expected `rtol` in \[0, 1\), got 1"):
        alpha_req(torch.ones(3), rtol=1.0)


@pytest.mark.parametrize("measure", [alpha_req, hill_alpha])
def test_power_laws_leave_out_what_rounding_spoils_unless_told(measure):
    eigenvalues = torch.arange(1, 101, dtype=torch.float64) ** -1.5
    noise = torch.logspace(-12.1, -16, 100, dtype=torch.float64)
    assert measure(torch.cat([noise, eigenvalues])) == measure(eigenvalues)
    assert abs(measure(torch.cat([noise, eigenvalues]), rtol=0.0) - measure(eigenvalues)) > 0.5


def test_hill_alpha_of_pareto_draws_is_the_density_exponent():
    draws = torch.from_numpy(np.random.default_rng(0).pareto(1.5, 200_000) + 1)
    assert hill_alpha(draws, k=100_000).item() == pytest.approx(2.5, abs=5 * 1.5 / math.sqrt(100_000))


def test_hill_alpha_without_a_tail_raises():
    with pytest.raises(ValueError, match="Expected `k`"):
        hill_alpha(torch.tensor([2.0, 1.0]), k=2)
    with pytest.raises(ValueError, match="got 3 equal ones"):
        hill_alpha(torch.ones(4))
    with pytest.raises(ValueError, match="got 3 equal ones"):
        hill_alpha(1 + torch.tensor([3e-16, 0, 2e-16, 0], dtype=torch.float64))


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


def test_measures_by_name_are_the_functions_in_the_order_asked_for():
    names = [*reversed(MEASURES), "energy_rank_80", "energy_rank_100"]
    values = measures(torch.arange(1.0, 101.0) ** -1.5, names)
    assert list(values) == names
    assert values["stable_rank"] == stable_rank(torch.arange(1.0, 101.0) ** -1.5).item()
    eigenvalues = torch.arange(1, 101, dtype=torch.float64) ** -3
    assert values["participation_ratio"] == pytest.approx(participation_ratio(eigenvalues).item(), rel=1e-6)
    assert values["energy_rank_100"] == 100


def test_measures_of_zeros_are_norms_only():
    assert measures(torch.zeros(4), ["stable_rank", "frobenius_norm", "effective_rank"]) == {"frobenius_norm": 0.0}


def test_measures_leave_out_the_power_law_of_a_spectrum_that_has_none():
    one = torch.tensor([1.0, 1e-8, 0.0])
    assert measures(one, ["stable_rank", "alpha_req", "hill_alpha"]) == {"stable_rank": pytest.approx(1)}
    assert measures(torch.ones(6), ["alpha_req", "hill_alpha"]) == {"alpha_req": pytest.approx(0, abs=1e-12)}
    assert list(measures(torch.tensor([1.0, 0.5]), ["alpha_req", "hill_alpha"])) == ["alpha_req", "hill_alpha"]


@pytest.mark.parametrize(("name", "nearest"), [("efective_rank", "effective_rank"), ("energy_rank_0", "energy_rank_9")])
def test_unknown_measure_raises_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"such as {nearest}.*, got '{name}'"):
        measures(PRINTED, [name])
