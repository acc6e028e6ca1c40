"""The script that pretrains, fine-tunes and compares with training from scratch."""

import csv
import re
from pathlib import Path

import pytest
import yaml
from scipy.stats import ttest_rel

from masklr.cli import main as masklr

ROOT = Path(__file__).parents[1]
ENCODER = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SIZES = {"image_size": 8, "patch_size": 2, "in_chans": 1}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("transfer_table")


def recipe(task, model, callbacks, epochs, **sizes):
    return {
        "trainer": {"accelerator": "cpu", "max_epochs": epochs, "callbacks": callbacks, "num_sanity_val_steps": -1},
        "model": {
            "class_path": f"masklr.tasks.{task}",
            "init_args": {
                "model": {"class_path": f"masklr.models.{model}", "init_args": sizes},
                "mean": [0.305],
                "std": [0.376],
            },
        },
        "data": {"class_path": "masklr.data.Digits", "init_args": {"batch_size": 256}},
    }


@pytest.fixture
def small(tmp_path):
    """Options for recipes of seconds, on digits; what they make lives in `tmp_path`."""
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    probe = {"class_path": "masklr.callbacks.Probe", "init_args": {"module": "model.encoder", "layers": ["norm"]}}
    test = {"class_path": "masklr.callbacks.FinalTest"}
    pool = {"global_pool": "avg"}
    recipes = {
        "pretrain": recipe("Pretraining", "MaskedAutoencoder", [probe], 2, encoder_args=ENCODER, **SIZES, **decoder),
        "finetune": recipe(
            "Classification", "Classifier", [test], 1, backbone="runs/none/version_0", backbone_args=pool
        ),
        "scratch": recipe("Classification", "Classifier", [test], 1, backbone_args={**ENCODER, **pool}, **SIZES),
    }
    options = ["--runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "table.csv"), "--times", "2"]
    for piece, content in recipes.items():
        path = tmp_path / f"{piece}.yaml"
        path.write_text(yaml.safe_dump(content))
        options += [f"--{piece}", str(path)]
    return options


def rows(tmp_path):
    with (tmp_path / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_pieces_are_run_once_and_an_interrupted_one_goes_on(script, small, tmp_path, capsys, monkeypatch):
    assert script.main([*small, "--seeds", "3"]) == 1  # one seed has no interval
    printed = capsys.readouterr()
    assert re.findall(r"^seed 3, (\w+): ", printed.err, re.MULTILINE) == list(script.PIECES)
    found = {row["piece"]: row for row in rows(tmp_path)}
    assert [found[piece]["epochs"] for piece in script.PIECES] == ["2", "1", "1", "2"]
    runs = {path.parent.name: path for path in (tmp_path / "runs").glob("*/seed_3/*/version_0")}
    assert set(runs) == set(script.PIECES)
    recipes = {piece: yaml.safe_load((run / "config.yaml").read_text()) for piece, run in runs.items()}
    assert {recipe["seed_everything"] for recipe in recipes.values()} == {3}
    assert {recipe["data"]["init_args"]["seed"] for recipe in recipes.values()} == {3}
    assert recipes["finetune"]["model"]["init_args"]["model"]["init_args"]["backbone"] == str(runs["pretrain"])

    # Numbers are those of the runs' own commands, and the last epoch's.
    last = runs["scratch_long"] / "checkpoints" / "last.ckpt"
    test = ["test", "--config", str(runs["scratch_long"] / "config.yaml"), "--ckpt_path", str(last), "--wandb", "off"]
    monkeypatch.chdir(tmp_path)
    assert masklr(test) == 0
    expected = float(re.search(r"test/accuracy\W+([\d.]+)", capsys.readouterr().out).group(1))
    assert float(found["scratch_long"]["test_accuracy"]) == pytest.approx(100 * expected, abs=0.01)

    # Run again, nothing is run; of a piece without a row, the run that is there goes on.
    lines = (tmp_path / "table.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table.csv").write_text("".join(line for line in lines if not line.startswith("3,finetune")))
    assert script.main([*small, "--seeds", "3"]) == 1
    assert re.findall(r"^seed 3, (\w+): ", capsys.readouterr().err, re.MULTILINE) == ["finetune"]
    assert {row["piece"]: row for row in rows(tmp_path)} == found
    assert [path.name for path in runs["finetune"].parent.iterdir()] == ["version_0"]


def made(script, name, gains, ridge=52.0):
    """Rows of as many seeds as there are gains."""
    made = []
    for seed, gain in enumerate(gains):
        accuracy = {"finetune": 60 + seed + gain, "scratch": 60 + seed, "scratch_long": 61 + seed}
        for piece in script.PIECES:
            row = dict.fromkeys(script.COLUMNS, "") | {"seed": str(seed), "piece": piece, "epochs": "4"}
            row |= {"recipes": name, "hardware": "a machine", "test_accuracy": str(accuracy.get(piece, ""))}
            if piece == "pretrain":
                row |= {"ridge": str(ridge), "ridge_untrained": "35.0", "ridge_pixels": "41.0"}
            made.append(row)
    return made


def test_table_pairs_by_seed_and_says_which_goal_is_not_reached(script):
    gains = [4.5, 7.0, 5.2]
    text, reached = script.table(made(script, "a", gains), 4.0, 9.0)
    low, high = ttest_rel([60 + s + g for s, g in enumerate(gains)], [60, 61, 62]).confidence_interval(0.95)
    assert reached
    assert f"+5.57 [+{low:.2f}, +{high:.2f}]" in text
    for gains, ridge, goal in (
        ([3.9, 3.8, 3.9], 52.0, "above 0: not reached"),
        ([0.1, 5.0, 14.0], 52.0, "above 0: not reached"),  # the mean is large enough, the interval is not
        ([5.0, 5.1, 5.2], 49.9, "raw pixels: not reached"),
    ):
        text, reached = script.table(made(script, "a", gains, ridge), 4.0, 9.0)
        assert not reached
        assert goal in text
        assert text.count("not reached") == 1


def test_table_leaves_out_what_is_of_other_recipes_or_not_finished(script, small, tmp_path, capsys):
    name = script.fingerprint(
        [yaml.safe_load((tmp_path / f"{p}.yaml").read_text()) for p in script.PIECES[:3]] + [{"times": 2}], []
    )
    others = [row | {"test_accuracy": "1.0"} for row in made(script, "other", [5.0])]
    script.write_rows(tmp_path / "table.csv", [*made(script, name, [5.0, 5.1, 5.2])[:-1], *others])
    assert script.main([*small, "--table"]) == 0
    printed = capsys.readouterr().out
    assert "+5.05 [+4.41, +5.69]" in printed
    assert printed.endswith("left out, not finished: seed 2\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seeds", "-1"], "Expected `--seeds` of 0 or more, got -1."),
        (["--times", "0"], "Expected `--times` of at least 1, got 0."),
        (["--pretrain", "none.yaml"], "Cannot read the recipe none.yaml"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(script, small, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        script.main([*small, *options])
