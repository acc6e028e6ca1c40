import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.theory import (
    deep_dropout_factor,
    deep_dropout_penalty,
    dropconnect_penalty,
    dropout_penalty,
    mask_variance,
)


def masked_excess(weights, masks, chances, C):
    """Expectation of E|f(x)|^2 over masks of every layer (batched over the first axis), minus that without masks."""
    product = torch.eye(weights[0].shape[1], dtype=torch.float64)
    masked = product
    for W, layer_masks in zip(weights, masks, strict=True):
        product, masked = W @ product, (W * layer_masks) @ masked
    energies = torch.einsum("kij,jl,kil->k", masked, C, masked)
    return chances @ energies - (product @ C * product).sum()


def test_t7_dropconnect_penalty_of_three_layers_is_the_expectation_over_all_masks(draw, second_moment, every_keep):
    shapes, p = [(3, 2), (2, 3), (1, 2)], [0.2, 0.5, 0.7]
    weights = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    each = [value for value, shape in zip(p, shapes, strict=True) for _ in range(shape[0] * shape[1])]
    keep, chances = every_keep(14, each)
    parts = (keep / (1 - torch.tensor(each, dtype=torch.float64))).split([a * b for a, b in shapes], 1)
    masks = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    C = second_moment(2)
    expected = masked_excess(weights, masks, chances, C)
    torch.testing.assert_close(dropconnect_penalty(weights, p, C), expected, rtol=1e-10, atol=0)


def test_t7_two_layers_have_the_expanded_formula(draw, second_moment):
    U, V, C, p = draw(3, 5, seed=1), draw(4, 5, seed=2), second_moment(4), 0.4
    variance, written = mask_variance(p), U.square().sum(0)
    inputs = (V * (C @ V)).sum(0)
    entries = (V.square() * C.diagonal()[:, None]).sum(0)
    last = variance * (written * inputs).sum()
    first = variance * (written * entries).sum()
    both = variance * (written * (inputs + (1 + variance) * entries)).sum()
    weights = [V.T, U]
    for value, expected in [([0, p], last), ([p, 0], first), (p, both), ([p, p], both)]:
        torch.testing.assert_close(dropconnect_penalty(weights, value, C), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(last, dropout_penalty(U, V, p, C), rtol=1e-13, atol=0)
    assert abs(first / last - 1) > 0.05  # the first layer differs unless C is diagonal
    diagonal = torch.diag(C.diagonal())
    torch.testing.assert_close(
        dropconnect_penalty(weights, [p, 0], diagonal), dropout_penalty(U, V, p, diagonal), rtol=1e-13, atol=0
    )


def test_t7_a_single_layer_is_weighted_ridge(draw, second_moment):
    W, C = draw(3, 4), second_moment(4)
    expected = mask_variance(0.3) * (W.square() * C.diagonal()).sum()
    torch.testing.assert_close(dropconnect_penalty([W], 0.3, C), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("sizes", "p"), [([2, 3, 4, 2], [0.2, 0.7]), ([3, 2, 3, 2, 2], [0.5, 0.1, 0.8])])
def test_t8_deep_dropout_penalty_is_the_expectation_over_all_masks(draw, second_moment, every_keep, sizes, p):
    weights = [draw(b, a, seed=i) for i, (a, b) in enumerate(pairwise(sizes))]
    hidden = sizes[1:-1]
    each = [value for value, width in zip(p, hidden, strict=True) for _ in range(width)]
    keep, chances = every_keep(sum(hidden), each)
    parts = (keep / (1 - torch.tensor(each, dtype=torch.float64))).split(hidden, 1)
    masks = [torch.ones(1, 1, 1, dtype=torch.float64), *(part[:, None] for part in parts)]
    C = second_moment(sizes[0])
    expected = masked_excess(weights, masks, chances, C)
    torch.testing.assert_close(deep_dropout_penalty(weights, p, C), expected, rtol=1e-10, atol=0)


@settings(max_examples=40, deadline=None)
@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=3), p=st.floats(0.01, 0.95), seed=st.integers(0, 99))
def test_t8_deep_dropout_penalty_is_at_least_the_factor_times_the_squared_nuclear_norm(
    draw, second_moment, roots, widths, p, seed
):
    sizes = [3, *widths, 4]
    weights = [draw(b, a, seed=seed + i) for i, (a, b) in enumerate(pairwise(sizes))]
    C = second_moment(3, seed=seed)
    product = weights[0]
    for W in weights[1:]:
        product = W @ product
    bound = deep_dropout_factor(widths, p) * torch.linalg.svdvals(product @ roots(C)).sum().square()
    assert deep_dropout_penalty(weights, p, C) >= bound * (1 - 1e-7)


@pytest.mark.parametrize("widths", [[4], [3, 5], [2, 3, 4]])
def test_t8_a_map_of_rank_one_with_equal_units_reaches_the_bound(widths):
    sizes = [3, *widths, 2]
    weights = [torch.ones(b, a, dtype=torch.float64) for a, b in pairwise(sizes)]
    norm = math.sqrt(3 * 2) * math.prod(widths)
    expected = torch.tensor(deep_dropout_factor(widths, 0.6) * norm**2, dtype=torch.float64)
    torch.testing.assert_close(deep_dropout_penalty(weights, 0.6), expected, rtol=1e-12, atol=0)


def test_t8_factor_of_one_hidden_layer_is_variance_over_width_and_grows_with_depth():
    assert deep_dropout_factor([7], 0.75) == pytest.approx(3 / 7, rel=1e-14)
    assert deep_dropout_factor([5, 5], 0.5) == pytest.approx(0.44, rel=1e-14)
    assert deep_dropout_factor([5, 4], [0.5, 0.75]) == pytest.approx(1.2 * 1.75 - 1, rel=1e-14)
    assert deep_dropout_factor([10**6] * 2, 1e-9) == pytest.approx(2e-15, rel=1e-8, abs=0)  # 1 + 1e-15 would lose it


def test_t9_deep_dropout_leaves_rank_one_and_more_than_the_bound_on_other_maps(minimum):
    shapes = [(5, 2), (5, 5), (2, 5)]

    def objective(target):
        def loss(*weights):
            return (target - weights[2] @ weights[1] @ weights[0]).square().sum() + deep_dropout_penalty(weights, 0.5)

        return loss

    value, weights = minimum(objective(torch.diag(torch.tensor([4.0, 1.0]).double())), shapes, scale=0.5)
    sigma = torch.linalg.svdvals(weights[2] @ weights[1] @ weights[0])
    assert value == pytest.approx(5.888889, abs=1e-6)
    assert sigma.tolist() == pytest.approx([2.777778, 0], abs=1e-4)
    value, weights = minimum(objective(torch.diag(torch.tensor([4.0, 3.0]).double())), shapes, seeds=5, scale=0.5)
    sigma = torch.linalg.svdvals(weights[2] @ weights[1] @ weights[0])
    assert value == pytest.approx(11.9893, abs=1e-4)  # the bound's minimum is 11.4681
    assert sigma.tolist() == pytest.approx([2.2969, 1.2744], abs=1e-3)
