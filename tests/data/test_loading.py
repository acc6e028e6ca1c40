import pytest
import pytorch_lightning as pl
import torch

from masklr.data import Digits, TorchvisionImages

few_workers = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def fake_images(num_workers):
    return TorchvisionImages(
        "FakeData",
        options={"size": 60, "image_size": [3, 12, 16], "num_classes": 4},
        image_size=(6, 8),
        random_resized_crop=(0.3, 1.0),
        batch_size=8,
        num_workers=num_workers,
    )


@pytest.mark.parametrize("steps", [3, 12, 17])  # the first epoch's middle, its end, the second one's middle
def test_resumed_run_sees_the_batches_of_the_uninterrupted_one(run, tmp_path, steps):
    def data():
        return Digits(batch_size=100, seed=3)

    whole = run(data(), max_steps=30)
    before = run(data(), max_steps=steps, save=tmp_path / "saved.ckpt")
    after = run(data(), checkpoint=tmp_path / "saved.ckpt", max_steps=30)
    assert before.seen + after.seen == whole.seen
    assert torch.equal(after.weight, whole.weight)


@few_workers
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_run_sees_the_crops_of_the_uninterrupted_one_with_workers(run, tmp_path, num_workers):
    whole = run(fake_images(0), max_steps=14)
    before = run(fake_images(num_workers), max_steps=8, save=tmp_path / "saved.ckpt")
    after = run(fake_images(num_workers), checkpoint=tmp_path / "saved.ckpt", max_steps=14)
    assert before.seen + after.seen == whole.seen
    assert before.sums + after.sums == whole.sums
    assert len(set(whole.sums)) == 14


def test_resumed_run_is_exact_under_accumulation_with_short_epochs_and_validation(run, tmp_path):
    def data():
        return Digits(batch_size=80, val_fraction=0.05)

    options = {"accumulate_grad_batches": 2, "limit_train_batches": 10, "validate": True, "val_check_interval": 4}
    whole = run(data(), max_steps=16, **options)
    before = run(data(), max_steps=7, save=tmp_path / "saved.ckpt", **options)
    after = run(data(), checkpoint=tmp_path / "saved.ckpt", max_steps=16, **options)
    assert {len(batch) for batch in whole.seen} == {40}
    assert before.seen + after.seen == whole.seen


@few_workers
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_run_is_exact_if_the_module_asks_for_the_number_of_steps(run, recorder, tmp_path, num_workers):
    class Asking(recorder):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    whole = run(fake_images(0), module=Asking(), max_epochs=9, max_steps=14)
    before = run(fake_images(num_workers), module=Asking(), max_epochs=9, max_steps=8, save=tmp_path / "saved.ckpt")
    after = run(fake_images(num_workers), tmp_path / "saved.ckpt", module=Asking(), max_epochs=9, max_steps=14)
    assert before.seen + after.seen == whole.seen


def test_number_of_training_batches_is_that_of_the_loader(run):
    data = Digits(batch_size=100)
    run(data, max_steps=1, accumulate_grad_batches=2)
    assert data.num_train_batches == len(data.train_dataloader()) == 1294 // 50


def test_epochs_differ_and_cover_whole_batches(run):
    module = run(Digits(batch_size=200), max_epochs=2)
    assert len(module.seen) == 2 * (1294 // 200)
    first, second = module.seen[:6], module.seen[6:]
    assert first != second
    assert len({position for batch in first for position in batch}) == 1200


def test_validation_does_not_move_the_global_generator_or_the_order(run):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with_validation = run(Digits(batch_size=200), max_epochs=2, validate=True)
    assert torch.equal(torch.get_rng_state(), state)
    without = run(Digits(batch_size=200), max_epochs=2)
    assert with_validation.seen == without.seen
    assert with_validation.validated == list(range(144)) * 2


def test_validate_test_and_predict_give_every_sample_once(recorder):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for loop, count in ((trainer.validate, 144), (trainer.test, 359)):
        module = recorder()
        loop(module, Digits(batch_size=50), verbose=False)
        assert module.validated == list(range(count))
    positions = trainer.predict(recorder(), Digits(batch_size=50, predict_split="train"))
    assert torch.cat(positions).tolist() == list(range(1294))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_on_few_batches_runs_in_order(run):
    module = run(Digits(batch_size=10), max_epochs=2, overfit_batches=2)
    assert module.seen == [list(range(10)), list(range(10, 20))] * 2


def test_batch_size_that_does_not_divide_is_an_error_with_the_numbers(run):
    with pytest.raises(ValueError, match="multiple of ranks x accumulated batches, 1 x 3, got 100"):
        run(Digits(batch_size=100), max_steps=1, accumulate_grad_batches=3)


def test_evaluation_batches_are_not_divided_by_accumulation(run):
    data = Digits(batch_size=100)
    run(data, max_steps=1, accumulate_grad_batches=4)
    assert data.trainer.accumulate_grad_batches == 4
    assert [len(labels) for _, labels, _ in data.val_dataloader()] == [100, 44]
    assert len(next(iter(data.train_dataloader()))[1]) == 25


@few_workers
def test_worker_processes_give_what_this_process_gives_and_its_generator_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches = []
    for num_workers in (0, 2):
        data = fake_images(num_workers)
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
        assert data.image_size == (6, 8)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_crops_differ_between_epochs_and_not_within_one():
    data = fake_images(0)
    data.setup("fit")
    split = data.splits["train"]
    first, again, later = (split.__getitems__([(epoch, 3)])[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, split.__getitems__([3])[0])
    assert not torch.equal(first, later)
    plain = next(iter(data.unaugmented_train_dataloader()))[0][3]
    assert not torch.equal(plain, first[0])
