import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masklr.moments import SecondMoment, ViewScatter, singular_values_from_gram
from masklr.probes import RidgeMoments
from masklr.spectra import (
    alpha_req,
    effective_rank,
    hill_alpha,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from tests.two_processes import in_two_processes


def features(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def moments_of(*batches: torch.Tensor):
    metric = SecondMoment()
    for batch in batches:
        metric.update(batch)
    return metric.compute()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_equal_numpy_in_float64(dtype):
    x = features(5000, 7).to(dtype)
    moments = moments_of(x)
    expected = x.double().numpy()
    assert moments.gram.dtype == moments.sum.dtype == torch.float64
    np.testing.assert_allclose(moments.gram, expected.T @ expected, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(moments.sum, expected.sum(0), rtol=1e-11)
    np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-11)
    np.testing.assert_allclose(moments.centered_gram / 4999, np.cov(expected.T), rtol=1e-9, atol=1e-12)
    assert moments.count == 5000


def test_one_feature_keeps_its_axes():
    metric = SecondMoment()
    metric.update(torch.tensor([[1.0], [3.0]]))
    for copied in (metric, pickle.loads(pickle.dumps(metric))):
        moments = copied.compute()
        assert moments.gram.shape == (1, 1)
        assert moments.singular_values().tolist() == pytest.approx([math.sqrt(2)])


@pytest.mark.parametrize("dim", [1, 6])
def test_scatter_of_views_equals_sums_by_hand_whatever_the_batches(dim):
    views = torch.randn(3, 20, dim, generator=torch.Generator().manual_seed(0)) + 2
    scatter = ViewScatter()
    for part in views.split([13, 7], dim=1):
        scatter.update(part)
    between, within, count = scatter.compute()
    x = views.double().numpy()
    means = x.mean(0)
    np.testing.assert_allclose(between, np.cov(means.T, bias=True).reshape(dim, dim), rtol=1e-9, atol=1e-12)
    deviations = (x - means).reshape(-1, dim)
    np.testing.assert_allclose(within, deviations.T @ deviations / 60, rtol=1e-9, atol=1e-12)
    assert count == 20


def test_scatter_of_images_that_are_alike_is_zero_and_one_view_raises():
    scatter = ViewScatter()
    scatter.update((features(3, 4)[:, None] + 0.7).expand(3, 50, 4))
    between, within, _ = scatter.compute()
    assert not between.any()
    assert within.any()
    with pytest.raises(ValueError, match="at least 2 `views` of an image, got 1"):
        scatter.update(features(1, 4)[None])


@given(cuts=st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=25, deadline=None)
def test_moments_do_not_depend_on_batches(cuts):
    x = features(60, 5)
    whole, parts = moments_of(x), moments_of(*x.tensor_split(sorted(cuts)))
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(parts.sum, whole.sum, rtol=1e-13, atol=1e-13)
    assert parts.count == 60


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(200, 30), (31, 30), (30, 30), (12, 30), (2, 3)])
def test_singular_values_are_those_of_the_samples(rows, cols, centered):
    x = features(rows, cols) + 3
    sigma = moments_of(x).singular_values(centered=centered)
    exact = x.double().numpy()
    expected = np.linalg.svd(exact - exact.mean(0) if centered else exact, compute_uv=False)
    assert sigma.shape == expected.shape
    np.testing.assert_allclose(sigma, expected, rtol=1e-9, atol=1e-6 * expected[0])
    reference = torch.from_numpy(expected * (expected > 1e-9 * expected[0]))
    assert effective_rank(sigma).item() == pytest.approx(effective_rank(reference).item(), rel=1e-9)


def test_offset_hides_the_rank_of_uncentered_features_only():
    # 400 x 100 white samples with an offset of 3; the expected values are those printed for one draw.
    moments = moments_of(features(400, 100) + 3)
    assert stable_rank(moments.singular_values(centered=False)).item() == pytest.approx(1.110, abs=0.01)
    sigma = moments.singular_values()
    assert stable_rank(sigma).item() == pytest.approx(45.14, rel=0.06)
    assert effective_rank(sigma).item() == pytest.approx(96.60, abs=0.3)
    assert effective_rank(moments.singular_values(centered=False)).item() == pytest.approx(55.79, rel=0.02)
    assert participation_ratio(sigma**2).item() == pytest.approx(100 / (1 + 101 / 400), rel=0.01)


def test_features_of_rank_one_read_one():
    # A float32 Gram matrix of such features reads 1.206.
    x = torch.outer(torch.randint(1, 9, (3000,)).float(), torch.randint(1, 9, (256,)).float())
    sigma = moments_of(x).singular_values(centered=False)
    assert effective_rank(sigma).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("count", [50, 1234, 20_000])
def test_constant_features_have_no_rank(count):
    moments = moments_of((features(1, 64) * 0.3 + 0.7).expand(count, 64))
    assert (moments.singular_values() == 0).all()
    assert stable_rank(moments.singular_values(centered=False)).item() == pytest.approx(1, rel=1e-9)


def test_offset_far_above_the_spread_leaves_the_rank_of_the_spread():
    x = features(4000, 12).double()
    near, far = moments_of(x).singular_values(), moments_of(x + 1e4).singular_values()
    np.testing.assert_allclose(far, near, rtol=1e-6)


@pytest.mark.parametrize("rows", [30, 300])
def test_power_laws_from_a_gram_use_only_the_values_above_a_millionth_of_the_first(rows):
    # Directions that decay to 3e-9: those below 5e-8 cannot be told from rounding, and only those above 1e-6 may count.
    rank = min(rows, 40)
    left, right = (torch.linalg.qr(features(size, rank).double())[0] for size in (rows, 40))
    x = left * torch.logspace(0, -8.5, 40, dtype=torch.float64)[:rank] @ right.T
    sigma = moments_of(x).singular_values(centered=False)
    exact = torch.from_numpy(np.linalg.svd(x.numpy(), compute_uv=False))
    above = exact[exact > 1e-6 * exact[0]]
    assert numerical_rank(sigma, rtol=1e-6) == len(above) == 28
    for measure in (alpha_req, hill_alpha):
        assert measure(sigma**2).item() == pytest.approx(measure(above**2, rtol=0.0).item(), rel=1e-4)


def test_gram_with_slightly_negative_eigenvalues_reads_zero():
    q = torch.linalg.qr(features(6, 6).double())[0]
    gram = q @ torch.diag(torch.tensor([4.0, 1.0, 1e-30, -1e-16, 0.0, -1e-15], dtype=torch.float64)) @ q.T
    sigma = singular_values_from_gram((gram + gram.T) / 2)
    assert sigma.tolist() == pytest.approx([2, 1, 0, 0, 0, 0])
    assert (sigma[2:] == 0).all()
    assert singular_values_from_gram(torch.zeros(2, 2)).tolist() == [0, 0]


def test_gram_whose_eigenvalues_do_not_converge_takes_another_solver(monkeypatch):
    def failing(*_):
        raise torch.linalg.LinAlgError("did not converge")

    x = features(20, 5).double()
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    np.testing.assert_allclose(singular_values_from_gram(x.T @ x), np.linalg.svd(x, compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_raise_when_computed(bad):
    x = features(8, 4)
    x[3, 2] = bad
    metric = SecondMoment(4)
    metric.update(x)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 4"):
        metric.compute()
    with pytest.raises(ValueError, match="finite `gram`"):
        singular_values_from_gram(metric.gram)


def test_features_of_another_size_raise():
    metric = SecondMoment(4)
    with pytest.raises(ValueError, match="Expected `x` with 4 features, got 5"):
        metric.update(features(3, 5))
    with pytest.raises(ValueError, match="Expected `dim` of at least 1, got 0"):
        SecondMoment(0)


def test_one_sample_cannot_be_centered():
    with pytest.raises(ValueError, match="at least 2 samples to center, got 1"):
        moments_of(features(1, 3)).singular_values()


def test_no_sample_raises():
    metric = SecondMoment(3)
    metric.update(features(0, 3))
    with pytest.raises(ValueError, match="at least one sample"):
        metric.compute()


def test_reset_forgets_and_a_new_size_may_follow():
    metric = SecondMoment()
    metric.update(features(5, 3))
    metric.reset()
    metric.update(features(6, 2))
    assert metric.compute().gram.shape == (2, 2)
    assert metric.compute().count == 6


def test_casting_the_module_that_holds_the_metric_keeps_its_sums_in_float64():
    metric = torch.nn.ModuleList([SecondMoment()]).to(torch.bfloat16)[0]
    metric.update(features(5, 3))
    assert metric.bfloat16().half().to(torch.float16).compute().gram.dtype == torch.float64


def test_samples_may_come_from_inside_and_outside_inference_mode():
    metric = SecondMoment()
    with torch.inference_mode():
        metric.reset()
        metric.update(features(5, 3))
    metric.update(features(5, 3))
    assert metric.compute().count == 10


def test_update_never_waits_for_a_value_from_the_device():
    # Tensors on the meta device have no values, so reading one would raise.
    metric = SecondMoment().to("meta")
    metric.update(torch.empty(5000, 3, device="meta"))
    assert metric.gram.shape == (3, 3)


def test_update_observes_only():
    x = features(5, 3).requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    moments = moments_of(x)
    assert torch.equal(x, before)
    assert not moments.gram.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def sum_over_ranks(rank: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    x = features(50, 6)
    for parts in ([x[:20], x[20:]], [x, None]):  # the second time rank 1 sees nothing and knows no size
        metric = SecondMoment()
        if parts[rank] is None:
            metric.update(x[:0])
        else:
            metric.update(parts[rank])
        moments = metric.compute()
        assert moments.count == 50
        torch.testing.assert_close(moments.gram, x.double().T @ x.double())
        torch.testing.assert_close(moments.sum, x.double().sum(0))
        metric.update(x)  # goes on from its own sums, not from those of all ranks
        assert metric.gram.diagonal().sum() < 2.5 * (x**2).sum()
    lost = SecondMoment()
    lost._update_count = 1  # a rank whose loader was empty
    if rank == 0:
        lost.update(x)
    assert lost.compute().count == 50
    other = SecondMoment()
    other.update(x[:, : 3 + rank])
    with pytest.raises(ValueError, match="same number of features on all ranks"):
        other.compute()
    labels, positions = torch.arange(50) % (2 + rank), torch.arange(50)  # rank 0 does not know of the third class
    ridge_moments = RidgeMoments()
    ridge_moments.update(x, labels, positions)
    assert ridge_moments.compute().class_count.sum(0).tolist() == [25 + 17, 25 + 17, 16]
    torch.testing.assert_close(ridge_moments.compute().gram.sum(0), 2 * x.double().T @ x.double())


def test_moments_are_summed_over_ranks():
    in_two_processes(sum_over_ranks)
