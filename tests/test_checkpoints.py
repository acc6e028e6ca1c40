"""Checkpoints that are whole or not there, and when a run writes them."""

import contextlib
import errno
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback

from masklr import checkpoints
from masklr.callbacks import RunCheckpoint
from masklr.callbacks.run_state import check_entries
from masklr.checkpoint_files import damage, newest_sound, sound_checkpoint
from masklr.checkpoints import WholeCheckpointIO, link, read, write

CONTENT = {"weights": torch.arange(3000.0), "half": torch.ones(7, dtype=torch.bfloat16), "step": 3, "names": ["a", "b"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(CONTENT, tmp_path / "step=00000003.ckpt")
    return tmp_path / "step=00000003.ckpt"


def test_what_is_written_is_read(path: Path) -> None:
    found = read(path)
    assert found.keys() == CONTENT.keys()
    assert torch.equal(found["weights"], CONTENT["weights"])
    assert torch.equal(found["half"], CONTENT["half"])
    assert (found["step"], found["names"]) == (3, ["a", "b"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_checkpoint_is_an_ordinary_archive_that_torch_reads(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"masklr sha256 ")
    for mapped in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mapped)["weights"], CONTENT["weights"])


def test_checksum_is_that_of_all_that_stands_before_it(path: Path) -> None:
    from hashlib import sha256

    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    assert comment == b"masklr sha256 " + sha256(data[: -len(comment)]).hexdigest().encode()


def test_every_flipped_bit_is_seen(path: Path) -> None:
    data, draws = path.read_bytes(), random.Random(0)
    places = [*range(64), *range(len(data) - 200, len(data)), *(draws.randrange(len(data)) for _ in range(400))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        assert damage(path) is not None, place


def test_every_cut_and_addition_is_seen(path: Path) -> None:
    data, draws = path.read_bytes(), random.Random(0)
    for size in [*range(8), *range(len(data) - 130, len(data)), *(draws.randrange(len(data)) for _ in range(200))]:
        path.write_bytes(data[:size])
        assert damage(path) is not None, size
    path.write_bytes(data + b"x")
    assert damage(path) is not None


def test_file_of_torch_is_read_though_it_has_no_checksum_but_not_if_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save(CONTENT, path)
    assert torch.equal(read(path)["weights"], CONTENT["weights"])
    data = bytearray(path.read_bytes())
    data[data.index(CONTENT["weights"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"Expected a sound checkpoint, got .* is damaged"):
        read(path)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("signed", [True, False])
def test_checkpoint_that_runs_code_is_refused_in_one_sentence(signed: bool, tmp_path: Path) -> None:
    path = tmp_path / "attack.ckpt"
    (write if signed else torch.save)({"x": Attack(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"asks for code to be run \(.*touch.*\)|asks for code to be run") as raised:
        WholeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_missing_file_and_other_content_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "nowhere.ckpt")
    write([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read(tmp_path / "list.ckpt")


# --------------------------------------------------------------------------------------------------- writing and faults


@pytest.mark.parametrize("fails", ["save", "fsync", "replace"])
def test_failure_while_writing_leaves_the_checkpoint_before_and_nothing_else(
    fails: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[fails]
    monkeypatch.setattr(*where, full)
    with pytest.raises(OSError, match=r"Cannot write the checkpoint .*: No space left on device; the one before"):
        WholeCheckpointIO().save_checkpoint({"step": 4}, path)
    monkeypatch.undo()
    assert read(path)["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_data_are_on_the_disk_before_the_name_and_the_name_before_anything_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(f"fsync {os.path.isdir(f'/proc/self/fd/{fd}')}"), fsync(fd))
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1])
    write(CONTENT, path)
    assert calls == ["fsync False", "rename", "fsync True"]


# Each process dies at another of the calls that writing makes.
DYING_WRITERS = """
import os, signal, sys, torch
from pathlib import Path
from masklr import checkpoints

count = last = 0

def counted(call):
    def count_and_call(*args):
        global count
        count += 1
        if count > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return count_and_call

os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
checkpoints._Archive._put = counted(checkpoints._Archive._put)
for last in range(12):
    if os.fork() == 0:
        checkpoints.write({"weights": torch.arange(3000.0), "step": 4}, Path(sys.argv[1]))
        os._exit(0)
    os.wait()
"""


def test_process_killed_at_any_moment_of_writing_leaves_a_sound_checkpoint(path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", DYING_WRITERS, str(path)], check=True)
    assert damage(path) is None
    orphans = [file for file in path.parent.iterdir() if file != path]
    assert orphans, "no process died while it wrote"
    WholeCheckpointIO().save_checkpoint({"step": 5}, path)
    assert read(path)["step"] == 5
    assert list(path.parent.iterdir()) == [path], "orphans were not swept"


def test_checkpoint_whose_checksum_was_overwritten_is_damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 20 :] = bytes(len(content) - end - 20)  # the archive says that no comment follows
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is None
    assert damage(path) is not None


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"masklr": {"pending": None}}, "Expected `metrics_rows` and `pending`"),
        ({"optimizer_states": [{"state": {0: []}}]}, "Expected a mapping for each parameter"),
        ({"lr_schedulers": [{"_step_count": [3]}]}, "Expected a schedule"),
    ],
)
def test_checkpoint_that_lacks_what_a_run_goes_on_from_is_refused(entries: dict, told: str) -> None:
    check_entries({"masklr": {"metrics_rows": 0, "pending": None}, "optimizer_states": [{"state": {0: {}}}]})
    with pytest.raises(ValueError, match=told):
        check_entries(entries)


def test_temporary_file_of_a_living_process_is_left_alone(path: Path) -> None:
    other = path.with_name(f".step=00000004.ckpt.{os.getppid()}")
    other.touch()
    checkpoints.sweep(path.parent)
    assert other.exists()


def test_newest_sound_checkpoint_is_the_one_before_a_damaged_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer, newest = path.with_name("step=00000010.ckpt"), path.with_name("step=00000011.ckpt")
    write({"step": 10}, newer)
    write({"step": 11}, newest)
    link(newest, path.with_name("last.ckpt"))
    assert newest_sound(path.parent) == newest
    newest.write_bytes(newest.read_bytes()[:-1])
    assert newest_sound(path.parent) == newer
    assert caplog.text.count("Passed over") == 1, "two names of one file are one checkpoint"
    data = bytearray(newer.read_bytes())
    data[100] ^= 1
    newer.write_bytes(data)
    assert newest_sound(path.parent) == path
    path.write_bytes(b"")
    assert newest_sound(path.parent) is None
    assert newest_sound(path.parent / "nowhere") is None


# ------------------------------------------------------------------------------------------------ which a run writes


class Losses(Callback):
    """Gives every validation a loss."""

    def __init__(self, values):
        self.values = dict(values)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.callback_metrics["loss"] = torch.tensor(self.values[trainer.global_step])


@pytest.fixture
def steps_of_run(make_classifier, make_trainer, plain_loaders, tmp_path, monkeypatch):
    """Steps at which a run of 320 / 32 = 10 batches an epoch writes a checkpoint, and its folder."""

    def run(callback, **options):
        options = {"max_steps": 8, "callbacks": [callback, *options.pop("callbacks", [])], **options}
        written = []
        trainer = make_trainer(tmp_path, enable_checkpointing=True, plugins=[WholeCheckpointIO()], **options)
        save = trainer.save_checkpoint

        def noted(path, **options):
            written.append(trainer.global_step)
            save(path, **options)

        monkeypatch.setattr(trainer, "save_checkpoint", noted)
        trainer.fit(make_classifier(), *plain_loaders())
        return written, tmp_path / "checkpoints"

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoint_is_written_at_the_cadence_after_validations_and_at_the_end(steps_of_run) -> None:
    written, folder = steps_of_run(RunCheckpoint(every_n_steps=3), val_check_interval=4)
    # 3 and 6: cadence; 4: validation; 8: the end, once, though a validation falls there too.
    assert written == [3, 4, 6, 8]
    assert names(folder) == {"step=00000006.ckpt", "step=00000008.ckpt", "last.ckpt", "best.ckpt"}
    assert read(folder / "last.ckpt")["global_step"] == 8


def test_checkpoint_due_at_a_validation_or_at_the_end_of_an_epoch_waits(steps_of_run) -> None:
    written, _ = steps_of_run(RunCheckpoint(every_n_steps=5), val_check_interval=15, max_steps=17)
    # 10 ends an epoch: written a batch later. 15 is written once, after its validation.
    assert written == [5, 11, 15, 17]


def test_checkpoint_waits_until_gradients_are_summed(steps_of_run) -> None:
    batches = []

    class Batches(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            batches.append(trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    options = {"accumulate_grad_batches": 3, "val_check_interval": 4, "max_steps": 6, "callbacks": [Batches()]}
    written, _ = steps_of_run(RunCheckpoint(every_n_steps=1), **options)
    # Ten batches an epoch: steps after batches 3, 6, 9, 10, 13, ...; validations after 4 and 8 fall into sums.
    assert batches[:3] == [3, 6, 9]
    assert written == [1, 2, 3, 5, 6]


def test_checkpoint_is_written_as_time_passes(steps_of_run, monkeypatch) -> None:
    from masklr.callbacks import run_checkpoint

    class Clock:
        now = 0.0

        def monotonic(self):
            self.now += 30.0
            return self.now

    monkeypatch.setattr(run_checkpoint, "time", Clock())
    written, _ = steps_of_run(RunCheckpoint(every_minutes=1.9), limit_val_batches=0)
    assert written == [4, 8]


@pytest.mark.parametrize(("mode", "best"), [("min", 4), ("max", 6)])
def test_best_is_kept_though_it_is_not_among_the_last(mode: str, best: int, steps_of_run) -> None:
    losses = Losses({2: 2.0, 4: 1.0, 6: 3.0, 8: float("nan"), 10: 2.5, 12: 2.5})
    callback = RunCheckpoint(best="loss", best_mode=mode, keep_last=2)
    _, folder = steps_of_run(callback, val_check_interval=2, max_steps=12, callbacks=[losses])
    assert read(folder / "best.ckpt")["global_step"] == best
    assert names(folder) == {"step=00000010.ckpt", "step=00000012.ckpt", "last.ckpt", "best.ckpt"}


def test_best_may_be_the_last_validation(steps_of_run) -> None:
    losses = Losses({4: 2.0, 8: 1.0})
    _, folder = steps_of_run(RunCheckpoint(best="loss"), val_check_interval=4, callbacks=[losses])
    assert read(folder / "best.ckpt")["global_step"] == 8


@pytest.mark.parametrize(
    ("option", "value"), [("every_n_steps", 0), ("every_minutes", 0.0), ("keep_last", 0), ("best_mode", "least")]
)
def test_value_outside_its_range_is_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{option}`"):
        RunCheckpoint(**{option: value})


def test_file_of_an_old_torch_is_read_and_an_empty_one_is_torn(tmp_path):
    old, empty, text = (tmp_path / f"{name}.ckpt" for name in ("old", "empty", "text"))
    torch.save({"state_dict": {"a": torch.arange(3)}}, old, _use_new_zipfile_serialization=False)
    empty.touch()
    text.write_text("step,loss\n")
    assert sound_checkpoint(old) == old
    assert torch.equal(read(old)["state_dict"]["a"], torch.arange(3))
    old.write_bytes(old.read_bytes()[:-20])
    with pytest.raises(ValueError, match="which torch cannot read"):
        read(old)
    assert damage(empty) == "is torn or damaged: it is empty"
    assert damage(text) == "is no checkpoint: it is no zip archive"


def test_spoiled_file_of_an_old_torch_is_one_sentence(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(3)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.ckpt").read_bytes()
    for place in range(1, len(whole), 3):
        (tmp_path / "old.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            read(tmp_path / "old.ckpt")
