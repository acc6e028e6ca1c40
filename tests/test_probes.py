import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import PredefinedSplit

from masklr import probes
from masklr.probes import RidgeMoments, folds, ridge

PENALTIES = [1e-3, 0.1, 1.0, 10.0, 100.0, 1e4]


def problem(n=300, d=12, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    centers = torch.randn(k, d, generator=generator)
    scales = torch.logspace(-2, 2, d)
    x = (centers[labels] + 1.5 * torch.randn(n, d, generator=generator)) * scales + 5 * scales
    return x.double(), labels, torch.randperm(10 * n, generator=generator)[:n]


def moments_of(x, labels, positions, batch=64, **options):
    metric = RidgeMoments(**options)
    for part in zip(x.split(batch), labels.split(batch), positions.split(batch), strict=True):
        metric.update(*part)
    return metric.compute()


def standardized(x):
    z = x.numpy()
    return (z - z.mean(0)) / np.where(z.std(0) > 1e-6 * np.abs(z).max(0), z.std(0), np.inf)


def one_hot(labels, k):
    return np.eye(k)[labels.numpy()]


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_coefficients_equal_those_of_sklearn(penalty):
    x, labels, positions = problem()
    ours = ridge(moments_of(x, labels, positions), penalties=[penalty])
    theirs = Ridge(alpha=penalty, solver="cholesky").fit(standardized(x), one_hot(labels, 4))
    weight = ours.weight.numpy() * x.numpy().std(0)[:, None]
    np.testing.assert_allclose(weight, theirs.coef_.T, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.scores(x), theirs.predict(standardized(x)), rtol=1e-8, atol=1e-8)
    assert ours.penalty == penalty


def test_cross_validated_errors_and_choice_equal_those_of_sklearn():
    x, labels, positions = problem()
    ours = ridge(moments_of(x, labels, positions), penalties=PENALTIES)
    z, y, fold = standardized(x), one_hot(labels, 4), folds(positions, 5).numpy()
    for penalty, error in zip(PENALTIES, ours.errors, strict=True):
        total = 0.0
        for held_out in range(5):
            fit = Ridge(alpha=penalty).fit(z[fold != held_out], y[fold != held_out])
            total += ((fit.predict(z[fold == held_out]) - y[fold == held_out]) ** 2).sum()
        assert error.item() == pytest.approx(total / len(x), rel=1e-9)
    chosen = RidgeCV(PENALTIES, scoring="neg_mean_squared_error", cv=PredefinedSplit(fold)).fit(z, y)
    assert ours.penalty == chosen.alpha_
    assert ours.penalty == PENALTIES[ours.errors.argmin()]


def test_sums_do_not_depend_on_batches_order_or_ranks():
    x, labels, positions = problem()
    one = moments_of(x, labels, positions, batch=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    many = moments_of(x[order], labels[order], positions[order], batch=7)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


def test_sums_equal_those_of_one_hot_products_in_each_fold():
    x, labels, positions = problem()
    moments = moments_of(x, labels, positions, num_folds=3)
    y = torch.from_numpy(one_hot(labels, 4))
    for index in range(3):
        rows = folds(positions, 3) == index
        torch.testing.assert_close(moments.gram[index], x[rows].T @ x[rows])
        torch.testing.assert_close(moments.cross[index], y[rows].T @ x[rows])
        torch.testing.assert_close(moments.sum[index], x[rows].sum(0))
        torch.testing.assert_close(moments.class_count[index], y[rows].sum(0))
        assert moments.count[index] == rows.sum()


def test_predictions_do_not_change_with_the_units_or_the_offset_of_a_feature():
    x, labels, positions = problem()
    first = ridge(moments_of(x, labels, positions))
    moved = (x + 3 * x.std(0)) * torch.logspace(-6, 6, 12, dtype=torch.float64)
    second = ridge(moments_of(moved, labels, positions))
    assert first.penalty == second.penalty
    torch.testing.assert_close(first.scores(x), second.scores(moved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_constant_features_get_no_weight_and_change_nothing(constant):
    x, labels, positions = problem()
    wide = torch.cat([x, torch.full((300, 1), constant, dtype=torch.float64)], 1)
    plain, padded = ridge(moments_of(x, labels, positions)), ridge(moments_of(wide, labels, positions))
    assert (padded.weight[-1] == 0).all()
    torch.testing.assert_close(padded.weight[:-1], plain.weight)
    assert padded.penalty == plain.penalty


def test_more_features_than_samples_are_no_problem():
    x, labels, positions = problem(n=40, d=90)
    ours = ridge(moments_of(x, labels, positions), penalties=[1.0])
    theirs = Ridge(alpha=1.0).fit(standardized(x), one_hot(labels, 4))
    np.testing.assert_allclose(ours.scores(x), theirs.predict(standardized(x)), rtol=1e-7, atol=1e-8)


def test_a_class_without_samples_is_never_predicted():
    x, labels, positions = problem()
    classifier = ridge(moments_of(x, labels, positions, num_classes=9))
    assert classifier.weight.shape == (12, 9)
    assert (classifier.bias[4:] == -math.inf).all()
    assert classifier.predict(x - 100).max() < 4


def test_classes_grow_with_the_labels():
    x, labels, positions = problem()
    order = labels.argsort()
    grown = moments_of(x[order], labels[order], positions[order], batch=20)
    for a, b in zip(grown, moments_of(x, labels, positions, num_classes=4), strict=True):
        torch.testing.assert_close(a, b)


def test_accuracy_on_digits_is_that_of_sklearn():
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    train = torch.arange(len(x)) < 1300
    classifier = ridge(moments_of(x[train], y[train], torch.arange(1300), batch=256))
    ours = (classifier.predict(x[~train].float()) == y[~train]).double().mean().item()
    mean, std = x[train].mean(0), x[train].std(0).clamp(min=1e-3)
    theirs = RidgeCV(np.logspace(-3, 5, 25)).fit((x[train] - mean) / std, one_hot(y[train], 10))
    expected = (theirs.predict((x[~train] - mean) / std).argmax(1) == y[~train].numpy()).mean()
    assert ours == pytest.approx(expected, abs=0.01)
    assert ours > 0.87


@pytest.mark.parametrize("num_folds", [2, 5, 10])
def test_folds_are_balanced_and_independent_of_any_period_of_the_classes(num_folds):
    fold = folds(torch.arange(20_000), num_folds)
    assert fold.unique().tolist() == list(range(num_folds))
    for period in (1, 2, 5, 10, 100):
        for phase in range(0, period, max(1, period // 5)):
            counts = fold[phase::period].bincount(minlength=num_folds).double()
            expected = counts.sum() / num_folds
            assert ((counts - expected).abs() < 0.2 * expected).all()


def test_folds_of_large_and_narrow_positions_are_in_range():
    assert folds(torch.tensor([2**62, 2**40 + 1, 0]), 5).max() < 5
    assert torch.equal(folds(torch.arange(9, dtype=torch.int32), 5), folds(torch.arange(9), 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_raise(bad):
    x, labels, positions = problem()
    x[5, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 12"):
        moments_of(x, labels, positions)


def test_wrong_arguments_raise():
    x, labels, positions = problem()
    with pytest.raises(ValueError, match="Expected `num_folds` of at least 2, got 1"):
        RidgeMoments(num_folds=1)
    with pytest.raises(ValueError, match="Expected `num_classes` of at least 2, got 1"):
        RidgeMoments(num_classes=1)
    with pytest.raises(ValueError, match="Expected `labels` of at least 0 and below 3, got values from 0 to 3"):
        moments_of(x, labels, positions, num_classes=3)
    with pytest.raises(ValueError, match="Expected `labels` of at least 0, got values from -1"):
        moments_of(x, labels - 1, positions)
    with pytest.raises(ValueError, match="Expected `penalties` above 0"):
        ridge(moments_of(x, labels, positions), penalties=[0.0])
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        ridge(moments_of(x, 0 * labels, positions))
    with pytest.raises(ValueError, match="at least two folds"):
        ridge(moments_of(x, labels, 0 * positions))
    metric = RidgeMoments()
    metric.update(x, labels, positions)
    with pytest.raises(ValueError, match="Expected `features` of size 12, got 11"):
        metric.update(x[:, 1:], labels, positions)


def test_sums_may_come_from_inside_and_outside_inference_mode():
    x, labels, positions = problem()
    metric = RidgeMoments(num_classes=4)
    with torch.inference_mode():
        metric.reset()
        metric.update(x[:100], labels[:100], positions[:100])
    metric.update(x[100:], labels[100:], positions[100:])
    torch.testing.assert_close(metric.compute().gram, moments_of(x, labels, positions).gram)


def test_sums_over_ranks_equal_those_of_one(monkeypatch):
    # Two metrics stand for two ranks: each state is gathered from both. Real processes are in test_moments.
    x, labels, positions = problem()
    ranks = [RidgeMoments(), RidgeMoments(), RidgeMoments()]
    for rank in (0, 1):  # rank 0 never sees the last class, and so knows of three; rank 2 sees nothing
        mine = (labels == 3) == bool(rank)
        ranks[rank].update(x[mine], labels[mine], positions[mine])
    whole = moments_of(x, labels, positions)
    for name in whole._fields:
        states = [getattr(metric, name) for metric in ranks]
        monkeypatch.setattr(probes, "gather_all_tensors", lambda state, group, states=states: states)
        torch.testing.assert_close(sum(ranks[0].dist_sync_fn(states[0])), getattr(whole, name))


def test_wide_features_choose_the_penalty_on_one_held_out_fold(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    moments = RidgeMoments(num_folds=4)
    moments.update(x, y, torch.arange(200))
    everything = ridge(moments.compute())
    monkeypatch.setattr(probes, "MAX_DIM_FOR_ALL_FOLDS", 5)
    one_fold = ridge(moments.compute())
    assert one_fold.errors.shape == everything.errors.shape
    assert not torch.allclose(one_fold.errors, everything.errors)
    same_penalty = ridge(moments.compute(), [one_fold.penalty])
    monkeypatch.undo()
    torch.testing.assert_close(ridge(moments.compute(), [one_fold.penalty]).weight, same_penalty.weight)
