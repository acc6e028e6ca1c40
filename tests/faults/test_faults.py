"""A short form of scripts/faults: real processes, killed and resumed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_and_resumed_run_is_the_one_that_nobody_killed() -> None:
    options = ["--kills", "2", "--precision", "32-true", "--workers", "0", "--seed", "1", "--trainer.max_steps=60"]
    run = [sys.executable, str(ROOT / "scripts" / "faults"), *options]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills in" in done.stdout
    assert "unreadable: 0" in done.stdout
    assert "differences: 0" in done.stdout


def test_run_of_two_processes_that_hold_parts_of_the_weights_survives_too() -> None:
    options = ["--kills", "1", "--processes", "2", "--strategy", "FullyShard", "--precision", "bf16-mixed"]
    run = [sys.executable, str(ROOT / "scripts" / "faults"), *options, "--workers", "0", "--trainer.max_steps=25"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, FullyShard: 1 kills in" in done.stdout
    assert "differences: 0" in done.stdout


def test_forked_run_of_two_processes_is_killed_and_survives() -> None:
    options = ["--fork", "--kills", "2", "--processes", "2", "--precision", "32-true", "--workers", "0", "--seed", "2"]
    run = [sys.executable, str(ROOT / "scripts" / "faults"), *options, "--trainer.max_steps=40"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, DDPStrategy: 2 kills in" in done.stdout
    assert "differences: 0" in done.stdout
