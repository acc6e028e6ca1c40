import random
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from masklr.callbacks import StepSeed
from masklr.callbacks.step_seed import step_seed


class Draws(pl.LightningModule):
    """Draws from every generator inside its steps."""

    def __init__(self):
        super().__init__()
        self.layer, self.draws, self.steps = nn.Linear(1, 1), [], []

    def training_step(self, batch, batch_idx):
        numpy = np.random.randint(2**31)  # noqa: NPY002
        self.draws.append((torch.randint(2**62, ()).item(), int(numpy), random.getrandbits(60)))
        self.steps.append(self.trainer.global_step)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        torch.rand(batch_idx + 3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def draws(make_trainer, plain_loaders, tmp_path):
    def draws(seed=0, disturb=0, seeded=True, **options):
        module = Draws()
        torch.manual_seed(disturb)
        np.random.seed(disturb)  # noqa: NPY002
        random.seed(disturb)
        callbacks = [StepSeed(seed)] if seeded else []
        options = {"max_steps": 12, "limit_val_batches": 0, "logger": False, **options}
        make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, *plain_loaders(num_train=512))
        return module

    return draws


def test_draws_of_a_batch_do_not_depend_on_what_was_drawn_before(draws):
    first = draws().draws
    assert draws(disturb=5).draws == first
    assert draws(limit_val_batches=1.0, val_check_interval=3).draws == first
    assert draws(disturb=5, seeded=False).draws != draws(seeded=False).draws


def test_every_batch_and_every_seed_draws_something_else(draws):
    first, second = draws().draws, draws(seed=1).draws
    for generator in range(3):
        assert len({draw[generator] for draw in first + second}) == 24


def test_batches_are_counted_not_steps(draws):
    accumulated = draws(accumulate_grad_batches=4, max_steps=3)
    assert accumulated.steps == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert accumulated.draws == draws().draws


def test_count_goes_on_over_epochs(draws):
    module = draws(max_steps=-1, max_epochs=4, limit_train_batches=3)
    assert module.draws == draws().draws


def test_seed_of_the_run_is_taken_where_none_is_given(draws, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert draws(seed=None).draws == draws(seed=1).draws
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert draws(seed=None).draws == draws(seed=0).draws


def test_words_differ_in_half_their_bits_between_neighbors():
    words = [step_seed(seed, batch, rank) for seed in range(4) for batch in range(64) for rank in range(4)]
    assert len(set(words)) == len(words)
    assert all(0 <= word < 2**63 for word in words)
    # Low halves too: NumPy is seeded with 32 bits.
    assert len({word % 2**32 for word in words}) == len(words)
    distances = [
        (step_seed(0, batch, 0) ^ step_seed(*other)).bit_count()
        for batch in range(1, 200)
        for other in ((0, batch + 1, 0), (1, batch, 0), (0, batch, 1), (1, batch - 1, 0))
    ]
    mean = sum(distances) / len(distances)
    # 63 fair bits: mean 31.5, deviation 4.0.
    assert abs(mean - 31.5) < 5 * 3.97 / len(distances) ** 0.5
    assert min(distances) > 8


def test_exchanged_arguments_give_other_words():
    assert len({step_seed(*order) for order in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)]}) == 6


def test_words_are_those_of_splitmix64():
    def mixed(state):
        word = (state + 0x9E3779B97F4A7C15) % 2**64
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        return word ^ (word >> 31)

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of Vigna's splitmix64.c from state 0
    assert step_seed(3, 5, 7) == mixed(mixed(mixed(3) + 5) + 7) >> 1


def test_seeding_costs_as_much_as_seeding_the_generators_by_hand(draws):
    module, callback = draws(), StepSeed(0)

    def by_hand():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 (what is measured)
        torch.manual_seed(1)

    def least(function):
        times = []
        for _ in range(200):
            began = time.process_time_ns()
            function()
            times.append(time.process_time_ns() - began)
        return min(times)

    assert least(lambda: callback.on_train_batch_start(module.trainer, module, None, 0)) < 10 * least(by_hand)
