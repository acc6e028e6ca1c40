import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch

from masklr.callbacks import WeightSpectrum


class Weights(pl.Callback):
    """The state at the end of every step, and at the start."""

    def __init__(self):
        self.states = {}

    def on_train_start(self, trainer, module):
        self.states[0] = copy.deepcopy(module.state_dict())

    def on_train_batch_end(self, trainer, module, *_):
        self.states[trainer.global_step] = copy.deepcopy(module.state_dict())


def spectra(folder):
    files = sorted((folder / "spectra" / "weight_spectrum").iterdir())
    return {int(file.stem.removeprefix("step=")): dict(np.load(file)) for file in files}


def effective_rank(sigma):
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.fixture(scope="module")
def measured(make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """20 steps, measured every 7 while loggers log every 50 and validation comes every 5."""
    folder = tmp_path_factory.mktemp("weights")
    weights = Weights()
    trainer = make_trainer(
        folder,
        max_steps=20,
        log_every_n_steps=50,
        val_check_interval=5,
        callbacks=[WeightSpectrum(every_n_steps=7, measures=["effective_rank", "spectral_norm"]), weights],
    )
    trainer.fit(make_classifier(), *plain_loaders())
    return folder, weights.states, read_metrics(folder), trainer


def test_spectra_and_scalars_are_at_the_start_at_the_cadence_and_at_the_end(measured):
    folder, _, metrics, _ = measured
    assert list(spectra(folder)) == [0, 7, 14, 20]
    keys = [key for key in metrics if key.startswith(("weight/", "cost/"))]
    assert len(keys) == 3 * (3 + 1) + 2  # measures and null, of three matrices and their mean; seconds and share
    assert all(list(metrics[key]) == [0, 7, 14, 20] for key in keys)


def test_spectra_are_those_of_the_weights_at_that_step(measured):
    folder, states, _, _ = measured
    for step, found in spectra(folder).items():
        assert set(found) == {"network.0", "network.4", "network.8"}
        for name, sigma in found.items():
            weight = states[step][f"{name}.weight"].double().flatten(1).numpy()
            np.testing.assert_allclose(sigma, np.linalg.svd(weight, compute_uv=False), rtol=1e-6, atol=1e-7)
    assert not np.allclose(spectra(folder)[0]["network.0"], spectra(folder)[20]["network.0"], rtol=1e-4)


def test_scalars_are_the_measures_of_the_spectra_and_their_means(measured):
    folder, _, metrics, _ = measured
    for step, found in spectra(folder).items():
        ranks = [effective_rank(sigma) for sigma in found.values()]
        for name, rank in zip(found, ranks, strict=True):
            assert metrics[f"weight/{name}/effective_rank"][step] == pytest.approx(rank)
            assert metrics[f"weight/{name}/spectral_norm"][step] == pytest.approx(found[name].max())
        assert metrics["weight/mean/effective_rank"][step] == pytest.approx(sum(ranks) / 3)


def test_null_is_the_effective_rank_of_a_gaussian_matrix_of_that_shape(measured):
    _, _, metrics, _ = measured
    draws = np.random.default_rng(0).standard_normal((200, 10, 32))
    ranks = [effective_rank(np.linalg.svd(draw, compute_uv=False)) for draw in draws]
    null = metrics["weight/network.8/effective_rank_null"]
    assert len(set(null.values())) == 1
    assert abs(null[0] - np.mean(ranks)) < 5 * np.std(ranks)  # one draw against their spread


def test_scalars_are_in_callback_metrics_and_costs_are_real(measured):
    _, _, metrics, trainer = measured
    assert trainer.callback_metrics["weight/mean/effective_rank"] == pytest.approx(
        metrics["weight/mean/effective_rank"][20]
    )
    assert all(0 < seconds < 5 for seconds in metrics["cost/weight_spectrum/seconds"].values())
    assert all(0 < share < 1 for share in metrics["cost/weight_spectrum/share"].values())


def test_step_that_stands_still_while_gradients_accumulate_is_measured_once(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    trainer = make_trainer(
        tmp_path, max_steps=4, accumulate_grad_batches=2, callbacks=[WeightSpectrum(every_n_steps=2)]
    )
    trainer.fit(make_classifier(), *plain_loaders())
    assert list(read_metrics(tmp_path)["weight/mean/stable_rank"]) == [0, 2, 4]


def test_resumed_run_does_not_measure_its_first_step_again(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    trainer = make_trainer(tmp_path / "a", max_steps=4, callbacks=[WeightSpectrum(every_n_steps=2)])
    trainer.fit(make_classifier(), *plain_loaders(num_train=128))
    trainer.save_checkpoint(tmp_path / "step4.ckpt")
    trainer = make_trainer(tmp_path / "b", max_steps=8, callbacks=[WeightSpectrum(every_n_steps=2)])
    trainer.fit(make_classifier(), *plain_loaders(num_train=128), ckpt_path=tmp_path / "step4.ckpt", weights_only=True)
    assert list(read_metrics(tmp_path / "b")["weight/mean/stable_rank"]) == [6, 8]


def test_one_callback_in_two_trainers_measures_both_runs_alike(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    callback, found = WeightSpectrum(every_n_steps=3), []
    for name in ("first", "second"):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / name, max_steps=6, callbacks=[callback])
        trainer.fit(make_classifier(), *plain_loaders())
        found.append(read_metrics(tmp_path / name)["weight/mean/effective_rank"])
        assert list(spectra(tmp_path / name)) == [0, 3, 6]
    assert list(found[0]) == [0, 3, 6]
    assert found[0] == found[1]


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("how", ["in place", "wrapped", "part wrapped"])
def test_compiled_module_is_measured_under_the_same_names(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics, how
):
    found = []
    for compiled in (False, True):
        module = make_classifier()
        if compiled and how == "in place":
            module.network.compile(backend="eager")
        elif compiled and how == "wrapped":
            module.network = torch.compile(module.network, backend="eager")
        elif compiled:
            module.network[4] = torch.compile(module.network[4], backend="eager")
        folder = tmp_path / str(compiled)
        torch.manual_seed(0)
        trainer = make_trainer(folder, max_steps=2, callbacks=[WeightSpectrum("network", every_n_steps=2)])
        trainer.fit(module, *plain_loaders())
        found.append(spectra(folder))
    assert list(found[0]) == list(found[1]) == [0, 2]
    for step in (0, 2):
        assert set(found[0][step]) == set(found[1][step]) == {"0", "4", "8"}
        for name, sigma in found[0][step].items():
            np.testing.assert_allclose(found[1][step][name], sigma, rtol=1e-5)


def test_timm_resnet_is_measured(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    module = make_classifier(lambda: timm.create_model("resnet10t", in_chans=1, num_classes=10))
    callback = WeightSpectrum("network", include=["layer*.*.conv1", "fc"], exclude=["layer4.**"])
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[callback]).fit(module, *plain_loaders())
    found = spectra(tmp_path)
    assert list(found) == [0, 1]
    assert set(found[1]) == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "fc"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"module": "netwrok"}, "Expected `module` to be a part of Classifier, got 'netwrok'; did you mean network"),
        ({"module": "network.99"}, "got 'network.99'"),
        ({"include": ["network.44"]}, r"`include`.*'network\.44'.*network\.4"),
        ({"exclude": ["nothing*"]}, r"`exclude`.*'nothing\*'"),
    ],
)
def test_names_that_match_nothing_raise_before_training(
    make_classifier, make_trainer, plain_loaders, tmp_path, options, sentence
):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[WeightSpectrum(**options)])
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_classifier(), *plain_loaders())
    assert trainer.global_step == 0
    assert not (tmp_path / "spectra").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every_n_steps": 0}, "Expected `every_n_steps` of at least 1, got 0"),
        ({"measures": ["effective_rnak"]}, "effective_rank, got 'effective_rnak'"),
    ],
)
def test_bad_options_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        WeightSpectrum(**options)
