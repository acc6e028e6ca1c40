"""Disks that are full or gone, shards that change, worker processes that die: one sentence, and the run can go on."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from masklr.checkpoint_files import newest_sound
from masklr.checkpoints import read

ROOT = Path(__file__).parents[2]
# Imports once; then each line asks for a process of `masklr`, in which a fault happens when a step begins.
SERVER = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import multiprocessing, timm, torch, torchvision.io, sklearn.datasets
import masklr.recipe_cli
from masklr.callbacks import StepSeed
from masklr.cli import main
torch.set_num_threads(1)

def at(step, fault):
    plain = StepSeed.on_train_batch_start
    def begin(self, trainer, *rest):
        if trainer.global_step == step:
            fault(trainer)
        plain(self, trainer, *rest)
    StepSeed.on_train_batch_start = begin

while line := sys.stdin.readline():
    asked = json.loads(line)
    if (pid := os.fork()) == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        exec(asked["fault"])
        sys.exit(main(asked["arguments"]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
OPTIONS = ["--wandb=off", "--trainer.max_steps=8", "--trainer.log_every_n_steps=2"]


@pytest.fixture(scope="module")
def faults(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("faults")


Masklr = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def masklr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Masklr]:
    """Runs `masklr` in a process of its own; returns its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    number = 0

    def run(*arguments: str, fault: str = "") -> tuple[int, str]:
        nonlocal number
        number += 1
        log = folder / f"{number}.log"
        asked = {"arguments": ["fit", *arguments], "fault": textwrap.dedent(fault), "log": str(log)}
        server.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        return int(server.stdout.readline()), log.read_text()  # type: ignore[union-attr]

    yield run
    server.communicate()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the faults without pictures; a checkpoint at every second step."""
    content = yaml.safe_load((ROOT / "tests" / "faults" / "digits.yaml").read_text())
    content["trainer"]["val_check_interval"] = 4
    kept = ("RunCheckpoint", "WeightSpectrum", "MaskSchedule")
    callbacks = [c for c in content["trainer"]["callbacks"] if c["class_path"].endswith(kept)]
    callbacks[0]["init_args"]["every_n_steps"] = 2
    callbacks[1]["init_args"] |= {"every_n_steps": 3, "picture": False}
    content["trainer"]["callbacks"] = callbacks
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, masklr: Masklr, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happens."""
    runs = tmp_path_factory.mktemp("whole")
    code, told = masklr(f"--config={recipe}", *OPTIONS, f"--runs={runs}")
    assert code == 0, told
    return next(runs.glob("*/version_0"))


def sentence(result: tuple[int, str]) -> str:
    """The one sentence of a process that failed."""
    code, told = result
    assert code == 2, told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("masklr: error: ")]
    return line.removeprefix("masklr: error: ")


def check_last_checkpoint(run: Path, step: int | tuple[int, ...], told: str) -> None:
    """The checkpoint before the fault is there and sound, and the user is told how to go on."""
    newest = newest_sound(run / "checkpoints")
    assert newest is not None
    assert read(newest)["global_step"] in (step if isinstance(step, tuple) else (step,))
    assert f"the run can be resumed: masklr fit --resume {run}" in told


# ---------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


FULL = """
def fault(trainer):
    with open({filler!r}, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError: pass
at(5, fault)
"""
READ_ONLY = "at(5, lambda trainer: os.system('mount -o remount,ro {disk}'))"


@pytest.mark.parametrize(
    ("fault", "reason", "mended"),
    [
        (FULL, "No space left on device", "rm {filler}"),
        (READ_ONLY, "Read-only file system", "mount -o remount,rw {disk}"),
    ],
)
def test_disk_that_is_full_or_read_only_ends_the_run_which_then_goes_on_exactly(
    fault: str, reason: str, mended: str, recipe: Path, whole: Path, disk: Path, masklr: Masklr, faults: ModuleType
) -> None:
    names = {"filler": str(disk / "filler"), "disk": str(disk)}
    result = masklr(f"--config={recipe}", *OPTIONS, f"--runs={disk}", fault=fault.format(**names))
    (run,) = disk.glob("*/version_0")
    told = sentence(result)
    assert told.startswith(f"Cannot write {run}")
    assert told.endswith(f": {reason}.")
    check_last_checkpoint(run, 4, result[1])
    subprocess.run(mended.format(**names), shell=True, check=True)
    code, said = masklr(f"--resume={run}")
    assert code == 0, said
    assert faults.differences(whole, run) == []
    assert not list(run.rglob(".*"))


# Of a limit on the size of files the kernel says what it says of a full disk; it needs no privilege.
@pytest.mark.parametrize("size", [1500, 40_000])  # of metrics.csv and of checkpoints
def test_no_file_is_half_written_where_files_may_not_grow(
    size: int, recipe: Path, whole: Path, masklr: Masklr, faults: ModuleType, tmp_path: Path
) -> None:
    fault = f"at(5, lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1)))"
    result = masklr(f"--config={recipe}", *OPTIONS, f"--runs={tmp_path}", fault=fault)
    (run,) = tmp_path.glob("*/version_0")
    assert sentence(result).startswith("Cannot write ")
    check_last_checkpoint(run, 4, result[1])
    assert not list(run.rglob(".*"))
    assert (run / "metrics.csv").read_text().endswith("\n")
    for path in run.rglob("*.npz"):
        faults.content_of(path)
    code, said = masklr(f"--resume={run}")
    assert code == 0, said
    assert faults.differences(whole, run) == []


def test_run_folder_that_is_moved_away_ends_the_run_which_goes_on_where_it_is(
    recipe: Path, whole: Path, masklr: Masklr, faults: ModuleType, tmp_path: Path
) -> None:
    run, moved = tmp_path / "runs" / "faults_digits" / "version_0", tmp_path / "moved"
    fault = f"at(5, lambda trainer: shutil.move({str(run)!r}, {str(moved)!r}))"
    result = masklr(f"--config={recipe}", *OPTIONS, f"--runs={tmp_path / 'runs'}", fault=fault)
    assert sentence(result) == f"Expected the run's folder {run} to stay where it is while the run goes on."
    assert not run.exists()
    (moved / "run.lock").unlink(missing_ok=True)
    code, said = masklr(f"--resume={moved}")
    assert code == 0, said
    assert faults.differences(whole, moved) == []


def test_folder_of_another_user_is_one_sentence(whole: Path, masklr: Masklr) -> None:
    # Root may write anywhere, so the process becomes another user.
    fault = "if os.geteuid() == 0: os.seteuid(65534)"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        run = Path(name) / "version_0"
        shutil.copytree(whole, run)
        run.chmod(0o555)
        told = sentence(masklr(f"--resume={run}", "--trainer.max_steps=9", fault=fault))
    assert told == f"Cannot write into the run's folder {run}: Permission denied."


# ----------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def shards(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    faults.write_shards(folder)
    return folder


def sharded(folder: Path, **options: Any) -> list[str]:
    """Options that give the digits as shards, read in place."""
    given = {"train": folder / "digits-*.tar", "in_chans": 1, "in_memory": "false", "batch_size": 64}
    given |= {"val_fraction": 0.25, "image_size": 8, "num_workers": 0, **options}
    return ["--data=masklr.data.ShardedImages", *(f"--data.init_args.{key}={value}" for key, value in given.items())]


CUT = "at(5, lambda trainer: os.truncate({shard!r}, 30_000))"
# Another shard of the same samples in another order, in its place: each image lies where another one lay.
REPLACED = """
def fault(trainer):
    data = bytearray(Path({shard!r}).read_bytes())
    data[:20_480], data[20_480:40_960] = data[20_480:40_960], data[:20_480]
    Path({shard!r}).write_bytes(data)
at(5, fault)
"""


@pytest.fixture(scope="module")
def whole_of_shards(recipe: Path, shards: Path, masklr: Masklr, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on shards to which nothing happens."""
    runs = tmp_path_factory.mktemp("whole_of_shards")
    code, told = masklr(f"--config={recipe}", *OPTIONS, *sharded(shards), f"--runs={runs}")
    assert code == 0, told
    return next(runs.glob("*/version_0"))


@pytest.mark.parametrize(("fault", "workers"), [(CUT, 0), (REPLACED, 0), (CUT, 1)])
def test_shard_that_is_cut_or_replaced_ends_the_run_which_then_goes_on_exactly(
    fault: str,
    workers: int,
    recipe: Path,
    shards: Path,
    whole_of_shards: Path,
    masklr: Masklr,
    faults: ModuleType,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = str(copy / "digits-001.tar")
    arguments = [f"--config={recipe}", *OPTIONS, *sharded(copy, num_workers=workers), f"--runs={tmp_path / 'runs'}"]
    result = masklr(*arguments, fault=fault.format(shard=shard))
    (run,) = tmp_path.glob("runs/*/version_0")
    told = sentence(result)
    assert told.startswith("digits-001.tar: sample ")
    assert told.endswith("the shard was changed or replaced since it was indexed.")
    check_last_checkpoint(run, (4, 6), result[1])  # some batches were fetched ahead
    shutil.copyfile(shards / "digits-001.tar", shard)
    code, said = masklr(f"--resume={run}")
    assert code == 0, said
    assert faults.differences(whole_of_shards, run) == []


def test_samples_are_skipped_up_to_the_ceiling_and_counted(
    recipe: Path, shards: Path, masklr: Masklr, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    arguments = [f"--config={recipe}", *OPTIONS, f"--runs={tmp_path / 'runs'}"]
    data = bytearray((copy / "digits-001.tar").read_bytes())
    for place in [found.start() for found in re.finditer(b"IHDR", data)][::20]:
        data[place + 4] ^= 255
    (copy / "digits-001.tar").write_bytes(data)
    fault = CUT.format(shard=str(copy / "digits-001.tar"))
    code, said = masklr(*arguments, *sharded(copy, on_error="skip", max_skipped=0.25))
    assert code == 0, said
    assert "train: skipped " in said
    assert " of 1797 samples that cannot be read." in said
    shutil.copyfile(shards / "digits-001.tar", copy / "digits-001.tar")
    result = masklr(*arguments, *sharded(copy, on_error="skip", max_skipped=0.02), fault=fault)
    told = sentence(result)
    assert "`max_skipped` = 0.02 of samples that cannot be used, got 36 of 1797; the last is digits-001.tar:" in told


KILLED = """
def fault(trainer):
    for child in multiprocessing.active_children():
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
at(5, fault)
"""


def test_killed_worker_process_ends_the_run_in_one_sentence(
    recipe: Path, shards: Path, masklr: Masklr, tmp_path: Path
) -> None:
    arguments = [f"--config={recipe}", *OPTIONS, *sharded(shards, num_workers=2), f"--runs={tmp_path}"]
    result = masklr(*arguments, "--trainer.max_steps=40", fault=KILLED)
    told = sentence(result)
    assert told.startswith("Expected the worker processes of the data (`num_workers`) to go on, but ")
    assert told.endswith((" has ended (signal: Killed).", " has ended."))  # as it was noticed
    (run,) = tmp_path.glob("*/version_0")
    newest = newest_sound(run / "checkpoints")
    assert newest is not None
    code, said = masklr(f"--resume={run}", f"--trainer.max_steps={read(newest)['global_step'] + 2}")
    assert code == 0, said


# -------------------------------------------------------------------------------------------------------------- numbers


POISONED = """
handles = []
def poison(layer, inputs, output):
    output = output.clone()
    output[2] = float("nan")
    return output
def fault(trainer):
    handles.append(trainer.lightning_module.model.encoder.norm.register_forward_hook(poison))
at(5, fault)
at(6, lambda trainer: handles.pop().remove())
"""


def test_nan_ends_the_run_in_one_sentence_and_the_run_goes_on_exactly_without_it(
    recipe: Path, whole: Path, masklr: Masklr, faults: ModuleType, tmp_path: Path
) -> None:
    result = masklr(f"--config={recipe}", *OPTIONS, f"--runs={tmp_path}", fault=POISONED)
    (run,) = tmp_path.glob("*/version_0")
    batch = run / "nonfinite" / "step=00000005.pt"
    kept = torch.load(batch, weights_only=True)
    assert sentence(result) == (
        "Expected a finite loss and gradient, got NaN or infinity at step 5: the output of 'model.encoder.norm', in "
        f"sample {kept['batch'][2][2].item()} of the training split; batch: {batch}."
    )
    check_last_checkpoint(run, 4, result[1])
    code, said = masklr(f"--resume={run}")
    assert code == 0, said
    assert faults.differences(whole, run) == []


def test_steps_with_nan_are_skipped_as_often_as_asked_and_logged(recipe: Path, masklr: Masklr, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["trainer"]["callbacks"].append({"class_path": "masklr.callbacks.NonFinite", "init_args": {"skip": 1}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    code, said = masklr(f"--config={tmp_path / 'recipe.yaml'}", *OPTIONS, f"--runs={tmp_path}", fault=POISONED)
    assert code == 0, said
    assert "Skipped 1 of at most 1 steps. Expected a finite loss" in said
    (run,) = tmp_path.glob("*/version_0")
    with (run / "metrics.csv").open(newline="") as file:
        counts = {row["step"]: row["nonfinite/skipped"] for row in csv.DictReader(file) if row["nonfinite/skipped"]}
    assert counts == {"5": "1.0"}
    state = read(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
