"""The script that compares a recipe with its control."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "classify_digits_dropconnect.yaml"
CONTROL = ROOT / "configs" / "classify_digits_control.yaml"
SHORT = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("mask_vs_control")


def test_interval_is_that_of_students_t(script):
    values = [3.1, 2.7, 4.4, 3.3]
    mean, half = script.interval(values)
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), expected)
    assert script.interval([2.0]) == (2.0, math.inf)


def test_table_pairs_by_seed(script):
    control = [{"val/loss": [(0, 9.0), (4, 1.0 + seed)]} for seed in range(3)]
    masked = [{"val/loss": [(0, 9.0), (4, 0.5 + seed)]} for seed in range(3)]
    row = script.table("masked", "control", masked, control).splitlines()[-1]
    # Seeds differ by as much as they do; the difference is the same for each.
    assert row.split(maxsplit=2)[2].endswith("-0.5000 [-0.5000, -0.5000]")
    assert re.search(r"2\.0000 \[-0\.4841, 4\.4841\] +1\.5000", row)


def test_recipe_and_control_are_run_and_compared(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.main([str(RECIPE), "--seeds", "2", *SHORT]) == 0
    printed = capsys.readouterr()
    assert "classify_digits_dropconnect against control, 2 seeds, 6 steps" in printed.out
    for label in ("accuracy, %", "validation loss", "effective rank of weights", "effective rank of representations"):
        assert len(re.findall(rf"^{re.escape(label)} .*\[.*\[.*\[", printed.out, re.MULTILINE)) == 1, label
    assert "4 of 4" in printed.err
    assert (tmp_path / "runs/mask_vs_control/curves.png").stat().st_size > 10_000
    with (tmp_path / "runs/mask_vs_control/values.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Before the first step a pair is the same network: same seed, and masks leave the evaluation path alone.
    start = {
        (row["condition"], row["seed"]): row["value"] for row in rows if row["key"] == "val/loss" and row["step"] == "0"
    }
    for seed in ("0", "1"):
        assert start["control", seed] == start["classify_digits_dropconnect", seed]
    assert start["control", "0"] != start["control", "1"]
    configs = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.glob("runs/*/version_*/config.yaml"))]
    found = {
        (c["name"], c["seed_everything"], c["data"]["init_args"]["seed"], bool(c["model"]["init_args"]["masks"]))
        for c in configs
    }
    names = ("classify_digits_dropconnect", "classify_digits_dropconnect_control")
    assert found == {(name, seed, seed, name == names[0]) for name in names for seed in (0, 1)}


def test_control_that_differs_in_more_than_masks_is_refused(script, tmp_path):
    recipe = yaml.safe_load(CONTROL.read_text())
    recipe["model"]["init_args"]["optim"]["weight_decay"] = 0.1
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"in `masks` alone, found model\.init_args\.optim\.weight_decay\."):
        script.main([str(RECIPE), "--control", str(other)])


@pytest.mark.parametrize("kind", ["dropout", "dropconnect", "groups"])
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_shipped_recipes_differ_from_their_control_in_masks_alone(script, data, kind):
    recipe, control = (ROOT / "configs" / f"classify_{data}_{name}.yaml" for name in (kind, "control"))
    script.check_pair(recipe, script.read_recipe(recipe), control)


def test_recipe_without_masks_is_refused(script):
    with pytest.raises(ValueError, match=r"Expected `masks` in the task of .*classify_digits_control\.yaml"):
        script.main([str(CONTROL)])


def test_missing_recipe_is_named(script, tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read the recipe .*nothing\.yaml: No such file"):
        script.main([str(tmp_path / "nothing.yaml")])
