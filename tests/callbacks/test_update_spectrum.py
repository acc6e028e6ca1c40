import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import UpdateSpectrum
from masklr.layers import LowRankLinear


class Weights(pl.Callback):
    """Weights after every step, and the first gradient."""

    def __init__(self):
        self.at, self.gradient = {}, None

    def on_train_start(self, trainer, module):
        self.at[0] = copy.deepcopy(module.state_dict())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradient = self.gradient or {name: p.grad.clone() for name, p in module.named_parameters()}

    def on_train_batch_end(self, trainer, module, *_):
        self.at[trainer.global_step] = copy.deepcopy(module.state_dict())


def spectra(folder):
    files = sorted((folder / "spectra" / "update_spectrum").iterdir())
    return {int(file.stem.removeprefix("step=")): dict(np.load(file)) for file in files}


def leading(matrix, k):
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :k]


@pytest.fixture(scope="module")
def measured(make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """10 steps, measured every 4."""
    folder, weights = tmp_path_factory.mktemp("updates"), Weights()
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, max_steps=10, limit_val_batches=0, callbacks=[UpdateSpectrum(every_n_steps=4, rank=3), weights]
    )
    trainer.fit(make_classifier(), *plain_loaders())
    return folder, weights, read_metrics(folder)


def test_spectra_are_those_of_what_was_added_to_the_initial_weights(measured):
    folder, weights, metrics = measured
    found = spectra(folder)
    assert list(found) == [0, 4, 8, 10]
    for step, by_name in found.items():
        assert set(by_name) == {"network.0", "network.4", "network.8"}
        for name, sigma in by_name.items():
            now, initial = (weights.at[s][f"{name}.weight"].double().flatten(1) for s in (step, 0))
            expected = torch.linalg.svdvals(now - initial).numpy()
            np.testing.assert_allclose(sigma, expected, rtol=1e-6, atol=1e-7 * expected[0])
            assert metrics[f"update/{name}/frobenius_norm"][step] == pytest.approx(np.linalg.norm(expected))


def test_update_at_initialization_has_norm_zero_and_no_rank(measured):
    _, _, metrics = measured
    assert metrics["update/mean/frobenius_norm"][0] == 0
    assert list(metrics["update/mean/stable_rank"]) == [4, 8, 10]
    assert list(metrics["update/network.8/overlap_first_gradient"]) == [4, 8, 10]
    assert list(metrics["update/network.8/overlap_previous"]) == [8, 10]


def test_overlaps_are_with_the_update_before_and_with_the_first_gradient(measured):
    _, weights, metrics = measured
    for name, dim in (("network.0", 6), ("network.4", 8), ("network.8", 10)):
        key = f"{name}.weight"
        bases = {
            step: leading((weights.at[step][key].double() - weights.at[0][key].double()).flatten(1), 3)
            for step in (4, 8, 10)
        }
        first = leading(weights.gradient[key].double().flatten(1), 3)
        for before, step in ((4, 8), (8, 10)):
            expected = float((bases[step].T @ bases[before]).square().sum() / 3)
            assert metrics[f"update/{name}/overlap_previous"][step] == pytest.approx(expected)
        for step, basis in bases.items():
            expected = float((basis.T @ first).square().sum() / 3)
            assert metrics[f"update/{name}/overlap_first_gradient"][step] == pytest.approx(expected)
        assert metrics[f"update/{name}/overlap_null"][10] == pytest.approx(3 / dim)


def test_the_first_step_of_gradient_descent_is_in_the_space_of_the_first_gradient(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[UpdateSpectrum(every_n_steps=1)])
    trainer.fit(make_classifier(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lr=1.0), *plain_loaders())
    assert read_metrics(tmp_path)["update/network.1/overlap_first_gradient"][1] == pytest.approx(1, abs=1e-6)


def fit(make_classifier, make_trainer, plain_loaders, folder, max_steps, callbacks, **options):
    train, val = plain_loaders()
    loader = torch.utils.data.DataLoader(train.dataset, 320)
    trainer = make_trainer(folder, max_steps=max_steps, limit_val_batches=0, callbacks=callbacks)
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))  # noqa: E731
    trainer.fit(make_classifier(network), loader, val, **options)
    return trainer


def test_resumed_run_measures_from_the_first_weights_of_the_run_before(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    makers = make_classifier, make_trainer, plain_loaders
    fit(*makers, tmp_path / "whole", 8, [UpdateSpectrum(every_n_steps=4)])
    trainer = fit(*makers, tmp_path / "half", 4, [UpdateSpectrum(every_n_steps=4)])
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    resume = {"ckpt_path": tmp_path / "4.ckpt", "weights_only": True}
    fit(*makers, tmp_path / "rest", 8, [UpdateSpectrum(every_n_steps=4)], **resume)
    whole, rest = (read_metrics(tmp_path / name) for name in ("whole", "rest"))
    keys = [key for key in whole if key.startswith("update/")]
    assert {"update/network.1/overlap_previous", "update/network.1/overlap_first_gradient"} <= set(keys)
    assert all(rest[key] == {8: whole[key][8]} for key in keys)


def test_a_trainer_that_fits_again_goes_on(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    makers = make_classifier, make_trainer, plain_loaders
    fit(*makers, tmp_path / "whole", 6, [UpdateSpectrum(every_n_steps=2)])
    trainer = fit(*makers, tmp_path / "twice", 2, [UpdateSpectrum(every_n_steps=2)])
    trainer.fit_loop.epoch_loop.max_steps = 6
    train, val = plain_loaders()
    trainer.fit(trainer.lightning_module, torch.utils.data.DataLoader(train.dataset, 320), val)
    whole, twice = (read_metrics(tmp_path / name)["update/mean/stable_rank"] for name in ("whole", "twice"))
    assert twice == whole
    assert list(twice) == [2, 4, 6]


def test_resuming_a_run_that_kept_no_initial_weights_raises(make_classifier, make_trainer, plain_loaders, tmp_path):
    makers = make_classifier, make_trainer, plain_loaders
    fit(*makers, tmp_path / "half", 2, []).save_checkpoint(tmp_path / "2.ckpt")
    with pytest.raises(ValueError, match=r"got one of step 2 without those of 'network\.1'"):
        fit(*makers, tmp_path / "rest", 4, [UpdateSpectrum()], ckpt_path=tmp_path / "2.ckpt", weights_only=True)


def test_one_callback_in_two_trainers_keeps_the_weights_of_each(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    callback = UpdateSpectrum(every_n_steps=2)
    for name in "ab":
        fit(make_classifier, make_trainer, plain_loaders, tmp_path / name, 2, [callback])
    first, second = (read_metrics(tmp_path / name) for name in "ab")
    assert {k: v for k, v in first.items() if k[:7] == "update/"} == {
        k: v for k, v in second.items() if k[:7] == "update/"
    }


def test_effective_weights_are_measured_without_a_gradient_to_compare_with(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    module = make_classifier(lambda: nn.Sequential(nn.Flatten(), LowRankLinear(64, 20, 3), nn.Linear(20, 10)))
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[UpdateSpectrum("network")])
    trainer.fit(module, *plain_loaders())
    sigma = spectra(tmp_path)[2]["1"]
    assert (sigma[6:] < 1e-4 * sigma[5]).all()  # a difference of two matrices of rank 3, in float32
    metrics = read_metrics(tmp_path)
    assert "update/2/overlap_first_gradient" in metrics
    assert "update/1/stable_rank" in metrics
    assert "update/1/overlap_first_gradient" not in metrics


class Spoil(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            module.network[4].weight[0] = float("nan")


def test_nan_ends_the_run_or_is_left_out(make_classifier, make_trainer, plain_loaders, tmp_path):
    trainer = make_trainer(tmp_path / "a", max_steps=1, callbacks=[Spoil(), UpdateSpectrum()], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Expected finite weights of 'network\.4', got NaN or infinity at step 1"):
        trainer.fit(make_classifier(), *plain_loaders())
    callbacks = [Spoil(), UpdateSpectrum(on_nonfinite="skip")]
    trainer = make_trainer(tmp_path / "b", max_steps=1, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(make_classifier(), *plain_loaders())
    assert set(spectra(tmp_path / "b")[1]) == {"network.0", "network.8"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every_n_steps": 0}, "Expected `every_n_steps` of at least 1, got 0"),
        ({"rank": 0}, "Expected `rank` of at least 1, got 0"),
        ({"measures": ["stable_rnak"]}, "stable_rank, got 'stable_rnak'"),
    ],
)
def test_bad_options_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        UpdateSpectrum(**options)
