import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from masklr.theory import (
    covariance_penalty,
    deep_dropout_factor,
    deep_dropout_penalty,
    dropblock_penalty,
    dropconnect_penalty,
    dropout_penalty,
    fixed_count_penalty,
    gauss_newton_penalty,
    mask_variance,
)

PROBABILITIES = [0.1, 0.5, 0.9]


def expected_loss(U, V, C, masks, chances, target):
    """Expectation of E|target x - U diag(mask) V^T x|^2 over the given masks."""
    errors = target - (U * masks[:, None]) @ V.T
    return chances @ torch.einsum("kij,jl,kil->k", errors, C, errors)


def excess(U, V, C, masks, chances, target):
    """The same, minus that without a mask."""
    one = torch.ones(1, dtype=torch.float64)
    return expected_loss(U, V, C, masks, chances, target) - expected_loss(U, V, C, one.expand(1, 6), one, target)


@pytest.fixture(params=["identity", "full", "singular"])
def problem(request, draw, second_moment):
    """U (3, 6), V (4, 6), C and a target (3, 4)."""
    C = {"identity": None, "full": second_moment(4), "singular": second_moment(4, rank=2)}[request.param]
    return draw(3, 6, seed=1), draw(4, 6, seed=2), C, draw(3, 4, seed=3)


def whole(C):
    return torch.eye(4, dtype=torch.float64) if C is None else C


# ------------------------------------------------------------------------------------------------ two layers


@pytest.mark.parametrize("p", PROBABILITIES)
def test_t1_dropout_penalty_is_the_expectation_over_all_masks(problem, every_keep, p):
    U, V, C, target = problem
    keep, chances = every_keep(6, p)
    expected = excess(U, V, whole(C), keep / (1 - p), chances, target)
    torch.testing.assert_close(dropout_penalty(U, V, p, C), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
def test_t1_dropblock_penalty_is_the_expectation_over_all_masks(problem, every_keep, p, block_size):
    U, V, C, target = problem
    blocks, chances = every_keep(6 // block_size, p)
    masks = blocks.repeat_interleave(block_size, 1) / (1 - p)
    expected = excess(U, V, whole(C), masks, chances, target)
    torch.testing.assert_close(dropblock_penalty(U, V, p, block_size, C), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("keep_count", [1, 2, 5, 6])
def test_t1_fixed_count_penalty_is_the_mean_over_all_subsets(problem, every_keep, keep_count):
    U, V, C, target = problem
    keep, _ = every_keep(6, 0.5)
    masks = keep[keep.sum(1) == keep_count] * (6 / keep_count)
    expected = excess(U, V, whole(C), masks, torch.full((len(masks),), 1 / len(masks), dtype=torch.float64), target)
    # Nothing is dropped at 6: the expectation is then the difference of equal losses, 0 up to rounding.
    torch.testing.assert_close(fixed_count_penalty(U, V, keep_count, C), expected, rtol=1e-10, atol=1e-11)
    assert keep_count < 6 or fixed_count_penalty(U, V, keep_count, C) == 0


@pytest.mark.parametrize("window", [1, 2, 3])
def test_t1_overlapping_blocks_are_a_covariance(problem, every_keep, window):
    U, V, C, target = problem
    gamma = 0.3
    seeds, chances = every_keep(6 + window - 1, gamma)  # zero where a seed is
    masks = seeds.unfold(1, window, 1).prod(2) / (1 - gamma) ** window
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    covariance = (1 - gamma) ** -(window - distance).clamp(min=0).double() - 1
    expected = excess(U, V, whole(C), masks, chances, target)
    torch.testing.assert_close(covariance_penalty(U, V, covariance, C), expected, rtol=1e-10, atol=0)


def test_t1_overlapping_blocks_on_a_grid_overlap_in_both_directions(problem, every_keep):
    U, V, C, target = problem  # six units on a grid of 2 x 3
    gamma, window = 0.2, 2
    seeds, chances = every_keep(3 * 4, gamma)
    windows = seeds.view(-1, 3, 4).unfold(1, window, 1).unfold(2, window, 1)
    masks = windows.prod(-1).prod(-1).flatten(1) / (1 - gamma) ** window**2
    row, column = torch.arange(6) // 3, torch.arange(6) % 3
    shared = [(window - (axis[:, None] - axis).abs()).clamp(min=0) for axis in (row, column)]
    covariance = (1 - gamma) ** -(shared[0] * shared[1]).double() - 1
    expected = excess(U, V, whole(C), masks, chances, target)
    torch.testing.assert_close(covariance_penalty(U, V, covariance, C), expected, rtol=1e-10, atol=0)


def test_t1_gaussian_masks_of_the_same_variance_have_the_penalty_of_dropout(problem):
    U, V, C, target = problem
    # Gauss-Hermite: two points at +-1 give the mean of every polynomial of degree 3, and the loss has degree 2.
    p, signs = 0.8, 2 * torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 6) - 1
    masks = 1 + signs * math.sqrt(mask_variance(p))
    expected = excess(U, V, whole(C), masks, torch.full((64,), 1 / 64, dtype=torch.float64), target)
    torch.testing.assert_close(dropout_penalty(U, V, p, C), expected, rtol=1e-10, atol=0)


def test_special_cases_of_two_layers_agree(problem, roots):
    U, V, C, _ = problem
    p, identity = 0.3, torch.eye(6, dtype=torch.float64)
    dropout = dropout_penalty(U, V, p, C)
    same = [
        dropblock_penalty(U, V, p, 1, C),
        covariance_penalty(U, V, mask_variance(p) * identity, C),
        deep_dropout_penalty([V.T, U], p, C),
        dropconnect_penalty([V.T, U], [0.0, p], C),
    ]
    for other in same:
        torch.testing.assert_close(other, dropout, rtol=1e-12, atol=0)
    one_block = mask_variance(p) * (U @ V.T @ roots(whole(C))).square().sum()
    torch.testing.assert_close(dropblock_penalty(U, V, p, 6, C), one_block, rtol=1e-8, atol=0)


def test_t2_dropout_of_torch_in_training_has_the_penalty_and_a_variant_without_scaling_another(draw):
    U, V, X = draw(2, 4, seed=1), draw(3, 4, seed=2), draw(5, 3, seed=3)
    p, count = 0.75, 100_000
    target, C = draw(5, 2, seed=4), X.T @ X / 5
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Dropout(p), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(V.T)
        network[2].weight.copy_(U)
        torch.manual_seed(0)
        losses = (network(X.repeat(count, 1)) - target.repeat(count, 1)).square().sum(1).view(count, 5).mean(1)
        clean = (network.eval()(X) - target).square().sum(1).mean()
    measured, error = losses.mean() - clean, losses.std() / math.sqrt(count)
    assert abs(measured - dropout_penalty(U, V, p, C)) < 4 * error
    # One reading of p as the probability to keep, or of the scale, would be seen.
    assert abs(measured - dropout_penalty(U, V, 1 - p, C)) > 20 * error


def test_t2_masks_that_are_not_scaled_shrink_the_product_and_have_theta_times_one_minus_theta(problem, every_keep):
    U, V, C, target = problem
    p = 0.3
    theta = 1 - p
    keep, chances = every_keep(6, p)
    error = target - theta * U @ V.T
    expected = (error @ whole(C) * error).sum() + theta**2 * dropout_penalty(U, V, p, C)
    torch.testing.assert_close(expected_loss(U, V, whole(C), keep, chances, target), expected, rtol=1e-10, atol=0)


def test_penalty_of_a_nonlinear_last_hidden_layer_is_exact(draw, every_keep):
    X, U, p = draw(7, 3, seed=1), draw(2, 5, seed=2), 0.6
    target, hidden = draw(7, 2, seed=3), torch.relu(draw(7, 3, seed=1) @ draw(3, 5, seed=4))
    keep, chances = every_keep(5, p)
    losses = ((hidden * keep[:, None] / (1 - p)) @ U.T - target).square().sum(2).mean(1)
    expected = chances @ losses - (hidden @ U.T - target).square().sum(1).mean()
    penalty = dropout_penalty(U, torch.eye(5, dtype=torch.float64), p, hidden.T @ hidden / len(X))
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------------ nonlinear networks


def test_gauss_newton_penalty_of_a_squared_loss_is_the_exact_one(draw):
    U, hidden, p = draw(3, 5, seed=1), torch.relu(draw(8, 5, seed=2)), 0.35
    curvature = 2 * torch.eye(3, dtype=torch.float64).expand(8, 3, 3)
    penalty = gauss_newton_penalty(U.expand(8, 3, 5), curvature, hidden, p)
    exact = dropout_penalty(U, torch.eye(5, dtype=torch.float64), p, hidden.T @ hidden / 8)
    torch.testing.assert_close(penalty, exact, rtol=1e-13, atol=0)


def test_t19_gauss_newton_penalty_of_cross_entropy_becomes_exact_as_weights_vanish(draw, every_keep):
    hidden, directions, p = torch.relu(draw(16, 6, seed=1)), draw(4, 6, seed=2), 0.1
    labels = torch.arange(16) % 4
    keep, chances = every_keep(6, p)

    def ratio(scale):
        U = scale * directions
        masked = (hidden * keep[:, None] / (1 - p)) @ U.T
        losses = nn.functional.cross_entropy(masked.flatten(0, 1), labels.repeat(64), reduction="none")
        clean = nn.functional.cross_entropy(hidden @ U.T, labels)
        q = (hidden @ U.T).softmax(1)
        curvature = torch.diag_embed(q) - q[:, :, None] * q[:, None]
        approximate = gauss_newton_penalty(U.expand(16, 4, 6), curvature, hidden, p)
        return ((chances @ losses.view(64, 16).mean(1) - clean) / approximate).item()

    errors = [abs(ratio(scale) - 1) for scale in (0.3, 0.1, 0.03, 0.01)]
    assert errors[0] < 0.05
    # The next term has the third moment of the mask: the error is of first order in the scale.
    for larger, smaller, step in zip(errors, errors[1:], (3, 10 / 3, 3), strict=False):
        assert larger / smaller > 0.75 * step


# ------------------------------------------------------------------------------------------------ numbers and types


def test_mask_variance_is_p_over_one_minus_p():
    assert [mask_variance(p) for p in (0, 0.5, 0.2, 0.75)] == [0, 1, 0.25, 3]


def two_layers(p, U, V, C):
    return [
        dropout_penalty(U, V, p, C),
        dropblock_penalty(U, V, p, 2, C),
        deep_dropout_penalty([V.T, U], p, C),
        dropconnect_penalty([V.T, U], p, C),
        gauss_newton_penalty(U[None], torch.eye(len(U)).to(U)[None], V[:1], p),
    ]


def test_no_mask_has_exactly_no_penalty(draw, second_moment):
    values = two_layers(0, draw(3, 6, seed=1), draw(4, 6, seed=2), second_moment(4))
    assert all(value == 0 for value in values)
    assert deep_dropout_penalty([draw(2, 3)], 0.5) == 0


def test_nothing_cancels_at_a_tiny_p(draw, second_moment):
    U, V, C = draw(3, 6, seed=1), draw(4, 6, seed=2), second_moment(4)
    for small, tiny in zip(two_layers(1e-12, U, V, C), two_layers(1e-13, U, V, C), strict=True):
        torch.testing.assert_close(small, 10 * tiny, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_are_computed_in_float64_whatever_comes_in(draw, second_moment, dtype):
    arguments = [x.to(dtype) for x in (draw(3, 6, seed=1), draw(4, 6, seed=2))]
    C = second_moment(4).to(dtype)  # symmetric still
    narrow, wide = two_layers(0.4, *arguments, C), two_layers(0.4, *(x.double() for x in arguments), C.double())
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float64
        assert a == b


def test_penalties_are_differentiable_in_the_weights(draw, second_moment):
    U, V, W = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 4), (3, 4), (4, 4)]))
    C = second_moment(3)
    covariance = second_moment(4)
    assert gradcheck(lambda U, V: dropout_penalty(U, V, 0.3, C), (U, V))
    assert gradcheck(lambda U, V: dropblock_penalty(U, V, 0.3, 2, C), (U, V))
    assert gradcheck(lambda U, V: fixed_count_penalty(U, V, 3, C), (U, V))
    assert gradcheck(lambda U, V: covariance_penalty(U, V, covariance, C), (U, V))
    assert gradcheck(lambda U, V, W: dropconnect_penalty([V.T, W, U], [0.2, 0.5, 0.0], C), (U, V, W))
    assert gradcheck(lambda U, V, W: deep_dropout_penalty([V.T, W, U], [0.2, 0.5], C), (U, V, W))
    dropout_penalty(U.float(), V.float(), 0.3).backward()
    assert U.grad.dtype == torch.float64


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value, for which a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_second_moment_is_looked_at_once_and_again_when_it_has_changed(draw, second_moment, unchecked):
    U, V, C = draw(3, 6, seed=1), draw(4, 6, seed=2), second_moment(4)
    counts = []
    for _ in range(2):
        with Waits() as waits:
            two_layers(0.5, U, V, C)
        counts.append(waits.count)
    assert counts[0] > 0
    assert counts[1] == 0
    C[0, 1] = 100.0
    with pytest.raises(ValueError, match="symmetric `C`"):
        dropout_penalty(U, V, 0.5, C)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_p_outside_its_range_is_refused(draw, p):
    U, V = draw(3, 6), draw(4, 6)
    calls = [
        lambda: mask_variance(p),
        lambda: dropout_penalty(U, V, p),
        lambda: dropblock_penalty(U, V, p, 2),
        lambda: dropconnect_penalty([V.T, U], [0.5, p]),
        lambda: deep_dropout_penalty([V.T, U], [p]),
        lambda: deep_dropout_penalty([V.T], p),
        lambda: deep_dropout_factor([3, 4], p),
        lambda: gauss_newton_penalty(torch.ones(1, 2, 3), torch.ones(1, 2, 2), torch.ones(1, 3), p),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"Expected `p` in \[0, 1\), got"):
            call()


def test_what_does_not_fit_is_refused_in_one_sentence_that_names_it(draw, unchecked):
    U, V, W = draw(3, 6), draw(4, 6), draw(3, 3)
    asymmetric = torch.eye(4, dtype=torch.float64)
    asymmetric[0, 1] = 1e-3
    infinite = torch.diag(torch.tensor([1.0, 1.0, math.inf, 1.0]))
    for call, sentence in [
        (lambda: dropblock_penalty(U, V, 0.5, 4), "Expected `block_size` to divide the width 6, got 4."),
        (lambda: dropblock_penalty(U, V, 0.5, 0), "Expected `block_size` to divide the width 6, got 0."),
        (lambda: fixed_count_penalty(U, V, 0), "Expected `keep_count` from 1 to the width 6, got 0."),
        (lambda: fixed_count_penalty(U, V, 7), "Expected `keep_count` from 1 to the width 6, got 7."),
        (lambda: dropout_penalty(U, W, 0.5), "Expected `U` and `V` with the same number of columns, got 6 and 3."),
        (lambda: dropout_penalty(U, V, 0.5, torch.eye(3)), "Expected `C` of the size of the input, 4, got 3."),
        (lambda: dropout_penalty(U, V, 0.5, torch.ones(4, 3)), r"Expected a square `C`, got the shape \(4, 3\)."),
        (lambda: dropout_penalty(U, V, 0.5, asymmetric), "Expected symmetric `C`, got entries that differ by 0.001"),
        (lambda: dropout_penalty(U, V, 0.5, infinite), "Expected finite `C`, got the largest magnitude inf."),
        (lambda: dropout_penalty(U, V, 0.5, infinite * math.nan), "Expected finite `C`, got the largest magnitude nan"),
        (lambda: covariance_penalty(U, V, torch.eye(4)), "Expected `covariance` of the width 6, got the shape"),
        (lambda: dropconnect_penalty([V.T, U], [0.5]), "Expected `p` with one probability a layer, 2, got 1."),
        (lambda: deep_dropout_penalty([V.T, U], [0.5, 0.5]), "Expected `p` with one probability a hidden layer, 1"),
        (lambda: dropconnect_penalty([U, V.T], 0.5), r"Expected `weights` \(out, in\) of at least one layer"),
        (lambda: deep_dropout_penalty([], 0.5), r"Expected `weights` \(out, in\) of at least one layer"),
        (lambda: deep_dropout_penalty([V.T, U[0]], 0.5), r"Expected `weights` \(out, in\) of at least one layer"),
        (lambda: dropconnect_penalty([V.T, U], 0.5, torch.eye(6)), "Expected `C` of the size of the input, 4, got 6."),
        (lambda: deep_dropout_factor([3, 0], 0.5), r"Expected `widths` of at least 1, got \[3, 0\]."),
        (
            lambda: gauss_newton_penalty(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 4), 0.5),
            r"Expected `output_hessian` of shape \(2, 3, 3\), got \(2, 3, 4\).",
        ),
        (
            lambda: gauss_newton_penalty(torch.ones(2, 3, 4), torch.ones(2, 3, 3), torch.ones(2, 3), 0.5),
            r"Expected `activations` of shape \(2, 4\), got \(2, 3\).",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^{sentence}"):
            call()


def test_a_weight_that_is_not_a_number_shows_in_the_result(draw):
    U, V = draw(3, 6), draw(4, 6)
    U[0, 0] = math.nan
    assert all(value.isnan() for value in two_layers(0.5, U, V, None)[:4])
