import re

import pytest

from masklr.callbacks import StepProgress


def lines(capsys):
    return [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "steps" in line or "valid" in line]


@pytest.fixture
def shown(make_task, make_digits, make_trainer, tmp_path, capsys):
    def shown(every_seconds=1e-9, **options):
        options = {"max_steps": 4, "limit_val_batches": 0, "logger": False, **options}
        callback = StepProgress(every_seconds)
        make_trainer(tmp_path, callbacks=[callback], **options).fit(make_task(), make_digits(64))
        return lines(capsys)

    return shown


def test_every_step_is_drawn_with_its_number_and_the_loss(shown):
    found = shown()
    assert [re.search(r"(\d+)/4", line)[1] for line in found] == ["1", "2", "3", "4", "4"]
    assert all(re.search(r"train/loss \d", line) for line in found)
    assert all("v_num" not in line for line in found)


def test_nothing_but_the_end_is_drawn_before_it_is_time(shown):
    found = shown(every_seconds=1000.0)
    assert len(found) == 1
    assert "4/4" in found[0]


def test_total_is_the_number_of_steps_over_all_epochs(shown):
    found = shown(max_steps=-1, max_epochs=2, limit_train_batches=6, accumulate_grad_batches=2)
    assert "6/6" in found[-1]


def test_a_last_step_of_fewer_accumulated_batches_is_counted(shown):
    found = shown(max_steps=-1, max_epochs=2, limit_train_batches=5, accumulate_grad_batches=2)
    assert "6/6" in found[-1]


def test_validation_says_what_it_is_and_how_far(shown):
    found = shown(limit_val_batches=2, val_check_interval=4)
    assert [line.strip() for line in found if "valid" in line] == ["validating, batch 1/2", "validating, batch 2/2"]
    found = shown(limit_val_batches=2, num_sanity_val_steps=-1)
    assert found[0].strip() == "validating the initialization, batch 1/2"
    found = shown(limit_val_batches=2, num_sanity_val_steps=1)
    assert found[0].strip() == "checking validation, batch 1/1"


def test_testing_and_predicting_say_how_far(make_task, make_digits, make_trainer, tmp_path, capsys):
    options = {"callbacks": [StepProgress(1e-9)], "limit_test_batches": 2, "limit_predict_batches": 2}
    trainer = make_trainer(tmp_path, **options)
    trainer.test(make_task(), make_digits(32), verbose=False)
    assert "testing, batch 2/2" in capsys.readouterr().err
    trainer.predict(make_task(), make_digits(32))
    assert "predicting, batch 2/2" in capsys.readouterr().err


def test_disabled_bar_draws_nothing(make_task, make_digits, make_trainer, tmp_path, capsys):
    callback, options = StepProgress(1e-9), {"max_steps": 2, "limit_val_batches": 0, "logger": False}
    trainer = make_trainer(tmp_path, callbacks=[callback], **options)
    callback.disable()
    trainer.fit(make_task(), make_digits())
    assert lines(capsys) == []
    callback.enable()
    trainer = make_trainer(tmp_path, callbacks=[callback], **options)
    trainer.fit(make_task(), make_digits())
    assert len(lines(capsys)) == 3
