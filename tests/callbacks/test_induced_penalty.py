import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from masklr.callbacks import InducedPenalty
from masklr.callbacks.mask_sites import find_sites
from masklr.callbacks.penalties import Penalties
from masklr.layers import DropConnect, insert
from tests.two_processes import in_two_processes


def masked_network():
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 10)
    )
    insert(network, {"4": DropConnect(p=0.2)})
    return network


ALL = ("gauss_newton", "full_curvature", "symmetric_pairs", "measured")


def test_keys_steps_and_values_are_those_of_the_penalties(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics
):
    train, val = plain_loaders()
    callback = InducedPenalty(ALL, each_layer=True, num_samples=70, max_draws=8, target_draws=0, module="network")
    module = make_classifier(masked_network)
    start = copy.deepcopy(module)
    trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=4, val_check_interval=2, num_sanity_val_steps=-1)
    module.validation_step = lambda batch, batch_idx: None  # Lightning's own values would share rows
    trainer.fit(module, train, val)
    found = read_metrics(tmp_path)
    measures = {"gauss_newton", "full_curvature", "symmetric_pairs", "measured", "predicted"}
    halves = {f"{key}_halfwidth" for key in ("full_curvature", "symmetric_pairs", "measured")}
    for site in ("3", "4", "all"):
        keys = {key.rpartition("/")[2] for key in found if key.startswith(f"penalty/{site}/")}
        assert keys == measures | halves
        assert set(found[f"penalty/{site}/measured"]) == {0, 2, 4}
        assert found[f"penalty/{site}/predicted"] == found[f"penalty/{site}/full_curvature"]
    # The first 70 samples, the network as it was before training and after it.
    images, labels = (torch.cat(part) for part in zip(*list(val)[:2], strict=True))
    for step, network in ((0, start.network), (4, module.network)):
        penalties = Penalties(network.eval(), [(images[:70], labels[:70])])
        expected = penalties.gauss_newton(find_sites(network), draws=0)
        for name, value in expected.items():
            assert found[f"penalty/{name}/gauss_newton"][step] == pytest.approx(value, rel=1e-5)
        assert found["penalty/all/gauss_newton"][step] == pytest.approx(sum(expected.values()), rel=1e-5)
        assert found["penalty/mean/gauss_newton"][step] == pytest.approx(sum(expected.values()) / 2, rel=1e-5)
    assert "cost/induced_penalty/share" in found


def test_real_masks_agree_with_the_predictions_at_small_p(make_classifier, make_trainer, plain_loaders, tmp_path):
    module = make_classifier(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.02), nn.Linear(32, 10))
    )
    callback = InducedPenalty(ALL, num_samples=360, relative_error=0.05, max_draws=3000, target_draws=0, probes=64)
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=8)
    trainer.fit(module, *plain_loaders())
    found = {
        key.rpartition("/")[2]: float(v)
        for key, v in trainer.callback_metrics.items()
        if key.startswith("penalty/all/")
    }
    # The last hidden layer: the curvature is all Gauss-Newton, and what is beyond the second order is of order p.
    assert found["full_curvature"] == pytest.approx(found["gauss_newton"], abs=2 * found["full_curvature_halfwidth"])
    assert found["symmetric_pairs"] == pytest.approx(found["gauss_newton"], rel=0.1)
    assert (
        abs(found["measured"] - found["gauss_newton"]) < 0.05 * found["gauss_newton"] + 2 * found["measured_halfwidth"]
    )


def test_closed_form_is_predicted_under_squared_loss(make_trainer, tmp_path):
    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))

        def forward(self, x):
            return self.model(x)

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(30, 6), torch.randn(30, 2)), 8)
    module = Line()
    module.validation_step = lambda batch, batch_idx: None
    trainer = make_trainer(tmp_path, callbacks=[InducedPenalty(("measured",), loss="squared", max_draws=200)])
    trainer.validate(module, data, verbose=False)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    hidden = module.model[:2](data.dataset.tensors[0])
    exact = 0.3 / 0.7 * (hidden.square().mean(0) * module.model[3].weight.square().sum(0)).sum()
    assert found["penalty/all/predicted"] == pytest.approx(exact.item(), rel=1e-5)
    assert found["penalty/model.2/closed_form"] == pytest.approx(exact.item(), rel=1e-5)
    assert abs(found["penalty/all/measured"] - exact) < 2 * found["penalty/all/measured_halfwidth"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": ["exact"]}, "Expected `methods` of .*, got 'exact'"),
        ({"loss": "hinge"}, "Expected `loss`"),
        ({"label_smoothing": 1.0}, r"Expected `label_smoothing` in \[0, 1\)"),
        ({"relative_error": 0.0}, "Expected `relative_error` above 0"),
        ({"num_samples": 0}, "Expected `num_samples` of at least 1"),
        ({"max_draws": 1}, "Expected `max_draws` of at least 2"),
        ({"probes": 1}, "Expected `probes` of at least 2"),
        ({"target_draws": -1}, "Expected `target_draws` of at least 0"),
    ],
)
def test_values_outside_their_range_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        InducedPenalty(**options)


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}, "with masks of p > 0, found none"),
        (masked_network, {"include": ["network.5"]}, "Expected `include` to match something, got 'network.5'"),
        (masked_network, {"module": "net"}, "Expected `module` to be a part of"),
    ],
)
def test_what_is_not_there_ends_the_run_before_it_begins(
    make_classifier, make_trainer, plain_loaders, tmp_path, network, options, sentence
):
    trainer = make_trainer(tmp_path, callbacks=[InducedPenalty(**options)], max_steps=2)
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_classifier(network), *plain_loaders())


class Digit(pl.LightningModule):
    """A masked network on uint8 images, in the precision of the trainer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = masked_network()

    def forward(self, images):
        return self.network(images.to(self.dtype) / 255)

    def validation_step(self, batch, batch_idx):
        pass


def validate(folder, **options):
    from masklr.data import Digits

    # 359 images and 120 of them: 180 and 179 a process, 60 and 60.
    callbacks = [InducedPenalty(ALL, num_samples=count, target_draws=0, max_draws=40) for count in (1000, 120)]
    for callback, name in zip(callbacks, ("all", "some"), strict=True):
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="64-true",  # so that nothing hangs on how batches are cut
            default_root_dir=folder / name,
            logger=CSVLogger(folder / name, name="", version=""),
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )
        trainer.validate(Digit(), datamodule=Digits(batch_size=32, val_fraction=0.25), verbose=False)


def in_one_of_two(rank, folder):
    validate(folder, strategy="ddp", devices=2)


def test_two_processes_predict_what_one_does_and_measure_the_same_mean(tmp_path, read_metrics):
    in_two_processes(in_one_of_two, tmp_path / "two")
    validate(tmp_path / "one")
    for name in ("all", "some"):
        one, two = (read_metrics(tmp_path / folder / name) for folder in ("one", "two"))
        for site in ("3", "4", "all"):
            key = f"penalty/network.{site}/gauss_newton" if site != "all" else "penalty/all/gauss_newton"
            assert two[key][0] == pytest.approx(one[key][0], rel=1e-9)
        a, b = one["penalty/all/measured"][0], two["penalty/all/measured"][0]
        error = sum(found["penalty/all/measured_halfwidth"][0] ** 2 for found in (one, two)) ** 0.5
        assert abs(a - b) < 2 * error
        assert a != b
