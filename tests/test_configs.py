"""Every shipped recipe can be printed, and what is printed is the same recipe."""

from pathlib import Path

import pytest

from masklr.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def printed(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_printed_recipe_prints_itself(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(config, capsys)
    assert "class_path" in first
    copy = tmp_path / "copy.yaml"
    copy.write_text(first)
    assert printed(copy, capsys) == first


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_recipe_says_first_what_it_claims_and_is_named_after_its_file(config: Path) -> None:
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    assert f"name: {config.stem}" in lines
