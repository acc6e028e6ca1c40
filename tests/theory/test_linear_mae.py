import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.masks import num_masked
from masklr.spectra import effective_rank, stable_rank
from masklr.theory import linear_mae


def autoregressive(size, decay=0.9):
    position = torch.arange(size, dtype=torch.float64)
    return decay ** (position[:, None] - position).abs()


def all_masks(size, mask_ratio, patch_size, exact_count):
    """Every mask of the coordinates, zeros and ones, with its probability and the probability to be kept."""
    num_patches = size // patch_size
    keep = torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_patches)), dtype=torch.float64)
    if exact_count:
        visible = num_patches - num_masked(num_patches, mask_ratio)
        keep = keep[keep.sum(1) == visible]
        chances = torch.full((len(keep),), 1 / len(keep), dtype=torch.float64)
        theta = visible / num_patches
    else:
        theta = 1 - mask_ratio
        chances = (theta ** keep.sum(1)) * mask_ratio ** (num_patches - keep.sum(1))
    return keep.repeat_interleave(patch_size, 1), chances, theta


def expected_loss(W, C, keep, chances, theta, loss_on):
    """Expectation of |x - W (mask x / theta)|^2 over the given masks, on the coordinates that count."""
    errors = torch.eye(len(C), dtype=torch.float64) - W * (keep / theta)[:, None]
    squares = torch.einsum("kij,jl,kil->ki", errors, C, errors)
    counted = 1 - keep if loss_on == "masked" else torch.ones_like(keep)
    return chances @ (squares * counted).sum(1)


def least_squares(C, keep, chances, theta, loss_on):
    """The best map by the normal equations of each output, every mask spelled out."""
    W = torch.zeros_like(C)
    for i in range(len(C)):
        weight = chances * (1 - keep[:, i] if loss_on == "masked" else 1)
        inputs = torch.einsum("k,ki,kj->ij", weight, keep, keep) * C / theta**2
        W[i] = torch.linalg.pinv(inputs, hermitian=True) @ ((weight @ keep) / theta * C[i])
    return W


CASES = [
    (6, 1, 0.5, False),
    (6, 1, 0.5, True),
    (6, 1, 0.85, True),  # one visible
    (6, 1, 0.15, True),  # one masked
    (8, 2, 0.25, False),
    (8, 2, 0.75, True),
    (10, 2, 0.4, True),
    (6, 3, 0.5, True),  # two patches
]


@pytest.mark.parametrize("loss_on", ["all", "masked"])
@pytest.mark.parametrize(("size", "patch_size", "mask_ratio", "exact_count"), CASES)
def test_map_and_loss_are_those_of_least_squares_over_all_masks(
    second_moment, size, patch_size, mask_ratio, exact_count, loss_on
):
    C = second_moment(size)
    masks = all_masks(size, mask_ratio, patch_size, exact_count)
    W, loss = linear_mae(C, mask_ratio, patch_size, loss_on, exact_count=exact_count)
    torch.testing.assert_close(loss, expected_loss(W, C, *masks, loss_on), rtol=1e-10, atol=0)
    torch.testing.assert_close(W, least_squares(C, *masks, loss_on), rtol=1e-8, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    patches=st.integers(2, 5),
    patch_size=st.integers(1, 2),
    mask_ratio=st.floats(0.05, 0.95),
    exact_count=st.booleans(),
    loss_on=st.sampled_from(["all", "masked"]),
    rank=st.integers(1, 11),
    seed=st.integers(0, 999),
)
def test_no_other_map_has_a_lower_loss_whatever_the_rank_of_the_inputs(
    second_moment, draw, patches, patch_size, mask_ratio, exact_count, loss_on, rank, seed
):
    size = patches * patch_size
    if exact_count:
        mask_ratio = min(max(round(patches * mask_ratio), 1), patches - 1) / patches
    C = second_moment(size, seed=seed, rank=min(rank, size + 1))
    masks = all_masks(size, mask_ratio, patch_size, exact_count)
    W, loss = linear_mae(C, mask_ratio, patch_size, loss_on, exact_count=exact_count)
    torch.testing.assert_close(loss, expected_loss(W, C, *masks, loss_on), rtol=1e-8, atol=1e-10 * C.trace().item())
    best = W.clone().requires_grad_()
    expected_loss(best, C, *masks, loss_on).backward()  # convex: a zero gradient is the minimum
    assert best.grad.abs().max() < 1e-7 * C.trace() * (1 + W.abs().max())
    assert expected_loss(W + 0.1 * draw(size, size, seed=seed), C, *masks, loss_on) >= loss * (1 - 1e-9)


# ------------------------------------------------------------------------------------------------ printed values


def test_t11_two_coordinates():
    C = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    W, loss = linear_mae(C, 0.5)
    assert W.flatten().tolist() == pytest.approx([0.404762, 0.238095, 0.238095, 0.404762], abs=1e-6)
    assert torch.linalg.eigvalsh(W).tolist() == pytest.approx([1 / 6, 9 / 14], rel=1e-6)
    assert loss.item() == pytest.approx((C.double() - W @ C.double()).trace().item())
    masked, loss = linear_mae(C, 0.5, loss_on="masked")
    # .8 for inputs as they are; W is for inputs divided by 1/2, so half of it.
    assert (masked / 0.5).flatten().tolist() == pytest.approx([0, 0.8, 0.8, 0], rel=1e-6)
    # Masked with its neighbor visible: 1 - .64; with its neighbor masked: 1.
    assert loss.item() == pytest.approx(2 * (0.25 * 0.36 + 0.25 * 1), rel=1e-6)


@pytest.mark.parametrize(
    ("theta", "weight", "loss"), [(0.25, 0.285714, 0.5625), (0.5, 0.2, 0.325), (0.75, 0.153846, 0.149038)]
)
def test_t12_equicorrelated_coordinates(theta, weight, loss):
    C = torch.full((8, 8), 0.5, dtype=torch.float64).fill_diagonal_(1)
    W, total = linear_mae(C, 1 - theta, loss_on="masked")
    expected = torch.full((8, 8), weight, dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(W / theta, expected, rtol=0, atol=1e-6)
    assert total.item() / 8 == pytest.approx(loss, abs=1e-6)
    found = least_squares(C, *all_masks(8, 1 - theta, 1, False), "masked")
    torch.testing.assert_close(W, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bottleneck", [1, 3])
@pytest.mark.parametrize(("patch_size", "exact_count"), [(1, False), (2, False), (2, True)])
def test_t13_bottleneck_by_descent_over_all_masks(minimum, second_moment, patch_size, exact_count, bottleneck):
    size = 8
    C = second_moment(size)
    W, loss = linear_mae(C, 0.5, patch_size, bottleneck=bottleneck, exact_count=exact_count)
    masks = all_masks(size, 0.5, patch_size, exact_count)
    torch.testing.assert_close(loss, expected_loss(W, C, *masks, "all"), rtol=1e-10, atol=0)
    assert int((torch.linalg.svdvals(W) > 1e-9).sum()) == bottleneck

    # The loss is a quadratic of W, so its value at 0 and its two derivatives give it at once.
    keep, chances, theta = masks
    second = torch.einsum("k,ki,kj->ij", chances, keep, keep) / theta**2 * C

    def objective(decoder, encoder):
        product = decoder @ encoder
        return C.trace() - 2 * (product * C).sum() + (product @ second * product).sum()

    lowest, _ = minimum(objective, [(size, bottleneck), (bottleneck, size)], seeds=2, scale=0.3)
    assert lowest == pytest.approx(loss.item(), rel=1e-9)


def test_t13_loss_of_a_bottleneck_is_what_its_directions_leave(second_moment):
    C, patches = second_moment(6), torch.arange(6) // 2
    blocks = torch.where(patches[:, None] == patches, C, 0)
    explained = torch.linalg.eigvalsh(C @ torch.linalg.solve(C + 3 * blocks, C)).flip(0)
    for bottleneck in range(1, 7):
        loss = linear_mae(C, 0.75, 2, bottleneck=bottleneck).loss
        torch.testing.assert_close(loss, C.trace() - explained[:bottleneck].sum(), rtol=1e-11, atol=0)
    torch.testing.assert_close(linear_mae(C, 0.75, 2, bottleneck=6).W, linear_mae(C, 0.75, 2).W)


def test_rank_falls_smoothly_with_the_ratio_and_input_masks_cut_nothing():
    C, ratios = autoregressive(32), [0.01, 0.25, 0.5, 0.75, 0.9, 0.99]
    sigma = [torch.linalg.svdvals(linear_mae(C, ratio).W) for ratio in ratios]
    printed = [31.94, 25.35, 19.53, 14.11, 10.33, 7.23]
    assert [effective_rank(s).item() for s in sigma] == pytest.approx(printed, abs=6e-3)
    printed = [27.1, 7.21, 4.26, 2.69, 1.90, 1.41]
    assert [stable_rank(s).item() for s in sigma] == pytest.approx(printed, abs=5.1e-2)
    sigma = [torch.linalg.svdvals(linear_mae(C, ratio, patch_size=4).W) for ratio in ratios]
    printed = [31.95, 28.58, 26.71, 25.06, 23.66, 22.41]
    assert [effective_rank(s).item() for s in sigma] == pytest.approx(printed, abs=6e-3)
    # White inputs are all shrunk alike, however many are masked; no direction is lost.
    white = linear_mae(torch.eye(5), 0.9).W
    torch.testing.assert_close(white, 0.1 * torch.eye(5, dtype=torch.float64))
    for ratio in ratios:
        eigenvalues = torch.linalg.eigvalsh(C)
        shrunk = torch.linalg.eigvalsh(linear_mae(C, ratio).W)
        torch.testing.assert_close(shrunk, eigenvalues / (eigenvalues + ratio / (1 - ratio)), rtol=1e-9, atol=0)
        assert (shrunk > 0).all()


def test_an_exact_count_is_another_problem_than_independent_masks():
    C = autoregressive(16)
    for loss_on in ("all", "masked"):
        independent, exact = (linear_mae(C, 0.75, loss_on=loss_on, exact_count=e).loss for e in (False, True))
        assert 0.19 < independent / exact - 1 < 0.27


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2, 6])
def test_nothing_masked_is_the_identity_with_no_loss(second_moment, patch_size, exact_count):
    W, loss = linear_mae(second_moment(6), 0, patch_size, exact_count=exact_count)
    torch.testing.assert_close(W, torch.eye(6, dtype=torch.float64))
    assert loss == 0
    principal = torch.linalg.eigvalsh(second_moment(6))
    narrow = linear_mae(second_moment(6), 0, patch_size, bottleneck=2, exact_count=exact_count).loss
    torch.testing.assert_close(narrow, principal[:4].sum(), rtol=1e-12, atol=0)  # principal components


def test_loss_of_few_masks_keeps_its_digits(second_moment):
    C = second_moment(6)
    torch.testing.assert_close(linear_mae(C, 1e-13).loss, 1e-13 * C.trace(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss_on", ["all", "masked"])
@pytest.mark.parametrize("rank", [21, 7])
def test_constant_pixels_change_nothing_for_the_others(second_moment, loss_on, rank):
    small, C = second_moment(20, rank=rank), torch.zeros(24, 24, dtype=torch.float64)
    inner, constant = torch.arange(24)[torch.arange(24) % 6 != 1], torch.tensor([1, 7, 13, 19])
    C[inner[:, None], inner] = small
    W, loss = linear_mae(C, 0.6, loss_on=loss_on)
    alone, alone_loss = linear_mae(small, 0.6, loss_on=loss_on)
    torch.testing.assert_close(W[inner[:, None], inner], alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, alone_loss, rtol=1e-10, atol=0)
    assert max(W[constant].abs().max(), W[:, constant].abs().max()) < 1e-15


@pytest.mark.parametrize("loss_on", ["all", "masked"])
@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_coordinate_share_its_weight(second_moment, loss_on, exact_count, seed):
    small, ones = second_moment(6, seed=seed), torch.ones(3, 3, dtype=torch.float64)
    W, loss = linear_mae(torch.kron(small, ones), 0.5, 3, loss_on, exact_count=exact_count)
    alone, alone_loss = linear_mae(small, 0.5, 1, loss_on, exact_count=exact_count)
    torch.testing.assert_close(W, torch.kron(alone, ones / 3), rtol=1e-9, atol=1e-11)  # the map of least norm
    torch.testing.assert_close(loss, 3 * alone_loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss_on", ["all", "masked"])
def test_a_single_copy_is_noticed(second_moment, loss_on, seed):
    order = torch.tensor([0, 1, 2, 3, 4, 4])
    C = second_moment(5, seed=seed)[order[:, None], order]
    # Rounding may leave a Cholesky factor with a last pivot of some 1e-16, and a map of any size.
    W = linear_mae(C, 0.5, 2, loss_on).W
    torch.testing.assert_close(W[:, 4], W[:, 5], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(W[4], W[5], rtol=1e-8, atol=1e-10)


def test_regressions_by_one_inverse_equal_those_patch_by_patch(monkeypatch, second_moment):
    C = second_moment(12)
    together = [linear_mae(C, 0.5, size, "masked", exact_count=exact) for size in (1, 3) for exact in (False, True)]
    # The package holds a function of the module's name.
    monkeypatch.setattr(sys.modules["masklr.theory.linear_mae"], "_cholesky", lambda Q: None)
    apart = [linear_mae(C, 0.5, size, "masked", exact_count=exact) for size in (1, 3) for exact in (False, True)]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.W, b.W, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-11, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    factor=st.floats(1e-6, 1e6),
    mask_ratio=st.floats(0.05, 0.95),
    loss_on=st.sampled_from(["all", "masked"]),
    bottleneck=st.none() | st.integers(1, 4),
)
def test_map_is_free_of_scale_and_loss_has_the_unit_of_the_second_moment(
    second_moment, factor, mask_ratio, loss_on, bottleneck
):
    C, options = second_moment(4), {"loss_on": loss_on, "bottleneck": None if loss_on == "masked" else bottleneck}
    plain, scaled = linear_mae(C, mask_ratio, **options), linear_mae(factor * C, mask_ratio, **options)
    torch.testing.assert_close(scaled.W, plain.W, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scaled.loss, factor * plain.loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float64_whatever_comes_in(dtype):
    C = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    W, loss = linear_mae(C.to(dtype), 0.5)
    assert W.dtype == loss.dtype == torch.float64
    assert torch.equal(W, linear_mae(C.double(), 0.5).W)


def test_a_gram_of_few_samples_in_float32_is_positive_enough():
    samples = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    C = samples.T @ samples / 5
    assert torch.linalg.eigvalsh(C)[0] < 0
    narrow, wide = linear_mae(C, 0.5), linear_mae(samples.double().T @ samples.double() / 5, 0.5)
    torch.testing.assert_close(narrow.loss, wide.loss, rtol=1e-5, atol=0)


def test_an_eigenvalue_that_rounding_made_negative_is_read_as_zero():
    C = torch.ones(2, 2, dtype=torch.float64)
    C[0, 1] = C[1, 0] = 1 + 1e-7  # eigenvalues 2 and -1e-7; the masks' noise all but cancels the second
    W, loss = linear_mae(C, 1.001e-7)
    torch.testing.assert_close(torch.linalg.eigvalsh(W), torch.tensor([0, 1], dtype=torch.float64), rtol=0, atol=1e-6)
    assert loss.item() == pytest.approx(1.001e-7, rel=1e-5)


# ------------------------------------------------------------------------------------------------ bad input


def changed(row, col, value):
    C = torch.eye(4, dtype=torch.float64)
    C[row, col] = value
    return C


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"Expected `mask_ratio` in \[0, 1\), got 1.0."),
        ({"mask_ratio": -0.1}, r"Expected `mask_ratio` in \[0, 1\), got -0.1."),
        ({"mask_ratio": math.nan}, r"Expected `mask_ratio` in \[0, 1\), got nan."),
        ({"patch_size": 3}, "Expected `patch_size` to divide the number of coordinates 4, got 3."),
        ({"patch_size": 0}, "Expected `patch_size` to divide the number of coordinates 4, got 0."),
        ({"loss_on": "visible"}, "Expected `loss_on` to be all or masked, got visible."),
        ({"bottleneck": 0}, "Expected `bottleneck` from 1 to the number of coordinates 4, got 0."),
        ({"bottleneck": 5}, "Expected `bottleneck` from 1 to the number of coordinates 4, got 5."),
        (
            {"bottleneck": 2, "loss_on": "masked"},
            "Expected no `bottleneck` with the loss on masked coordinates, got 2.",
        ),
        ({"mask_ratio": 0, "loss_on": "masked"}, "Expected `mask_ratio` above 0 with the loss on masked coordinates"),
        (
            {"mask_ratio": 0.9, "exact_count": True},
            "Expected `mask_ratio` to leave visible and masked patches, got 0.9",
        ),
        (
            {"mask_ratio": 0.1, "exact_count": True},
            "Expected `mask_ratio` to leave visible and masked patches, got 0.1",
        ),
        ({"C": torch.ones(4, 3)}, r"Expected a square `C`, got the shape \(4, 3\)."),
        ({"C": torch.ones(0, 0)}, r"Expected a square `C`, got the shape \(0, 0\)."),
        ({"C": changed(0, 0, math.inf)}, "Expected finite `C`, got the largest magnitude inf."),
        ({"C": changed(0, 1, 0.1)}, "Expected symmetric `C`, got entries that differ by 0.1 from their mirror images."),
        ({"C": changed(2, 2, -0.1)}, "Expected positive semi-definite `C`, got an eigenvalue of -0.1."),
        ({"C": -torch.eye(4)}, "Expected positive semi-definite `C`, got an eigenvalue of -1."),
    ],
)
def test_bad_input_is_refused_in_one_sentence_that_names_it(unchecked, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        linear_mae(**{"C": torch.eye(4), "mask_ratio": 0.5, **arguments})
