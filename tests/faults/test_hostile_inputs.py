"""A short form of scripts/hostile_inputs, and that it sees what must not happen."""

import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def test_spoiled_inputs_are_used_or_answered_with_one_sentence() -> None:
    options = ["--count", "120", "--processes", "1", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(ROOT / "scripts" / "hostile_inputs"), *options]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "120 cases, 0 violations" in done.stdout


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    loader = SourceFileLoader("hostile_inputs", str(ROOT / "scripts" / "hostile_inputs"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hostile_inputs", module)  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_hang_crash_code_change_and_an_error_without_a_sentence_are_violations(
    hostile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from masklr.data import Digits

    def kind(use):
        def made(rng, originals, folder):
            (folder / "input").write_text("as it was")
            return lambda: use(folder)

        return made, 1

    uses = {
        "used": lambda folder: None,
        "sentence": lambda folder: Digits(batch_size=0),
        "hang": lambda folder: time.sleep(60),
        "crash": lambda folder: os.abort(),
        "code": lambda folder: (folder.parent / "canary").touch(),
        "change": lambda folder: (folder / "input").write_text("another"),
        "error": lambda folder: {}["missing"],
    }
    kinds = {name: kind(use) for name, use in uses.items()}
    monkeypatch.setattr(hostile, "KINDS", kinds)
    tally = hostile.run_all([(name, 0) for name in kinds], 0, tmp_path, tmp_path, processes=1, limit=2.0)
    assert tally.outcomes["used", "used"] == 1
    assert tally.outcomes["sentence", "one sentence"] == 1
    told = {name: what for name, _, what in tally.violations}
    assert told["hang"] == "a hang of more than 2 s"
    assert told["crash"] == "a crash of the interpreter, exit code -6"
    assert told["code"] == "code was run (used)"
    assert told["change"] == "an input was changed (used)"
    assert told["error"].startswith("KeyError in test_hostile_inputs.py")
    assert len(told) == 5


def test_same_seed_spoils_the_same(hostile: ModuleType) -> None:
    import random

    from hostile_cases import spoiled

    data = bytes(range(256)) * 4
    draws = [spoiled(data, random.Random(seed)) for seed in (3, 3, *range(40))]
    assert draws[0] == draws[1]
    assert len(set(draws[2:])) == 40
    assert data not in draws
