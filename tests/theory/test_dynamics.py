import math

import pytest
import torch

from masklr.theory import invariant_tail, saxe_mode


def orthogonal(size, seed):
    draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw)[0]


@pytest.fixture(scope="module")
def trained():
    """Layers of a deep linear network before and after 400 steps, and the rank of the first gradient."""
    size, depth, eps, lr, steps = 20, 3, 0.1, 0.05, 400
    left, right = orthogonal(size, 10), orthogonal(size, 11)
    target = left[:, :2] * torch.tensor([2.0, 1.5], dtype=torch.float64) @ right[:, :2].T
    start = [eps * orthogonal(size, seed) for seed in range(depth)]
    weights = [W.clone().requires_grad_() for W in start]
    gradient_rank = None
    for _ in range(steps):
        product = weights[2] @ weights[1] @ weights[0]
        gradients = torch.autograd.grad((product - target).square().sum() / 2, weights)
        if gradient_rank is None:
            gradient_rank = int((torch.linalg.svdvals(gradients[0]) > 1e-3).sum())
        with torch.no_grad():
            for W, gradient in zip(weights, gradients, strict=True):
                W -= lr * gradient
    return start, [W.detach() for W in weights], gradient_rank


def test_t14_all_but_four_singular_values_of_every_layer_are_the_invariant_tail(trained):
    start, weights, gradient_rank = trained
    tail = invariant_tail(0.1, 0.05, 0.0, depth=3, steps=400)
    assert tail.shape == (401,)
    assert tail[0] == 0.1
    assert tail[-1].item() == pytest.approx(0.0998009916, abs=1e-10)
    assert gradient_rank == 2  # at the start: the rest of the gradient is of size eps^5
    for W0, W in zip(start, weights, strict=True):
        sigma = torch.linalg.svdvals(W)
        assert int(((sigma - tail[-1]).abs() < 1e-9).sum()) >= 16
        update = torch.linalg.svdvals(W - W0)
        torch.testing.assert_close(update[4:], (0.1 - tail[-1]).expand(16), rtol=0, atol=1e-9)
        assert update[4].item() == pytest.approx(1.990e-4, abs=1e-7)
        assert update[1] > 100 * update[4]
        # 2^(1/3) and 1.5^(1/3): the target, shared by three balanced layers, up to the part that was there before.
        assert sigma[:2].tolist() == pytest.approx([2 ** (1 / 3), 1.5 ** (1 / 3)], abs=2e-3)


@pytest.mark.parametrize(("depth", "decay"), [(2, 0.0), (4, 0.1)])
def test_t14_tail_follows_descent_at_other_depths_and_with_weight_decay(depth, decay):
    size, eps, lr, steps = 9, 0.5, 0.02, 60
    target = torch.zeros(size, size, dtype=torch.float64)
    target[0, 0] = 1.0
    weights = [(eps * orthogonal(size, seed)).requires_grad_() for seed in range(depth)]
    optimizer = torch.optim.SGD(weights, lr=lr, weight_decay=decay)
    tail = invariant_tail(eps, lr, decay, depth, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (torch.linalg.multi_dot(weights[::-1]) - target).square().sum().div(2).backward()
        optimizer.step()
        sigma = torch.linalg.svdvals(weights[-1].detach())
        assert int(((sigma - tail[step + 1]).abs() < 1e-9).sum()) >= size - 2


def test_tail_without_learning_stands_still_and_a_single_layer_decays_to_zero():
    assert (invariant_tail(0.3, 0.0, 0.0, depth=3, steps=5) == 0.3).all()
    assert (invariant_tail(0.0, 0.1, 0.1, depth=3, steps=5) == 0).all()
    expected = 0.4 * 0.9 ** torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(invariant_tail(0.4, 0.1, 0.0, depth=1, steps=5), expected)


def test_t15_saxe_mode_is_what_gradient_flow_does():
    assert saxe_mode(3.0, 1e-3, 2.0).item() == pytest.approx(2.945721, abs=1e-6)
    step, sigma = 1e-4, 1e-3
    for _ in range(20_000):
        sigma += step * 2 * sigma * (3.0 - sigma)
    assert sigma == pytest.approx(saxe_mode(3.0, 1e-3, 2.0).item(), abs=1e-4)


def test_t15_descent_on_two_balanced_layers_learns_each_mode_on_its_own():
    s, start, lr, steps = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64), 0.01, 1e-3, 2000
    left, right = orthogonal(3, 1), orthogonal(3, 2)
    target = left * s @ right.T
    U, V = (math.sqrt(start) * x.clone() for x in (left, right))
    for _ in range(steps):
        error = U @ V.T - target
        U, V = U - lr * error @ V, V - lr * error.T @ U
    sigma = torch.linalg.svdvals(U @ V.T)
    torch.testing.assert_close(sigma, saxe_mode(s, start, lr * steps), rtol=0, atol=5e-3)


def test_saxe_mode_starts_at_sigma0_ends_at_s_and_broadcasts():
    s, t = torch.tensor([[4.0], [1.0], [0.0]]), torch.tensor([0.0, 1.0, 1e6])
    sigma = saxe_mode(s, 0.1, t)
    assert sigma.shape == (3, 3)
    assert sigma.dtype == torch.float64
    torch.testing.assert_close(sigma[:, 0], torch.full((3,), 0.1, dtype=torch.float64))
    assert sigma[:2, 2].tolist() == [4, 1]
    assert sigma[2].tolist() == pytest.approx([0.1, 0.1 / 1.2, 0.1 / (1 + 0.2e6)])


def test_saxe_mode_of_a_vanishing_target_tends_to_that_of_none():
    torch.testing.assert_close(saxe_mode(1e-12, 0.1, 5.0), saxe_mode(0.0, 0.1, 5.0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: saxe_mode(-1.0, 0.1, 1.0), "Expected finite `s` of at least 0, got values from -1.0 to -1.0."),
        (lambda: saxe_mode(1.0, 0.0, 1.0), "Expected `sigma0` above 0, got 0.0."),
        (lambda: saxe_mode(1.0, 0.1, -1.0), "Expected finite `t` of at least 0, got values from -1.0 to -1.0."),
        (lambda: saxe_mode(math.nan, 0.1, 1.0), "Expected finite `s` of at least 0, got values from nan to nan."),
        (lambda: saxe_mode(1.0, 0.1, math.inf), "Expected finite `t` of at least 0, got values from inf to inf."),
        (lambda: invariant_tail(-0.1, 0.1, 0, 3, 1), "Expected finite `eps` of at least 0, got -0.1."),
        (lambda: invariant_tail(0.1, -0.1, 0, 3, 1), "Expected finite `lr` of at least 0, got -0.1."),
        (lambda: invariant_tail(0.1, 0.1, math.nan, 3, 1), "Expected finite `weight_decay` of at least 0, got nan."),
        (lambda: invariant_tail(0.1, 0.1, 0, 0, 1), "Expected `depth` of at least 1 and `steps` of at least 0, got 0"),
        (lambda: invariant_tail(0.1, 0.1, 0, 3, -1), "Expected `depth` of at least 1 and `steps` of at least 0, got 3"),
        (lambda: invariant_tail(2.0, 0.1, 0, 3, 9), "Expected `lr` of at most 0.0625, above which the tail turns"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_that_names_it(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call()
