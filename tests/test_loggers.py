"""Run folders and the loggers in them."""

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
    csv, wandb = run_loggers(folder, option)
    assert isinstance(csv, MetricsCSV)
    assert Path(csv.log_dir) == folder
    assert isinstance(wandb, WandbLogger)
    assert wandb._wandb_init["project"] == project
    assert wandb._wandb_init["entity"] == entity
    assert wandb._offline == offline
    assert Path(wandb.save_dir) == folder


def test_wandb_can_be_left_out(tmp_path: Path) -> None:
    assert [type(logger) for logger in run_loggers(new_run_folder(tmp_path, "name", "fit"), "off")] == [MetricsCSV]
