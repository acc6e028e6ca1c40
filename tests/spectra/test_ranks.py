import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr import spectra
from masklr.spectra import (
    alpha_req,
    effective_rank,
    energy_rank,
    frobenius_norm,
    hill_alpha,
    lidar,
    nuclear_norm,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    rankme,
    spectral_entropy,
    spectral_norm,
    stable_rank,
)
from tests.spectra.examples import PRINTED, RANKS

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(torch.tensor)


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
