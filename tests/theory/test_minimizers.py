import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from masklr.theory import (
    critical_variances,
    dropblock_penalty,
    k_support_norm,
    mask_variance,
    shrunk_spectrum,
    shrunk_value,
)

PRINTED = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
SPECTRA = st.lists(st.floats(1e-2, 1e2) | st.just(0.0) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
KAPPAS = st.floats(1e-3, 1e3)


def bisected(f, target, low, high):
    """Where a growing function reaches a value."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < target else (low, middle)
    return high


def brute_spectrum(s, kappa, k):
    """The minimizer and its value from its stationarity, by bisection: section 4 of Pal et al."""
    if k >= (s > 0).sum():
        return s / (1 + kappa), (s.square() * kappa / (1 + kappa)).sum()

    def eta(c):
        return (c * s - kappa).clamp(0, 1)

    c = bisected(lambda c: eta(c).sum(), k, 0.0, 2 * (1 + kappa) / s[s > 0].min().item())
    # |s - sigma|^2 + kappa sigma^2 / eta at sigma = s eta / (eta + kappa)
    return s * eta(c) / (eta(c) + kappa), (s.square() * kappa / (eta(c) + kappa)).sum()


def thresholded(s, kappa):
    """The minimizer for dropout as in Cavazza et al.: the largest rank whose last value is above the threshold."""
    ordered = s.sort(descending=True).values
    for rank in range(len(s), 0, -1):
        alpha = kappa / (1 + kappa * rank) * ordered[:rank].sum()
        if ordered[rank - 1] > alpha:
            lost = ordered[rank:].square().sum()
            return (s - alpha).clamp(min=0), lost + kappa * ordered[:rank].sum().square() / (1 + rank * kappa)
    return torch.zeros_like(s), s.square().sum()


# ------------------------------------------------------------------------------------------------ printed values


DROPOUT = [
    pytest.param(4, 1, 0.75, 0.0, (1.9, 0.9, 0, 0), 19.7, 0.7, id="t3"),
    pytest.param(4, 1, 0.9, 0.0, (1.136364, 0.136364, 0, 0), 25.045455, 0.318182, id="t3b"),
    pytest.param(4, 1, 0.5, 0.0, (2.714286, 1.714286, 0.714286, 0), 12.571429, 9 / 7, id="t3c"),
    pytest.param(8, 2, 0.5, 0.0, (3.166667, 2.166667, 1.166667, 0.166667), 8.333333, None, id="t6-kappa-0.25"),
    pytest.param(12, 2, 0.75, 0.0, (8 / 3, 7 / 4, 3 / 4, 0), 12.583333, None, id="t6-kappa-0.5"),
    pytest.param(8, 2, 0.8, 0.0, (2, 4 / 3, 1 / 3, 0), 17.333333, None, id="t6-kappa-1"),
    pytest.param(6, 1, 0.5, 0.3, (2.8, 1.8, 0.8, 0), None, 0.9, id="t10"),
    pytest.param(8, 2, 0.5, 0.3, (2.96, 1.966667, 0.966667, 0), None, None, id="t10-groups"),
    pytest.param(12, 2, 0.75, 0.5, (2.333333, 1.5, 0.5, 0), None, None, id="t10-groups-strong"),
]


@pytest.mark.parametrize(("width", "block_size", "p", "weight_decay", "sigma", "value", "product"), DROPOUT)
def test_t3_t6_t10_closed_form_has_the_printed_values(width, block_size, p, weight_decay, sigma, value, product):
    kappa = mask_variance(p) * block_size / width
    assert shrunk_spectrum(PRINTED, kappa, block_size, weight_decay).tolist() == pytest.approx(sigma, abs=1e-4)
    if value is not None:
        assert shrunk_value(PRINTED, kappa, block_size, weight_decay).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("width", "block_size", "p", "weight_decay", "sigma", "value", "product"), DROPOUT)
def test_t3_t6_t10_descent_on_the_penalized_loss_finds_the_closed_form(
    minimum, width, block_size, p, weight_decay, sigma, value, product
):
    target = torch.diag(PRINTED)

    def loss(U, V):
        decay = weight_decay * (U.square().sum() + V.square().sum())
        return (target - U @ V.T).square().sum() + dropblock_penalty(U, V, p, block_size) + decay

    kappa = mask_variance(p) * block_size / width
    lowest, (U, V) = minimum(loss, [(4, width), (4, width)], seeds=4)
    assert lowest == pytest.approx(shrunk_value(PRINTED, kappa, block_size, weight_decay).item(), abs=1e-8)
    found, predicted = torch.linalg.svdvals(U @ V.T), shrunk_spectrum(PRINTED, kappa, block_size, weight_decay)
    torch.testing.assert_close(found, predicted, rtol=0, atol=1e-5 if block_size == 1 else 1e-4)
    pieces = torch.stack([u @ v.T for u, v in zip(U.split(block_size, 1), V.split(block_size, 1), strict=True)])
    norms = torch.linalg.matrix_norm(pieces)
    torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=1e-3, atol=0)
    assert product is None or norms.mean().item() == pytest.approx(product, abs=1e-5)


@pytest.mark.parametrize(("rank", "critical"), [(4, 2 / 3), (3, 8 / 3), (2, 12)])
def test_t4_rank_drops_at_the_critical_variances(rank, critical):
    assert critical_variances(PRINTED, 4)[rank - 2].item() == pytest.approx(critical, rel=1e-14)
    below, above = (int((shrunk_spectrum(PRINTED, critical / 4 * f) > 0).sum()) for f in (1 - 1e-6, 1 + 1e-6))
    assert (below, above) == (rank, rank - 1)


def test_t4_critical_variances_of_another_width_are_in_proportion():
    assert critical_variances(PRINTED, 6).tolist() == pytest.approx([18, 4, 1], rel=1e-14)
    assert critical_variances(PRINTED.flip(0), 6).tolist() == pytest.approx([18, 4, 1], rel=1e-14)


@pytest.mark.parametrize("seed", range(2))
def test_t5_sgd_with_real_masks_learns_the_shrunk_spectrum(seed):
    C, p, steps = PRINTED.square(), 0.75, 4000
    x = torch.diag((4 * C).sqrt()).repeat(16, 1)  # second moment C exactly: all noise is of the masks
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(p), nn.Linear(4, 4, bias=False)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    average = torch.zeros(4, 4, dtype=torch.float64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + 10 * step / steps)
        loss = (x - net(x)).square().sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps // 2:
            average += (net[2].weight @ net[0].weight).detach() / (steps - steps // 2)
    predicted = shrunk_spectrum(C.sqrt(), mask_variance(p) / 4)
    assert predicted.tolist() == pytest.approx([1.9, 0.9, 0, 0], abs=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(average * C.sqrt()), predicted, rtol=0, atol=0.03)
    eigenvalues = torch.linalg.eigvals(average).real.sort(descending=True).values
    assert eigenvalues.tolist() == pytest.approx([0.475, 0.3, 0, 0], abs=0.03)


# ------------------------------------------------------------------------------------------------ negative controls


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_no_mask_shrinks_nothing(block_size):
    assert torch.equal(shrunk_spectrum(PRINTED, 0, block_size), PRINTED)
    assert shrunk_value(PRINTED, 0, block_size) == 0
    assert shrunk_value(PRINTED, 0, width=2) == 5


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 8), level=st.floats(1e-3, 1e3), kappa=KAPPAS, block_size=st.integers(1, 4))
def test_flat_spectrum_is_shrunk_but_never_cut(count, level, kappa, block_size):
    flat = torch.full((count,), level, dtype=torch.float64)
    sigma = shrunk_spectrum(flat, kappa, block_size)
    # All directions are alike: each has the share block_size / count of the blocks.
    expected = flat / (1 + kappa * max(1, count / block_size))
    torch.testing.assert_close(sigma, expected, rtol=1e-9, atol=1e-13 * level)
    assert (sigma > 0).all()
    assert (critical_variances(flat, count) == math.inf).all()


@pytest.mark.parametrize("kappa", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("block_size", [4, 5])
def test_blocks_as_large_as_the_rank_divide_all_values_alike(kappa, block_size):
    torch.testing.assert_close(shrunk_spectrum(PRINTED, kappa, block_size), PRINTED / (1 + kappa), rtol=1e-14, atol=0)
    with_zeros = torch.cat([PRINTED, torch.zeros(3)])
    assert torch.equal(shrunk_spectrum(with_zeros, kappa, block_size)[:4], PRINTED / (1 + kappa))


def test_weight_decay_alone_is_soft_thresholding():
    assert shrunk_spectrum(PRINTED, 0, weight_decay=1.5).tolist() == [2.5, 1.5, 0.5, 0]
    assert shrunk_value(PRINTED, 0, weight_decay=1.5).item() == pytest.approx(3 * 1.5**2 + 1 + 3 * 4.5)
    assert shrunk_spectrum(PRINTED, 1.0, weight_decay=9.0).tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------ properties


@settings(max_examples=60, deadline=None)
@given(s=SPECTRA, kappa=KAPPAS, block_size=st.integers(1, 5))
@example(s=torch.tensor([4.0, 0.1, 0.1], dtype=torch.float64), kappa=0.5, block_size=1)
@example(s=torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), kappa=1.0, block_size=1)  # a value on the threshold
@example(s=torch.tensor([4.0, 4.0, 1.0, 1.0], dtype=torch.float64), kappa=0.7, block_size=2)
def test_shrunk_spectrum_and_value_equal_bisection(s, kappa, block_size):
    sigma, value = brute_spectrum(s, kappa, block_size)
    scale = s.max().item()
    torch.testing.assert_close(shrunk_spectrum(s, kappa, block_size), sigma, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(shrunk_value(s, kappa, block_size), value, rtol=1e-9, atol=0)


@settings(max_examples=60, deadline=None)
@given(s=SPECTRA, kappa=KAPPAS)
def test_blocks_of_one_have_the_threshold_of_dropout(s, kappa):
    sigma, value = thresholded(s, kappa)
    torch.testing.assert_close(shrunk_spectrum(s, kappa), sigma, rtol=0, atol=1e-12 * s.max().item())
    torch.testing.assert_close(shrunk_value(s, kappa), value, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    s=SPECTRA,
    kappa=KAPPAS,
    block_size=st.integers(1, 4),
    decay=st.floats(0, 3),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_no_perturbation_of_the_shrunk_spectrum_is_better(s, kappa, block_size, decay, seed, data):
    size = data.draw(st.sampled_from([1e-3, 1e-1, 1.0]))
    noise = torch.randn(len(s), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sigma = shrunk_spectrum(s, kappa, block_size, decay)
    other = (sigma + size * noise).clamp(min=0)
    penalty = kappa * k_support_norm(other, block_size).square() + 2 * decay * other.sum()
    objective = (s - other).square().sum() + penalty
    assert shrunk_value(s, kappa, block_size, decay) <= objective * (1 + 1e-10)


@settings(max_examples=50, deadline=None)
@given(s=SPECTRA, kappa=KAPPAS, block_size=st.integers(1, 4), decay=st.floats(0, 3), factor=st.floats(1e-6, 1e6))
def test_everything_scales_with_the_target(s, kappa, block_size, decay, factor):
    sigma = shrunk_spectrum(s, kappa, block_size, decay)
    scaled = shrunk_spectrum(factor * s, kappa, block_size, factor * decay)
    torch.testing.assert_close(scaled, factor * sigma, rtol=0, atol=1e-11 * factor * s.max().item())
    value = shrunk_value(factor * s, kappa, block_size, factor * decay)
    torch.testing.assert_close(value, factor**2 * shrunk_value(s, kappa, block_size, decay), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(s=SPECTRA, kappa=KAPPAS, block_size=st.integers(1, 4), seed=st.integers(0, 999))
def test_order_in_is_order_out(s, kappa, block_size, seed):
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))
    sigma = shrunk_spectrum(s, kappa, block_size)
    torch.testing.assert_close(
        shrunk_spectrum(s[order], kappa, block_size), sigma[order], rtol=0, atol=1e-12 * s.max().item()
    )
    torch.testing.assert_close(
        shrunk_value(s[order], kappa, block_size), shrunk_value(s, kappa, block_size), rtol=1e-12, atol=0
    )


@settings(max_examples=50, deadline=None)
@given(s=SPECTRA, width=st.integers(1, 10), p=st.floats(0.01, 0.99))
def test_rank_is_the_number_of_critical_variances_above_the_masks(s, width, p):
    assume(s.any())
    critical, variance = critical_variances(s, width), mask_variance(p)
    assume(not critical.isclose(torch.tensor(variance, dtype=torch.float64), rtol=1e-9).any())
    sigma = shrunk_spectrum(s.sort(descending=True).values[:width], variance / width)
    # Equal singular values leave rounding of the threshold, but no direction.
    assert int((sigma > 1e-13 * s.max()).sum()) == 1 + int((critical > variance).sum())


@pytest.mark.parametrize("kappa", [1e-12, 1e-6, 1e6, 1e12])
def test_extreme_coefficients_keep_their_digits(kappa):
    for block_size in (1, 2, 3):
        sigma, value = shrunk_spectrum(PRINTED, kappa, block_size), shrunk_value(PRINTED, kappa, block_size)
        assert (sigma[:block_size] > 0).all()
        if kappa < 1:  # the first order: every direction is lowered in proportion to the gradient of the norm
            norm = k_support_norm(PRINTED, block_size).square()
            torch.testing.assert_close(value, kappa * norm, rtol=1e-5, atol=0)
        else:  # all but 1 / kappa is lost
            torch.testing.assert_close(value, PRINTED.square().sum(), rtol=1e-5, atol=0)
            assert sigma.sum() < 20 / kappa + 1e-14


# ------------------------------------------------------------------------------------------------ norms and widths


@settings(max_examples=50, deadline=None)
@given(w=SPECTRA, k=st.integers(1, 9))
def test_k_support_norm_is_the_minimum_over_shares(w, k):
    if k >= (w > 0).sum():
        expected = w.square().sum()
    else:
        eta = (bisected(lambda c: (c * w).clamp(max=1).sum(), k, 0.0, 2 / w[w > 0].min().item()) * w).clamp(max=1)
        expected = (w[w > 0].square() / eta[w > 0]).sum()
    torch.testing.assert_close(k_support_norm(w, k).square(), expected, rtol=1e-10, atol=0)


@settings(max_examples=50, deadline=None)
@given(w=SPECTRA)
def test_k_support_norm_goes_from_the_nuclear_to_the_frobenius_norm(w):
    norms = torch.stack([k_support_norm(w, k) for k in range(1, len(w) + 2)])
    torch.testing.assert_close(norms[0], w.sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(norms[-1], torch.linalg.vector_norm(w), rtol=1e-14, atol=0)
    assert (norms[1:] <= norms[:-1] * (1 + 1e-14)).all()


def test_values_beyond_the_width_are_lost_whole():
    kappa = 0.5
    assert shrunk_value(PRINTED.flip(0), kappa, width=2) == shrunk_value(PRINTED[:2], kappa) + 5
    assert shrunk_value(PRINTED, kappa, width=7) == shrunk_value(PRINTED, kappa)


def test_critical_variances_beyond_the_rank_or_the_width_are_zero():
    assert critical_variances(torch.tensor([3.0, 1.0, 0.0]), 3).tolist() == pytest.approx([1.5, 0])
    assert critical_variances(PRINTED, 3).tolist() == pytest.approx([9, 2, 0])
    assert critical_variances(torch.zeros(3), 3).tolist() == [0, 0]
    assert critical_variances(torch.tensor([2.0]), 3).tolist() == []
    assert critical_variances(torch.tensor([0.3, 0.1 + 0.2 - 0.3 + 0.3, 0.1]), 3)[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float64_whatever_comes_in(dtype):
    narrow = PRINTED.to(dtype)
    assert torch.equal(shrunk_spectrum(narrow, 0.75), shrunk_spectrum(PRINTED, 0.75))
    for value in (shrunk_value(narrow, 0.75), k_support_norm(narrow, 2), critical_variances(narrow, 4)):
        assert value.dtype == torch.float64


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: shrunk_spectrum(-PRINTED, 1.0), "Expected non-negative `s`, got -4.0."),
        (lambda: shrunk_spectrum(PRINTED / 0, 1.0), "Expected finite `s`, got values from inf to inf."),
        (lambda: shrunk_spectrum(PRINTED[:0], 1.0), "Expected `s` with at least one value, got none."),
        (lambda: shrunk_spectrum(PRINTED, -1.0), "Expected finite `kappa` of at least 0, got -1.0."),
        (lambda: shrunk_spectrum(PRINTED, math.inf), "Expected finite `kappa` of at least 0, got inf."),
        (lambda: shrunk_spectrum(PRINTED, math.nan), "Expected finite `kappa` of at least 0, got nan."),
        (lambda: shrunk_spectrum(PRINTED, 1.0, 0), "Expected `block_size` of at least 1, got 0."),
        (lambda: shrunk_spectrum(PRINTED, 1.0, 1, -0.1), "Expected finite `weight_decay` of at least 0, got -0.1."),
        (lambda: shrunk_value(PRINTED * math.nan, 1.0), "Expected finite `s`, got values from nan to nan."),
        (lambda: shrunk_value(PRINTED, 1.0, width=0), "Expected `width` of at least 1, got 0."),
        (lambda: k_support_norm(PRINTED, 0), "Expected `k` of at least 1, got 0."),
        (lambda: k_support_norm(-PRINTED, 1), "Expected non-negative `sigma`, got -4.0."),
        (lambda: critical_variances(PRINTED, 0), "Expected `width` of at least 1, got 0."),
        (lambda: critical_variances(-PRINTED, 4), "Expected non-negative `s`, got -4.0."),
    ],
)
def test_bad_input_is_refused_in_one_sentence_that_names_it(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        call()
