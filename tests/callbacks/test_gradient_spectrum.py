import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from masklr.callbacks import GradientSpectrum
from masklr.callbacks.matrix_measures import overlaps
from masklr.layers import LowRankLinear

NETWORK = {"network.0", "network.4", "network.8"}


class Gradients(pl.Callback):
    """Gradients as each optimizer step finds them."""

    def __init__(self):
        self.at = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.at.setdefault(trainer.global_step, {}).update(found)


def spectra(folder):
    files = sorted((folder / "spectra" / "gradient_spectrum").iterdir())
    return {int(file.stem.removeprefix("step=")): dict(np.load(file)) for file in files}


def matrix(gradients, name):
    return gradients[f"{name}.weight"].double().flatten(1)


def overlap(a, b, k, side):
    """Share of the leading k-dimensional subspace, by the SVD."""
    bases = []
    for gradient in (a, b):
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        bases.append(U[:, :k] if side == "left" else Vh[:k].T)
    return float((bases[0].T @ bases[1]).square().sum() / k)


@pytest.fixture(scope="module", params=["left", "right"])
def measured(request, make_classifier, make_trainer, plain_loaders, tmp_path_factory, read_metrics):
    """20 steps, measured every 7, with gradients of every step."""
    folder, gradients = tmp_path_factory.mktemp("gradients"), Gradients()
    callback = GradientSpectrum(every_n_steps=7, rank=3, side=request.param)
    torch.manual_seed(0)
    make_trainer(folder, max_steps=20, limit_val_batches=0, callbacks=[callback, gradients]).fit(
        make_classifier(), *plain_loaders()
    )
    return request.param, folder, gradients.at, read_metrics(folder)


def test_spectra_are_those_of_the_gradients_of_that_step(measured):
    _, folder, gradients, metrics = measured
    found = spectra(folder)
    assert list(found) == [0, 7, 14]
    for step, by_name in found.items():
        assert set(by_name) == NETWORK
        for name, sigma in by_name.items():
            expected = np.linalg.svd(matrix(gradients[step], name).numpy(), compute_uv=False)
            np.testing.assert_allclose(sigma, expected, rtol=1e-6, atol=1e-9)
            assert metrics[f"gradient/{name}/frobenius_norm"][step] == pytest.approx(np.linalg.norm(expected))
            energy = np.cumsum(expected**2) / np.sum(expected**2)
            assert metrics[f"gradient/{name}/energy_rank_90"][step] == 1 + np.sum(energy < 0.9)
            assert metrics[f"gradient/{name}/stable_rank"][step] == pytest.approx(
                np.sum(expected**2) / expected[0] ** 2
            )


def test_overlaps_are_those_of_the_leading_singular_vectors(measured):
    side, _, gradients, metrics = measured
    dims = {
        "left": {"network.0": 6, "network.4": 8, "network.8": 10},
        "right": {"network.0": 9, "network.4": 54, "network.8": 32},
    }
    for name in NETWORK:
        of = {step: matrix(gradients[step], name) for step in (0, 7, 14)}
        previous, first = (metrics[f"gradient/{name}/overlap_{what}"] for what in ("previous", "first"))
        assert previous == pytest.approx({7: overlap(of[7], of[0], 3, side), 14: overlap(of[14], of[7], 3, side)})
        assert first == pytest.approx({7: overlap(of[7], of[0], 3, side), 14: overlap(of[14], of[0], 3, side)})
        assert metrics[f"gradient/{name}/overlap_null"] == pytest.approx(dict.fromkeys((7, 14), 3 / dims[side][name]))
    mean = np.mean([metrics[f"gradient/{name}/overlap_first"][14] for name in NETWORK])
    assert metrics["gradient/mean/overlap_first"][14] == pytest.approx(mean)


def test_overlap_of_random_subspaces_is_the_null():
    torch.manual_seed(0)
    found = []
    for _ in range(300):
        a, b = (torch.linalg.qr(torch.randn(20, k, dtype=torch.float64)).Q for k in (2, 5))
        found.append(overlaps(a, {"overlap_first": b}))
    values = np.array([value["overlap_first"] for value in found])
    assert found[0]["overlap_null"] == 5 / 20
    assert abs(values.mean() - 5 / 20) < 5 * values.std() / len(values) ** 0.5


def test_there_is_no_overlap_with_nothing():
    basis = torch.eye(4, dtype=torch.float64)
    assert overlaps(basis[:, :2], {"a": None, "b": basis[:, :0]}) == {}
    assert overlaps(basis[:, :0], {"a": basis[:, :2]}) == {}
    assert overlaps(basis[:, :1], {"a": basis[:, :2], "b": None}) == {"a": 1.0, "overlap_null": 0.5}


def test_gradient_is_that_of_all_accumulated_batches_before_clipping(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    norms = []
    for batch_size, options in ((64, {}), (32, {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3})):
        module = make_classifier(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        train, val = plain_loaders()
        loader = torch.utils.data.DataLoader(train.dataset, batch_size)
        folder = tmp_path / str(batch_size)
        trainer = make_trainer(folder, max_steps=1, callbacks=[GradientSpectrum()], limit_val_batches=0, **options)
        trainer.fit(module, loader, val)
        norms.append(read_metrics(folder)["gradient/network.1/frobenius_norm"])
    assert norms[0][0] > 0.1  # far above what it is clipped to
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


class Scaled(pl.Callback):
    """An overflow at the first steps, as a loss scaler provokes one."""

    def __init__(self, overflows):
        self.overflows = overflows

    def on_after_backward(self, trainer, module):
        if trainer.global_step < self.overflows:
            module.network[1].weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_is_taken_out_and_an_overflow_waits_for_the_next_step(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics, fused
):
    norms = {}
    for scaled in (False, True):
        module = make_classifier(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
        train, val = plain_loaders()
        loader = torch.utils.data.DataLoader(train.dataset, 320)  # the same batch every step
        callbacks = [Scaled(2 if scaled else 0), GradientSpectrum(every_n_steps=10)]
        folder = tmp_path / str(scaled)
        trainer = make_trainer(folder, max_steps=4, callbacks=callbacks, limit_val_batches=0, plugins=plugins)
        trainer.fit(module, loader, val)
        norms[scaled] = read_metrics(folder)["gradient/network.1/frobenius_norm"]
    assert list(norms[False]) == [0]
    assert list(norms[True]) == [2]
    assert norms[True][2] == pytest.approx(norms[False][0], rel=1e-2)  # of fp16


def test_nan_ends_the_run_or_is_left_out(make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics):
    def spoil(module):
        module.network[4].weight.register_hook(lambda g: g.clone().index_fill_(0, torch.tensor([0]), float("nan")))
        return module

    trainer = make_trainer(tmp_path / "a", max_steps=3, callbacks=[GradientSpectrum()])
    with pytest.raises(ValueError, match=r"Expected finite gradients of 'network\.4', got NaN or infinity at step 0"):
        trainer.fit(spoil(make_classifier()), *plain_loaders())
    callback = GradientSpectrum(every_n_steps=3, on_nonfinite="skip")
    trainer = make_trainer(tmp_path / "b", max_steps=1, callbacks=[callback], limit_val_batches=0)
    trainer.fit(spoil(make_classifier()), *plain_loaders())
    assert set(spectra(tmp_path / "b")[0]) == NETWORK - {"network.4"}
    assert "gradient/network.4/stable_rank" not in read_metrics(tmp_path / "b")


def test_resumed_run_measures_what_the_uninterrupted_one_does(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    def fit(name, max_steps, **options):
        train, val = plain_loaders()
        loader = torch.utils.data.DataLoader(train.dataset, 320)
        callback = GradientSpectrum(every_n_steps=3)
        trainer = make_trainer(tmp_path / name, max_steps=max_steps, limit_val_batches=0, callbacks=[callback])
        network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))  # noqa: E731
        trainer.fit(make_classifier(network), loader, val, **options)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")

    fit("whole", 10)
    fit("first", 6)
    fit("second", 8, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    fit("third", 10, ckpt_path=tmp_path / "second.ckpt", weights_only=True)
    whole, second, third = (read_metrics(tmp_path / name) for name in ("whole", "second", "third"))
    for key in ("overlap_previous", "overlap_first", "effective_rank"):
        values = whole[f"gradient/network.1/{key}"]
        assert second[f"gradient/network.1/{key}"] == {6: values[6]}
        assert third[f"gradient/network.1/{key}"] == {9: values[9]}


def test_frozen_and_computed_weights_are_left_out_and_nothing_at_all_raises(
    make_classifier, make_trainer, plain_loaders, tmp_path
):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), LowRankLinear(12, 12, 3), nn.Linear(12, 10))

    module = make_classifier(network)
    module.network[1].requires_grad_(False)
    make_trainer(tmp_path / "a", max_steps=1, limit_val_batches=0, callbacks=[GradientSpectrum("network")]).fit(
        module, *plain_loaders()
    )
    assert set(spectra(tmp_path / "a")[0]) == {"3"}
    trainer = make_trainer(tmp_path / "b", max_steps=1, callbacks=[GradientSpectrum("network", include=["1"])])
    with pytest.raises(ValueError, match="Expected matrices with gradients, got none at step 0"):
        trainer.fit(module, *plain_loaders())


class TwoOptimizers(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(layer(batch[0].flatten(1)), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]


def test_each_of_two_optimizers_is_measured_at_its_first_step_of_a_period(make_trainer, plain_loaders, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, limit_val_batches=0, callbacks=[GradientSpectrum(every_n_steps=4)])
    trainer.fit(TwoOptimizers(), plain_loaders()[0])
    assert {step: set(found) for step, found in spectra(tmp_path).items()} == {0: {"a"}, 1: {"b"}, 4: {"a"}, 5: {"b"}}


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
        GradientSpectrum(**options)


def test_names_that_match_nothing_raise_before_training(make_classifier, make_trainer, plain_loaders, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[GradientSpectrum(include=["network.88"])])
    with pytest.raises(ValueError, match=r"`include`.*'network\.88'.*network\.8"):
        trainer.fit(make_classifier(), *plain_loaders())
    assert trainer.global_step == 0
