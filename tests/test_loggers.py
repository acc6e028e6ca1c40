"""Run folders and the loggers in them."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytorch_lightning.loggers import WandbLogger

from masklr.loggers import MetricsCSV, new_run_folder, run_loggers


@pytest.fixture(autouse=True)
def first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "MASKLR_RUN_FOLDER", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_runs_that_start_together_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder(tmp_path, "name", "fit"), range(24)))
    assert len(set(folders)) == 24
    assert {folder.name for folder in folders} == {f"version_{number}" for number in range(24)}


def test_run_is_numbered_after_the_newest_though_others_were_deleted(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x", "predict_30"):
        (tmp_path / "name" / name).mkdir(parents=True)
    assert new_run_folder(tmp_path, "name", "fit").name == "version_11"
    assert new_run_folder(tmp_path, "name", "test").name == "test_0"


def test_further_processes_take_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_run_folder(tmp_path, "name", "fit")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run_folder(tmp_path, "name", "fit") == first
    assert [path.name for path in (tmp_path / "name").iterdir()] == ["version_0"]


def test_other_commands_have_folders_of_their_own(tmp_path: Path) -> None:
    assert new_run_folder(tmp_path, "name", "fit").name == "version_0"
    assert new_run_folder(tmp_path, "name", "predict").name == "predict_0"


@pytest.mark.parametrize(
    ("option", "project", "entity", "offline"),
    [
        ("offline", "masklr", None, True),
        ("project", "project", None, False),
        ("project/team", "project", "team", False),
    ],
)
def test_wandb_is_offline_unless_a_project_is_named(
    option: str, project: str, entity: str | None, offline: bool, tmp_path: Path
) -> None:
    folder = new_run_folder(tmp_path, "name", "fit")
    metrics, wandb = run_loggers(folder, option)
    assert isinstance(metrics, MetricsCSV)
    assert Path(metrics.log_dir) == folder
    assert isinstance(wandb, WandbLogger)
    assert wandb._wandb_init["project"] == project
    assert wandb._wandb_init["entity"] == entity
    assert wandb._offline == offline
    assert Path(wandb.save_dir) == folder


def test_wandb_can_be_left_out(tmp_path: Path) -> None:
    assert [type(logger) for logger in run_loggers(new_run_folder(tmp_path, "name", "fit"), "off")] == [MetricsCSV]


# --------------------------------------------------------------------------------------------------------- metrics.csv


def logger_in(folder: Path) -> MetricsCSV:
    return MetricsCSV(folder.parent, name=folder.name, version="")


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_go_on_where_a_run_was_interrupted_and_later_ones_are_dropped(tmp_path: Path) -> None:
    first = logger_in(tmp_path)
    for step in range(4):
        first.log_metrics({"a": step / 3}, step)
        first.save()
    first.log_metrics({"later": 1.0}, 9)
    first.save()
    assert first.num_rows == 5
    second = logger_in(tmp_path)
    assert second.num_rows == 5
    assert len(rows_in(tmp_path)) == 5, "opening a run's folder changes nothing"
    second.keep_rows(3)
    second.log_metrics({"a": 1.0, "b": 0.1}, 3)
    second.save()
    assert second.num_rows == 4
    assert [(row["step"], row["a"], row["b"]) for row in rows_in(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", str(1 / 3), ""),
        ("2", str(2 / 3), ""),
        ("3", "1.0", "0.1"),
    ]
    assert "later" not in rows_in(tmp_path)[0]


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    first = logger_in(tmp_path)
    first.log_metrics({"a": 1.0, "b": 2.0}, 0)
    first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3.0")
    second = logger_in(tmp_path)
    second.keep_rows(1)
    second.log_metrics({"a": 4.0, "b": 5.0}, 1)
    second.save()
    assert [(row["step"], row["a"], row["b"]) for row in rows_in(tmp_path)] == [
        ("0", "1.0", "2.0"),
        ("1", "4.0", "5.0"),
    ]


def test_file_is_whole_at_any_moment_of_a_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logger_in(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    seen = []
    replace = Path.replace

    def look(self: Path, target: Path) -> Path:
        seen.append(rows_in(tmp_path))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    logger.log_metrics({"b": 2.0}, 1)
    logger.save()
    assert seen == [[{"a": "1.0", "step": "0"}]]
    assert [row["b"] for row in rows_in(tmp_path)] == ["", "2.0"]


def test_missing_rows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_in(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.keep_rows(3)
    assert "has 1 rows, 2 fewer than when the checkpoint was written" in caplog.text
