import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import MaskSchedule
from masklr.layers import DropConnect, Groups, insert, masking

SHAPES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


class Watch(pl.Callback):
    """The values with which each step was taken."""

    def __init__(self, read):
        self.read, self.values = read, []

    def on_after_backward(self, trainer, module):
        self.values.append(self.read(module))


def masked_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    insert(network, {"1": DropConnect(p=0.3), "2": Groups(p=0.3, group_size=4)})
    return network


def fit(make_trainer, folder, module, loaders, callbacks, **options):
    trainer = make_trainer(folder, callbacks=callbacks, **{"max_steps": 10, **options})
    trainer.fit(module, *loaders)
    return trainer


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mask_follows_the_schedule_and_it_is_logged(
    make_classifier, make_trainer, plain_loaders, tmp_path, read_metrics, shape
):
    schedule = MaskSchedule(start=0.1, end=0.9, begin=0.2, until=0.8, shape=shape)
    watch = Watch(lambda module: [mask.p for mask in masking(module.network).values()])
    fit(
        make_trainer, tmp_path, make_classifier(masked_network), plain_loaders(), [schedule, watch], limit_val_batches=0
    )
    expected = [0.1 + 0.8 * SHAPES[shape](min(1, max(0, (step / 10 - 0.2) / 0.6))) for step in range(10)]
    assert len(watch.values[0]) == 3  # DropConnect, groups and the plain dropout that was there
    for values, value in zip(watch.values, expected, strict=True):
        assert values == pytest.approx([value] * 3)
    logged = read_metrics(tmp_path)["mask_schedule/p"]
    assert [logged[step] for step in range(10)] == pytest.approx(expected)


def test_early_dropout_is_a_jump(make_classifier, make_trainer, plain_loaders, tmp_path):
    schedule = MaskSchedule(start=0.4, end=0.0, begin=0.3, until=0.3, module="network", include=["3"])
    watch = Watch(lambda module: (module.network[3].p, module.network[1].p))
    fit(make_trainer, tmp_path, make_classifier(masked_network), plain_loaders(), [schedule, watch])
    assert watch.values == [(0.4, 0.3)] * 3 + [(0.0, 0.3)] * 7


def test_the_schedule_counts_optimizer_steps_and_really_masks(make_classifier, make_trainer, plain_loaders, tmp_path):
    watch = Watch(lambda module: module.network[1].p)
    schedule = MaskSchedule(start=0.0, end=0.5)
    fit(
        make_trainer,
        tmp_path / "a",
        make_classifier(masked_network),
        plain_loaders(),
        [schedule, watch],
        max_steps=4,
        accumulate_grad_batches=2,
    )
    assert watch.values == pytest.approx([0, 0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375])
    outputs = []
    for end in (0.0, 0.9):
        module = make_classifier(masked_network)
        schedule = MaskSchedule(start=end, end=end)
        pl.seed_everything(0, verbose=False)
        fit(make_trainer, tmp_path / str(end), module, plain_loaders(), [schedule], max_steps=2)
        outputs.append(module.network[1].weight.detach().clone())
    assert not torch.equal(*outputs)


def test_mask_ratio_moves_in_training_while_validation_keeps_its_own(make_task, make_trainer, make_digits, tmp_path):
    task = make_task(model={"mask_ratio": 0.75})
    seen = {"train": [], "val": []}
    original = task.model.forward

    def watched(images, split):
        seen["train" if task.model.training else "val"].append(split[1].shape[1])
        return original(images, split)

    task.model.forward = watched
    schedule = MaskSchedule(start=0.25, end=0.75, what="mask_ratio", module="model")
    fit(
        make_trainer,
        tmp_path,
        task,
        (make_digits(),),
        [schedule],
        max_steps=4,
        val_check_interval=2,
        limit_val_batches=2,
    )
    assert seen["train"] == [round(16 * ratio) for ratio in (0.25, 0.375, 0.5, 0.625)]
    assert set(seen["val"]) == {12}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": 1.0, "end": 0}, r"Expected `start` in \[0, 1\), got 1.0"),
        ({"start": 0, "end": -0.1}, r"Expected `end` in \[0, 1\), got -0.1"),
        ({"start": 0, "end": 0.5, "what": "mask_ratio"}, r"Expected `start` in \(0, 1\), got 0"),
        ({"start": 0, "end": 0.5, "begin": 0.7, "until": 0.2}, "Expected `begin` and `until`"),
        ({"start": 0, "end": 0.5, "until": 1.5}, "Expected `begin` and `until`"),
        ({"start": 0, "end": 0.5, "shape": "step"}, "Expected `shape`"),
        ({"start": 0, "end": 0.5, "what": "rate"}, "Expected `what`"),
        ({"start": 0.1, "end": 0.5, "what": "mask_ratio", "include": ["a"]}, "Expected no `include`"),
    ],
)
def test_values_outside_their_range_raise(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MaskSchedule(**options)


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        (masked_network, {"include": ["layers.*"]}, "Expected `include` to match something, got 'layers"),
        (masked_network, {"module": "nothing"}, "Expected `module` to be a part of"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}, "Expected masks to schedule"),
        (masked_network, {"what": "mask_ratio", "start": 0.5}, "with a mask ratio"),
    ],
)
def test_what_is_not_there_ends_the_run_before_it_begins(
    make_classifier, make_trainer, plain_loaders, tmp_path, network, options, sentence
):
    schedule = MaskSchedule(**{"start": 0.1, "end": 0.2, **options})
    with pytest.raises(ValueError, match=sentence):
        fit(make_trainer, tmp_path, make_classifier(network), plain_loaders(), [schedule])


def test_ratio_that_leaves_nothing_ends_the_run_before_it_begins(make_task, make_trainer, make_digits, tmp_path):
    schedule = MaskSchedule(start=0.5, end=0.99, what="mask_ratio", module="model")
    with pytest.raises(ValueError, match="leaves no visible patch of 16"):
        fit(make_trainer, tmp_path, make_task(), (make_digits(),), [schedule])


def test_endless_run_cannot_have_a_schedule(make_classifier, make_trainer, plain_loaders, tmp_path):
    schedule = MaskSchedule(start=0.1, end=0.2)
    with pytest.raises(ValueError, match="Expected `max_steps` or `max_epochs`"):
        fit(
            make_trainer,
            tmp_path,
            make_classifier(masked_network),
            plain_loaders(),
            [schedule],
            max_steps=-1,
            max_epochs=-1,
        )
