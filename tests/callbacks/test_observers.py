"""Observing changes nothing: a run with a callback is bitwise the run without it."""

import random

import jaxtyping
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import (
    GradientSpectrum,
    InducedPenalty,
    Probe,
    Reconstructions,
    RepresentationSpectrum,
    StepProgress,
    StepTiming,
    UpdateSpectrum,
    WeightSpectrum,
)

# Lightning's remark on the frozen batch norm.
pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")

OBSERVERS = {
    "InducedPenalty": lambda: InducedPenalty(
        ("gauss_newton", "full_curvature", "symmetric_pairs", "measured"), num_samples=60, max_draws=4, probes=2
    ),
    "WeightSpectrum": lambda: WeightSpectrum(every_n_steps=3),
    "GradientSpectrum": lambda: GradientSpectrum(every_n_steps=3),
    "UpdateSpectrum": lambda: UpdateSpectrum(every_n_steps=3),
    "RepresentationSpectrum": lambda: RepresentationSpectrum(["network.4", "network.8"], pool="tokens"),
    "RepresentationSpectrum with LiDAR": lambda: RepresentationSpectrum(
        ["network.7"], lidar_views=2, lidar_images=9, augmentation=[Noise()], on_nonfinite="skip"
    ),
    "Probe": lambda: Probe(["network.4"]),
    "Probe of a part of the split": lambda: Probe(max_train_samples=100),
    "Reconstructions": lambda: Reconstructions(),
    "StepTiming": lambda: StepTiming(),
    "StepProgress": lambda: StepProgress(every_seconds=1e-9),
}


# What a trainer may be told; each is compared with itself.
MODES = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
    "compiled": {"compile": "eager"},
    "compiled, aot_eager, bf16-mixed": {"compile": "aot_eager", "precision": "bf16-mixed"},
}


class Noise(nn.Module):
    """An augmentation that draws from every generator."""

    def forward(self, images):
        draw()
        return images + 0.1 * torch.randn_like(images)


class Losses(pl.Callback):
    """The loss of every batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer, module):
        self.losses.append(trainer.callback_metrics["val/loss"].item())


class Disturbing(pl.Callback):
    """What an observer must not do, each kind once."""

    def __init__(self, kind):
        self.kind = kind

    def on_validation_batch_end(self, trainer, module, *_):
        if self.kind == "torch":
            torch.rand(1)
        elif self.kind == "numpy":
            np.random.rand()  # noqa: NPY002
        elif self.kind == "python":
            random.random()
        elif self.kind == "statistics":
            module.network[1].train()
            with torch.no_grad():
                module(torch.rand(8, 1, 8, 8))


def draw(*_):
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002


def run(make_classifier, make_trainer, plain_loaders, folder, callbacks, compile=None, **options):
    """20 steps with four validations or more, and what is left afterwards."""
    module = make_classifier()
    module.reconstruct = lambda images: (images / 2, (images + 0.1 * module(images).mean()).clamp(0, 1))
    module.network[5].eval()  # a frozen batch norm, as a user has one
    # Draws in evaluation too, as test-time augmentation does: an observer's extra passes must not be felt.
    module.network[6].register_forward_hook(draw)
    flags, val_flags = [], []

    class Flags(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            flags.append([part.training for part in module.modules()])

        def on_validation_start(self, trainer, module):
            module.network[3].train()  # Monte-Carlo dropout: Lightning's own flags are not all that can be set

        def on_validation_batch_start(self, trainer, module, *_):
            val_flags.append([part.training for part in module.modules()])

    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr, momentum=0.9)
    if compile is not None:
        torch._dynamo.reset()
        module.network.compile(backend=compile)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    losses = Losses()
    options = {"max_steps": 20, "val_check_interval": 5, "num_sanity_val_steps": -1, **options}
    trainer = make_trainer(folder, callbacks=[*callbacks, Flags(), losses], **options)
    trainer.fit(module, *plain_loaders(batch_size=32 if compile is None else 64, val_batch_size=48))
    # Batch norm's running statistics are in the state; flags and generators as the run left them.
    return {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "losses": losses.losses,
        "gradients": {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:3],  # noqa: NPY002
        "python": random.getstate(),
        "flags": flags,
        "validation flags": val_flags,
        "flags at the end": [part.training for part in module.modules()],
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(a[0], np.ndarray):
        return np.array_equal(a[0], b[0]) and a[1] == b[1]
    return a == b


@pytest.fixture(scope="module")
def run_with(make_classifier, make_trainer, plain_loaders, tmp_path_factory):
    def run_with(*callbacks, **options):
        folder = tmp_path_factory.mktemp("run")
        return run(make_classifier, make_trainer, plain_loaders, folder, list(callbacks), **options)

    with pytest.MonkeyPatch.context() as patch:
        # beartype itself draws from Python's generator, to choose which element of a list it looks at.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield run_with


@pytest.fixture(scope="module")
def alone(run_with):
    return run_with()


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_run_with_an_observer_is_bitwise_the_run_without_it(run_with, alone, make):
    observed = run_with(make())
    assert {key for key in alone if not same(alone[key], observed[key])} == set()


def test_run_with_all_observers_is_bitwise_the_run_without_them(run_with, alone):
    makes = [make for name, make in OBSERVERS.items() if "part" not in name]
    observed = run_with(*(make() for make in makes))
    assert {key for key in alone if not same(alone[key], observed[key])} == set()


@pytest.mark.parametrize("mode", MODES)
def test_all_observers_leave_every_mode_of_training_as_it_is(run_with, mode):
    alone = run_with(**MODES[mode])
    observed = run_with(*(make() for name, make in OBSERVERS.items() if "part" not in name), **MODES[mode])
    assert {key for key in alone if not same(alone[key], observed[key])} == set()
    assert len(alone["losses"]) > 20


@pytest.mark.parametrize(
    ("kind", "sees"),
    [
        ("torch", {"torch", "state", "optimizer", "losses"}),
        ("numpy", {"numpy"}),
        ("python", {"python"}),
        ("statistics", {"state"}),
    ],
)
def test_the_comparison_sees_what_a_careless_callback_changes(run_with, alone, kind, sees):
    disturbed = run_with(Disturbing(kind))
    assert sees <= {key for key in alone if not same(alone[key], disturbed[key])}


def test_the_run_that_is_observed_trains_with_flags_mixed_and_generators_used(alone, make_classifier):
    assert len(alone["flags"]) == 20
    assert alone["flags"][0] == alone["flags"][-1]
    assert len(set(alone["flags"][0])) == 2
    start = make_classifier().state_dict()
    assert not torch.equal(alone["state"]["network.0.weight"], start["network.0.weight"])
    assert torch.equal(alone["state"]["network.5.running_mean"], start["network.5.running_mean"])
