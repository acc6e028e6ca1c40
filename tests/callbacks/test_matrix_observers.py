"""Measuring weights, gradients and updates changes nothing, however the run is trained."""

import jaxtyping
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import GradientSpectrum, UpdateSpectrum, WeightSpectrum

OBSERVERS = {
    "weights": lambda: WeightSpectrum(
        "network", every_n_steps=2, products=[["3", "6"]], weighted=True, include=["*", "6*3"]
    ),
    "gradients": lambda: GradientSpectrum("network", every_n_steps=2, rank=3),
    "updates": lambda: UpdateSpectrum("network", every_n_steps=2, rank=3),
}
WAYS = {
    "fp32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
    "compiled": {},
}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 10),
    )


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())


@pytest.fixture(scope="module")
def runs(make_classifier, make_trainer, plain_loaders, tmp_path_factory):
    """Runs with and without observers, each once."""
    found = {}

    def run(way, observed):
        if (way, observed) in found:
            return found[way, observed]
        module = make_classifier(network)
        # Draws in evaluation too, as test-time augmentation does: an observer's extra passes must not be felt.
        module.forward = lambda images: module.network(images + 0.1 * torch.rand(images.shape))
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2)
        if way == "compiled":
            module.network.compile(backend="aot_eager")
        torch.manual_seed(0)
        losses = Losses()
        trainer = make_trainer(
            tmp_path_factory.mktemp("run"),
            max_steps=5,
            val_check_interval=2,
            num_sanity_val_steps=-1,
            callbacks=[losses, *((OBSERVERS[observed](),) if observed else ())],
            **WAYS[way],
        )
        trainer.fit(module, *plain_loaders())
        found[way, observed] = {
            "weights": dict(module.state_dict()),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "gradients": [p.grad for p in module.parameters()],
            "generator": torch.get_rng_state(),
            "training": [part.training for part in module.modules()],
            "losses": losses.losses,
            "val": trainer.callback_metrics["val/loss"],
            "hooks": [len(part._forward_pre_hooks) for part in module.modules()],
            "measured": sum(key.startswith(("weight/", "gradient/", "update/")) for key in trainer.callback_metrics),
        }
        return found[way, observed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        torch._dynamo.reset()
        yield run
        torch._dynamo.reset()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("observed", OBSERVERS)
@pytest.mark.parametrize("way", WAYS)
def test_observed_run_is_bitwise_the_run_alone(runs, way, observed):
    alone, watched = runs(way, None), runs(way, observed)
    assert watched.pop("measured", 1) > 0
    assert {key for key in watched if not same(alone[key], watched[key])} == set()


def test_ways_of_training_differ(runs):
    finals = {
        way: runs(way, None)["weights"]["network.3.weight"] for way in ("fp32", "bf16-mixed", "accumulated", "clipped")
    }
    assert not any(same(a, b) for i, a in enumerate(finals.values()) for b in list(finals.values())[:i])
    assert len(runs("accumulated", None)["losses"]) == 10
