"""Runs that were interrupted and go on: bitwise the uninterrupted run, in the same folder."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning import Callback

from masklr import __version__, checkpoints
from masklr.callbacks import RunCheckpoint
from masklr.checkpoint_files import newest_sound, step_of
from masklr.checkpoints import read, write
from masklr.cli import main
from masklr.resumed_run import ResumedRun

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "faults" / "digits.yaml"
# 4 batches an epoch.
SHORT = ["--data.init_args.batch_size=256", "--trainer.max_steps=9", "--trainer.log_every_n_steps=2", "--wandb=off"]


@pytest.fixture(scope="module")
def faults(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("faults")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASKLR_RUN_FOLDER", "MASKLR_DEBUG", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def recipe(folder: Path, val_check_interval: int) -> Path:
    """The recipe of the faults with a checkpoint at every step, and measurements every few."""
    content = yaml.safe_load(RECIPE.read_text())
    content["trainer"]["val_check_interval"] = val_check_interval
    for callback in content["trainer"]["callbacks"]:
        if "every_n_steps" in (options := callback["init_args"]):
            options["every_n_steps"] = {"RunCheckpoint": 1, "WeightSpectrum": 3, "GradientSpectrum": 2}.get(
                callback["class_path"].rpartition(".")[2], 4
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Snapshots:
    """Copies of a run's folder just before and just after each checkpoint: what a kill there leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.write = folder, checkpoints.write
        self.taken: list[Path] = []

    def __call__(self, checkpoint: dict, path: Path) -> None:
        if list(path.parent.glob("step=*.ckpt")):
            self.take(f"before_{path.stem}", path.parents[1])
        self.write(checkpoint, path)
        self.take(f"after_{path.stem}", path.parents[1])

    def take(self, name: str, run: Path) -> None:
        copy = self.folder / name / "version_0"
        shutil.copytree(run, copy, ignore=lambda folder, names: {"run.lock"} & set(names))
        self.taken.append(copy)


def whole_run(folder: Path, arguments: list[str], snapshots: bool = True) -> tuple[Path, dict[str, Path]]:
    """A run that nobody interrupts, and what was in its folder meanwhile."""
    taker = Snapshots(folder / "snapshots")
    if snapshots:
        checkpoints.write = taker
    try:
        assert main(["fit", *arguments, f"--runs={folder / 'whole'}"]) == 0
    finally:
        checkpoints.write = taker.write
    (whole,) = folder.glob("whole/*/version_0")
    return whole, {path.parent.name: path for path in taker.taken}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("runs")
    return whole_run(folder, [f"--config={recipe(folder, 3)}", *SHORT])


@pytest.fixture
def interrupted(runs: tuple[Path, dict[str, Path]], tmp_path: Path) -> Path:
    """A run that was killed at step 5, of 9."""
    shutil.copytree(runs[1]["after_step=00000005"], tmp_path / "version_0")
    return tmp_path / "version_0"


# ------------------------------------------------------------------------------------------------------------ exactness


# Before the log of a step; after a validation; when an epoch ends; before and after the last checkpoint.
@pytest.mark.parametrize(
    "moment",
    ["after_step=00000002", "after_step=00000003", "before_step=00000005", "before_step=00000009",
     "after_step=00000009"],
)  # fmt: skip
def test_resumed_run_is_bitwise_the_uninterrupted_one(moment: str, runs, faults: ModuleType, tmp_path: Path) -> None:
    whole, snapshots = runs
    shutil.copytree(snapshots[moment], tmp_path / "version_0")
    assert main(["fit", "--resume", str(tmp_path / "version_0")]) == 0
    assert faults.differences(whole, tmp_path / "version_0") == []


@pytest.mark.parametrize(
    ("arguments", "val_check_interval", "moments"),
    [
        # Validation at the end of an epoch.
        ([], 4, ["after_step=00000004", "before_step=00000009"]),
        # Eight batches an epoch, two a step; validations that fall between them.
        (["--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed"], 3, ["after_step=00000003"]),
        # An end by epochs.
        (["--trainer.max_steps=-1", "--trainer.max_epochs=2"], 3, ["after_step=00000005"]),
    ],
)
def test_other_loops_are_resumed_exactly(
    arguments: list[str], val_check_interval: int, moments: list[str], faults: ModuleType, tmp_path: Path
) -> None:
    whole, snapshots = whole_run(tmp_path, [f"--config={recipe(tmp_path, val_check_interval)}", *SHORT, *arguments])
    for moment in moments:
        assert main(["fit", f"--resume={snapshots[moment]}"]) == 0
        assert faults.differences(whole, snapshots[moment]) == []


def test_shards_with_workers_are_resumed_exactly(faults: ModuleType, tmp_path: Path) -> None:
    options = faults.data_options(faults.RECIPE, 2, tmp_path)
    crops = ["--data.init_args.random_resized_crop=[0.5,1.0]", "--data.init_args.image_size=8"]
    arguments = [*SHORT, *options, *crops, "--data.init_args.batch_size=256"]
    whole, snapshots = whole_run(tmp_path, [f"--config={recipe(tmp_path, 3)}", *arguments, "--trainer.max_steps=7"])
    assert main(["fit", f"--resume={snapshots['after_step=00000004']}"]) == 0
    assert faults.differences(whole, snapshots["after_step=00000004"]) == []


def test_comparison_sees_one_bit_one_row_and_one_file(runs, faults: ModuleType, tmp_path: Path) -> None:
    whole, _ = runs
    copy = tmp_path / "version_0"
    shutil.copytree(whole, copy)
    assert faults.differences(whole, copy) == []
    path = copy / "checkpoints" / "last.ckpt"
    content = read(path)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name].view(torch.int32).view(-1)[0] ^= 1
    write(content, path)
    (copy / "metrics.csv").write_text("".join((whole / "metrics.csv").read_text().splitlines(keepends=True)[:-1]))
    next(copy.glob("spectra/weight_spectrum/*")).unlink()
    found = faults.differences(whole, copy)
    assert f"last.ckpt: state_dict.{name}" in found
    assert any("metrics.csv" in entry and "lost" in entry for entry in found)
    assert any("spectra/weight_spectrum" in entry and "one run only" in entry for entry in found)


# -------------------------------------------------------------------------------------------------------------- signals


class Signal(Callback):
    """Sends this process a signal in a step, as a scheduler would."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2), (signal.SIGTERM, 3)])
def test_signal_has_a_checkpoint_written_and_the_run_goes_on_exactly(
    number: int, step: int, runs, faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 3 is taken before a validation, step 4 at the end of an epoch.
    content = yaml.safe_load(recipe(tmp_path, 3).read_text())
    content["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = None
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    requeued = tmp_path / "requeued"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {requeued}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    from masklr.recipe_cli import RecipeCLI

    plain = RecipeCLI.instantiate_trainer

    def with_signal(self, **options):
        trainer = plain(self, **options)
        trainer.callbacks.insert(0, Signal(number, step))
        return trainer

    monkeypatch.setattr(RecipeCLI, "instantiate_trainer", with_signal)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={tmp_path / 'recipe.yaml'}", *SHORT, f"--runs={tmp_path / 'runs'}"])
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    (run,) = tmp_path.glob("runs/*/version_0")
    reached = {1: 2, 2: 3, 3: 5}[step]  # an epoch's last batch is no place to stop
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == reached
    assert not (run / "run.lock").exists()
    assert requeued.exists() == (number == signal.SIGUSR1)
    if requeued.exists():
        assert requeued.read_text() == "requeue 4711\n"
    assert main(["fit", f"--resume={run}"]) == 0
    found = faults.differences(runs[0], run)
    # The one before the last is that of the last validation, since this run has no cadence.
    assert [entry for entry in found if ".ckpt is in one run only" not in entry] == []


class SignalInFirstValidation(Callback):
    """Sends this process a signal while the initialization is measured, and as many more as are asked for."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times = number, times

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.sanity_checking and batch_idx == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is where a script has put the tests into the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_signal_before_the_first_step(
    number: int, times: int, runs, faults: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: None
) -> None:
    from masklr.recipe_cli import RecipeCLI

    plain = RecipeCLI.instantiate_trainer

    def with_signal(self, **options):
        trainer = plain(self, **options)
        trainer.callbacks.append(SignalInFirstValidation(number, times))
        return trainer

    monkeypatch.setattr(RecipeCLI, "instantiate_trainer", with_signal)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={recipe(tmp_path, 3)}", *SHORT, f"--runs={tmp_path / 'runs'}"])
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == handler
    if times == 2:
        assert not list(tmp_path.glob("runs/*/*"))
        return
    (run,) = tmp_path.glob("runs/*/version_0")
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == 1
    assert main(["fit", f"--resume={run}"]) == 0
    found = faults.differences(runs[0], run)
    assert [entry for entry in found if ".ckpt is in one run only" not in entry] == []


def ended_by(number: int, arguments: list[str], runs: Path, step: int) -> str:
    """What a process of `masklr fit` says that is sent a signal once it has a checkpoint of a later step."""
    program = (
        "import signal, sys; from masklr.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "fit", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **output) as process:
        try:
            while process.poll() is None:
                if any(step_of(path) > step for path in runs.glob("*/version_0/checkpoints/step=*.ckpt")):
                    break
                time.sleep(0.05)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches workers too
            else:
                process.terminate()
            told, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert ("masklr: Ctrl-C: ends after the next checkpoint" in errors) == (number == signal.SIGINT)
    return told


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_process_that_is_sent_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(
    number: int, workers: int, faults: ModuleType, tmp_path: Path
) -> None:
    options = [*SHORT, "--trainer.max_steps=100000", f"--runs={tmp_path / 'runs'}"]
    begin = [f"--config={recipe(tmp_path, 3)}", *options, *faults.data_options(RECIPE, workers, tmp_path)]
    run, step = tmp_path / "runs" / "faults_digits" / "version_0", 0
    for arguments in (begin, [f"--resume={run}"]):
        told = ended_by(number, arguments, tmp_path / "runs", step)
        step = read(run / "checkpoints" / "last.ckpt")["global_step"]
        assert f"masklr: {signal.Signals(number).name} at step {step}; to go on: masklr fit --resume {run}" in told
        assert newest_sound(run / "checkpoints") == run / "checkpoints" / f"step={step:08d}.ckpt"
    assert main(["fit", f"--resume={run}", f"--trainer.max_steps={step + 3}"]) == 0
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == step + 3


@pytest.fixture
def listening(tmp_path: Path, heard: None) -> Iterator[RunCheckpoint]:
    """A callback that listens for signals, which this process then no longer does."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    callback = RunCheckpoint()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    callback.on_sanity_check_start(trainer, pl.LightningModule())
    yield callback
    for number, handler in former.items():
        signal.signal(number, handler)


def test_signal_that_came_first_counts_and_ctrl_c_ends_at_once(listening: RunCheckpoint) -> None:
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # of SLURM's limit: the job is still to be put back into the queue
    assert listening._signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_heard_where_nobody_reads_what_is_told(listening: RunCheckpoint) -> None:
    """As in `masklr fit ... |& tee log`, whose `tee` it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    try:
        os.dup2(writer, 2)
        signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)
    assert listening._signal == signal.SIGINT


# ------------------------------------------------------------------------------------------------- flags and bad input


def answer(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one sentence that a failing command prints."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("masklr: error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("masklr: error: ")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flag_wins_over_the_recipe_and_is_reported(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    former = (interrupted / "config.yaml").read_text()
    flags = ["--trainer.max_steps=6", "--model.optim.weight_decay=0.5", "--model.optim.base_lr=0.1"]
    assert main(["fit", f"--resume={interrupted}", *flags, "--model.optim.schedule=constant"]) == 0
    told = capsys.readouterr().err
    assert "goes on at step 5; " in told
    assert "trainer.max_steps 6 instead of 9" in told
    assert "model.init_args.optim.base_lr 0.1 instead of 0.004" in told
    state = read(interrupted / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 6
    assert [group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]
    assert [group["lr"] for group in state["optimizer_states"][0]["param_groups"]] == [0.1, 0.1]
    recipe = (interrupted / "config.yaml").read_text()
    assert yaml.safe_load(recipe)["trainer"]["max_steps"] == 6
    assert recipe.splitlines()[0] == former.splitlines()[0]
    assert recipe.startswith("# pytorch_lightning==")
    assert (interrupted / "config_until_step=00000005.yaml").read_text() == former


def test_flag_that_does_not_fit_leaves_the_run_as_it_was(
    runs, interrupted: Path, faults: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(interrupted)
    told = answer(capsys, ["fit", f"--resume={interrupted}", "--model.init_args.model.init_args.decoder_depth=2"])
    assert "decoder_blocks.1" in told
    after = contents(interrupted)
    assert {path: after[path] for path in before} == before
    assert after.keys() - before.keys() <= {interrupted / "run.lock"}
    assert main(["fit", f"--resume={interrupted}"]) == 0
    assert faults.differences(runs[0], interrupted) == []


def test_flag_of_a_class_wins_over_the_recipe(interrupted: Path) -> None:
    resumed = ResumedRun(interrupted, ["--trainer.strategy.class_path", "FullyShard"])
    sharded = {"class_path": "masklr.strategies.FullyShard", "init_args": {"timeout": "0:30:00"}}
    resumed.compare("trainer: {strategy: auto}", yaml.safe_dump({"trainer": {"strategy": sharded}}))
    assert resumed.changes == {"trainer.strategy": ("auto", sharded)}
    with pytest.raises(ValueError, match=r"got another: trainer\.devices is 2, not 1"):
        resumed.compare("trainer: {devices: 1}", "trainer: {devices: 2}")


def test_learning_rate_on_the_command_line_holds_from_the_first_step(interrupted: Path) -> None:
    before = read(interrupted / "checkpoints" / "step=00000005.ckpt")["state_dict"]
    moved = []
    for lr in ("0.004", "0.0000000001"):
        copy = interrupted.parent / lr
        shutil.copytree(interrupted, copy)
        assert main(["fit", f"--resume={copy}", "--trainer.max_steps=6", f"--model.optim.base_lr={lr}"]) == 0
        after = read(copy / "checkpoints" / "last.ckpt")["state_dict"]
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in before))
    assert moved[0] > 1e-4
    assert moved[1] < 1e-7


def test_finished_run_is_left_as_it_is_and_can_be_made_longer(runs, tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    shutil.copytree(runs[0], run)
    before = contents(run)
    assert main(["fit", f"--resume={run}"]) == 0
    assert contents(run) == before
    assert main(["fit", f"--resume={run}", "--trainer.max_steps=11"]) == 0
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == 11
    assert (run / "spectra" / "weight_spectrum" / "step=00000011.npz").exists()


def test_damaged_newest_checkpoint_is_passed_over(runs, faults, interrupted: Path, caplog) -> None:
    newest = interrupted / "checkpoints" / "step=00000005.ckpt"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert main(["fit", f"--resume={interrupted}"]) == 0
    assert "Passed over" in caplog.text
    assert faults.differences(runs[0], interrupted) == []


def test_half_written_files_of_a_killed_process_are_removed(runs, faults, interrupted: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("checkpoints/.last.ckpt", "spectra/weight_spectrum/.step=00000006.npz", ".metrics.csv"):
        (interrupted / f"{name}.{dead.pid}").touch()
    assert main(["fit", f"--resume={interrupted}"]) == 0
    assert faults.differences(runs[0], interrupted) == []
    assert not list(interrupted.rglob(".*"))


@pytest.mark.parametrize(
    ("spoil", "arguments", "told"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), [], "Expected a run with a checkpoint to resume, but"),
        (lambda run: shutil.rmtree(run), [], "there is no folder"),
        (lambda run: (run / "config.yaml").unlink(), [], "has no config.yaml"),
        (lambda run: None, ["--ckpt_path=x.ckpt"], "Expected no `ckpt_path` beside `resume`"),
        (lambda run: None, ["--trainer.max_step=3"], "did you mean trainer.max_steps"),
        (lambda run: None, ["--trainer.max_steps=5"], "Expected `trainer.max_steps` above 5, where "),
        (lambda run: None, ["--trainer.max_epochs=0"], "Expected `trainer.max_epochs` above "),
        (lambda run: None, ["--name=other"], "Expected no `name` beside `resume`"),
        (
            lambda run: None,
            [f"--config={ROOT / 'configs' / 'pretrain_digits.yaml'}"],
            "data.init_args.batch_size is 64, not 256; name is 'pretrain_digits', not 'faults_digits'.",
        ),
    ],
)
def test_what_cannot_be_resumed_is_one_sentence_and_the_folder_stays_as_it_is(
    spoil, arguments: list[str], told: str, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(interrupted)
    before = contents(interrupted)
    assert told in answer(capsys, ["fit", f"--resume={interrupted}", *arguments])
    assert contents(interrupted) == before


def test_folder_of_runs_is_answered_with_its_newest(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (interrupted.parent / "version_1").mkdir()
    (interrupted.parent / "version_1" / "config.yaml").touch()
    os.utime(interrupted.parent / "version_1" / "config.yaml", (1, 1))
    assert answer(capsys, ["fit", f"--resume={interrupted.parent}"]).endswith(f"did you mean {interrupted}?")


def test_run_of_a_newer_version_is_refused(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = interrupted / "checkpoints" / "step=00000005.ckpt"
    content = read(path)
    assert content["masklr"]["version"] == __version__
    content["masklr"]["version"] = "99.1.0"
    write(content, path)
    told = answer(capsys, ["fit", f"--resume={interrupted}"])
    assert told == f"Expected a run of masklr {__version__} or older to resume, got one of 99.1.0."


def test_same_recipe_beside_resume_is_accepted(interrupted: Path, runs) -> None:
    config = runs[0].parents[2] / "recipe.yaml"
    assert main(["fit", f"--resume={interrupted}", f"--config={config}", *SHORT]) == 0


def test_option_that_is_younger_than_the_run_is_no_difference(interrupted: Path, capsys) -> None:
    content = yaml.safe_load((interrupted / "config.yaml").read_text())
    del content["trainer"]["callbacks"][1]["init_args"]["picture"]
    del content["model"]["init_args"]["mask_seed"]
    (interrupted / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", f"--resume={interrupted}", "--trainer.callbacks.init_args.end=0.4"]) == 0
    assert "goes on at step 5; trainer.callbacks.7.init_args.end 0.4 instead of 0.5" in capsys.readouterr().err


def test_failing_resumed_run_keeps_its_folder(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(interrupted)
    assert "abacus" in answer(capsys, ["fit", f"--resume={interrupted}", "--trainer.accelerator=abacus"])
    assert contents(interrupted) == before


# ------------------------------------------------------------------------------------------------------ folder in use


def lock(run: Path, **owner: object) -> Path:
    from masklr.processes import start_of

    pid = owner.get("pid", os.getppid())
    path = run / "run.lock"
    path.write_text(
        json.dumps({"pid": pid, "host": os.uname().nodename, "started": start_of(pid), "slurm_job": None, **owner})
    )
    return path


@pytest.mark.parametrize("host", [os.uname().nodename, "another"])
def test_folder_in_use_by_another_process_is_refused(
    host: str, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lock(interrupted, host=host)
    told = answer(capsys, ["fit", f"--resume={interrupted}"])
    assert f"is in use by process {os.getppid()} on {host}; if that is no more, remove {path}." in told
    assert path.exists()


def test_lock_of_a_dead_process_is_taken_over(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from masklr.loggers import RunLock

    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked how: a zombie
    lock(interrupted, pid=dead.pid, started="1")
    RunLock(interrupted).release()
    dead.wait()
    lock(interrupted, started="1")  # the number was given to another process since
    RunLock(interrupted).release()
    (interrupted / "run.lock").write_text("{")
    RunLock(interrupted).release()
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # an earlier life of this job, on another machine
    lock(interrupted, host="another", slurm_job="12")
    taken = RunLock(interrupted)
    assert json.loads((interrupted / "run.lock").read_text())["pid"] == os.getpid()
    taken.release()
    assert not list(interrupted.glob("*lock*"))
    assert not list(interrupted.glob(".*lock*"))


# --------------------------------------------------------------------------------------------------------------- wandb


def wandb_steps(folder: Path) -> dict[int, dict[str, str]]:
    """What a run of wandb's holds offline, by global step: the union of its folders, the later one winning."""
    from wandb.proto import wandb_internal_pb2 as proto

    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, place, record, steps = path.read_bytes()[7:], 0, b"", {}
        while place + 7 <= len(data):
            # LevelDB's log: blocks of 32 KiB, in each a header of checksum, size and kind (1 whole, 2 first, 4 last).
            if 32768 - (place + 7) % 32768 < 7:
                place += 32768 - (place + 7) % 32768
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            record = (b"" if kind in (1, 2) else record) + data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4) and record:
                entry = proto.Record.FromString(record)
                items = {item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item}
                if "trainer/global_step" in items:
                    step = int(items["trainer/global_step"])
                    assert not set(steps.get(step, {})) & set(items) - {
                        "trainer/global_step",
                        "epoch",
                        "_timestamp",
                        "_runtime",
                        "_step",
                    }
                    steps.setdefault(step, {}).update(items)
        for step, items in steps.items():
            found.setdefault(step, {}).update(items)
    return found


def test_wandb_of_a_resumed_run_holds_each_step_once(faults: ModuleType, tmp_path: Path) -> None:
    arguments = ["--data.init_args.batch_size=256", "--trainer.log_every_n_steps=1", "--trainer.max_steps=9"]
    stopping = (
        "import os, signal, sys; from masklr import checkpoints; from masklr.cli import main\n"
        "write = checkpoints.write\n"
        "def dying(content, path):\n    write(content, path)\n"
        "    if path.name == 'step=00000005.ckpt': os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoints.write = dying\nmain(sys.argv[1:])"
    )
    first = [f"--config={recipe(tmp_path, 3)}", *arguments, f"--runs={tmp_path / 'runs'}", "--wandb=offline"]
    # A service of wandb's that the test process has started would keep the killed run.
    alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", stopping, "fit", *first], capture_output=True, env=alone)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = tmp_path.glob("runs/*/version_0")
    assert main(["fit", f"--resume={folder}"]) == 0
    parts = sorted(path.name for path in folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2
    assert len({name.rpartition("-")[2] for name in parts}) == 1, "one run of wandb's, with one id"
    steps = wandb_steps(folder)
    with (folder / "metrics.csv").open(newline="") as file:
        losses = {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}
    assert list(losses) == list(range(9))
    assert {step: items["train/loss"] for step, items in steps.items() if "train/loss" in items} == losses


# --------------------------------------------------------------------------------------------------------------- SLURM


def test_slurm_script_asks_for_the_signal_and_resumes_its_own_run(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "fit.sbatch"
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    for line in ("#SBATCH --requeue", "#SBATCH --signal=USR1@300", "#SBATCH --open-mode=append"):
        assert line in text.splitlines()
    # A masklr that says what it was asked for.
    (tmp_path / "bin").mkdir()
    step = '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"'  # of one job: a process that fails ends the others
    for name, body in (("srun", step), ("masklr", f'echo "$@" >> {tmp_path}/asked')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NAME": "mae", "SLURM_JOB_ID": "7"}
    for attempt in range(3):
        subprocess.run(
            ["bash", str(script), "recipe.yaml", "--seed_everything=1"], cwd=tmp_path, env=environment, check=True
        )
        folder = tmp_path / "runs" / "mae_7" / f"version_{min(attempt, 1)}"
        folder.mkdir(parents=True, exist_ok=True)
        if attempt == 1:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
    assert (tmp_path / "asked").read_text().splitlines() == [
        "fit --config recipe.yaml --name mae_7 --seed_everything=1",
        "fit --config recipe.yaml --name mae_7 --seed_everything=1",
        "fit --resume runs/mae_7/version_1 --seed_everything=1",
    ]


@pytest.mark.parametrize("codes", ["1 1 0", "1 1 1 1", "143"])
def test_torchrun_script_goes_on_after_a_failure_if_there_is_a_checkpoint(tmp_path: Path, codes: str) -> None:
    script = ROOT / "scripts" / "fit_torchrun"
    # A torchrun that says what it was asked for, leaves a checkpoint and ends with these codes, one after the other.
    (tmp_path / "bin").mkdir()
    (tmp_path / "codes").write_text(codes)
    (tmp_path / "bin" / "torchrun").write_text(
        f"""#!/bin/bash
echo "$@" >> {tmp_path}/asked
read -r code rest < {tmp_path}/codes; echo "$rest" > {tmp_path}/codes
mkdir -p runs/mae/version_0/checkpoints; touch runs/mae/version_0/checkpoints/last.ckpt
[ "$code" = 143 ] && kill -TERM $PPID && sleep 0.3
exit "$code"
"""
    )
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(script), "mae", "4", "recipe.yaml", "--seed_everything=1"]
    code = subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode
    assert code == {"1 1 0": 0, "1 1 1 1": 1, "143": 143}[codes]
    launch = "--standalone --nproc-per-node 4 --no-python masklr fit"
    first = f"{launch} --config recipe.yaml --name mae --trainer.devices 4 --seed_everything=1"
    again = f"{launch} --resume runs/mae/version_0 --trainer.devices 4 --seed_everything=1"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ([first] if codes == "143" else [first, again, again])


def test_batch_that_the_processes_cannot_share_is_refused_before_they_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--config={recipe(tmp_path, 3)}", *SHORT, "--trainer.devices=3", f"--runs={tmp_path / 'runs'}"]
    expected = "Expected `batch_size` to be a multiple of ranks x accumulated batches, 3 x 1, got 256."
    assert answer(capsys, ["fit", *options]) == expected
    assert not list(tmp_path.glob("runs/*/*"))
