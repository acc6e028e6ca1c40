"""What is done when a loss or a gradient is NaN or infinite."""

import pytest
import torch
from torch import nn

from masklr.callbacks import NonFinite, StepSeed
from masklr.callbacks.nonfinite import finite


class Poison(nn.Module):
    """Identity, but NaN for the sample whose first pixel is given, or in the gradient alone."""

    def __init__(self, where="output"):
        super().__init__()
        self.where, self.active = where, True

    def forward(self, x):
        if not self.active or not self.training:
            return x
        if self.where == "gradient":
            return x + (x - x.detach()).abs().sqrt().sum()  # 0 forward, infinite slope
        return torch.where(torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1)) == 3, float("nan"), x)


class PoisonAt(StepSeed):
    """Switches the poison on at some steps."""

    def __init__(self, steps):
        super().__init__(0)
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, idx):
        super().on_train_batch_start(trainer, pl_module, batch, idx)
        for module in pl_module.modules():
            if isinstance(module, Poison):
                module.active = trainer.global_step in self.steps


def poisoned_network(where):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Poison(where), nn.ReLU(), nn.Linear(8, 10))

    return make


@pytest.fixture
def fit(make_classifier, make_trainer, make_digits, tmp_path):
    def run(steps, where="output", max_steps=6, callback=None, **options):
        torch.manual_seed(0)
        module = make_classifier(poisoned_network(where))
        plain = module.training_step
        module.training_step = lambda batch, batch_idx: plain((batch[0] / 255, *batch[1:]), batch_idx)
        callbacks = [callback or NonFinite(), PoisonAt(steps)]
        trainer = make_trainer(tmp_path, max_steps=max_steps, callbacks=callbacks, limit_val_batches=0, **options)
        trainer.fit(module, datamodule=make_digits())
        return module

    return run


def test_step_layer_and_sample_are_named_and_the_batch_is_kept(fit, tmp_path):
    with pytest.raises(ValueError, match=r"at step 4: the output of 'network\.2', in sample") as raised:
        fit({4})
    kept = torch.load(tmp_path / "nonfinite" / "step=00000004.pt", weights_only=True)
    assert str(tmp_path / "nonfinite" / "step=00000004.pt") in str(raised.value)
    assert f"in sample {kept['batch'][2][3].item()} of the training split" in str(raised.value)
    assert kept["batch"][0].shape == (32, 1, 8, 8)


def test_gradient_alone_is_found(fit):
    with pytest.raises(
        ValueError, match=r"at step 2: the gradient of 'network.1.bias' and 1 others, with a finite loss"
    ):
        fit({2}, "gradient")


def test_so_many_steps_are_skipped_and_weights_stay_finite(fit, tmp_path, read_metrics, caplog):
    module = fit({1, 3}, callback=NonFinite(skip=2))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert read_metrics(tmp_path)["nonfinite/skipped"] == {1: 1.0, 3: 2.0}
    assert "Skipped 2 of at most 2 steps." in caplog.text


def test_one_step_more_than_may_be_skipped_ends_the_run(fit):
    with pytest.raises(ValueError, match="at step 3"):
        fit({1, 3}, callback=NonFinite(skip=1))


def test_skipped_steps_are_counted_on_in_a_resumed_run():
    callback = NonFinite(skip=1)
    callback.load_state_dict({"skipped": 1})
    assert callback.state_dict() == {"skipped": 1}


def test_skipped_step_leaves_the_weights_of_plain_descent_alone(fit):
    # Under SGD without momentum a step with a gradient of zero changes nothing.
    before, after = fit(set(), max_steps=3), fit({3}, max_steps=4, callback=NonFinite(skip=1))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_any_batch_of_an_accumulated_step_is_named(fit, tmp_path):
    with pytest.raises(ValueError, match=r"at step 2: the output of 'network\.2'"):
        fit({2}, accumulate_grad_batches=2)


class OnDevice(NonFinite):
    """As on a device for which the host does not wait."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._on_cpu = False


def test_look_at_a_cadence_keeps_the_first_batch_of_several(fit, tmp_path):
    path, kept = tmp_path / "nonfinite" / "step=00000001.pt", []
    for callback in (NonFinite(), OnDevice(every_n_steps=5)):
        with pytest.raises(ValueError, match="at step 1: "):
            fit({1, 3}, callback=callback, max_steps=9, logger=False)
        assert list((tmp_path / "nonfinite").iterdir()) == [path]
        kept.append(torch.load(path, weights_only=True))
        path.unlink()
    assert all(torch.equal(a, b) for a, b in zip(kept[0]["batch"], kept[1]["batch"], strict=True))
    assert kept[0]["seed"] == kept[1]["seed"]


def test_look_at_the_end_finds_what_the_cadence_has_not(fit):
    with pytest.raises(ValueError, match="at step 5"):
        fit({5}, callback=OnDevice(every_n_steps=100))


def test_run_without_such_steps_is_bitwise_the_run_without_the_callback(fit):
    for callback in (NonFinite(), OnDevice(every_n_steps=2)):
        with_callback, without = fit(set(), callback=callback), fit(set(), callback=StepSeed(0))
        assert all(torch.equal(a, b) for a, b in zip(with_callback.parameters(), without.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_too_large_to_be_squared_are_finite(dtype):
    largest = torch.full((3,), torch.finfo(torch.float32).max / 4, dtype=dtype)
    assert finite([largest])
    assert not finite([largest, torch.tensor(float("inf"), dtype=dtype)])
    assert not finite([torch.tensor([1.0, float("nan")], dtype=dtype)])


@pytest.mark.parametrize(("option", "value"), [("skip", -1), ("every_n_steps", 0)])
def test_value_outside_its_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"`{option}`"):
        NonFinite(**{option: value})
