"""Every notebook runs from its first to its last line, and is in the format that jupytext opens."""

import runpy
import time
from pathlib import Path

import pytest

from esper import catalogue, tasks
from esper.seeds.blueprints import registry

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for owner, name in ((registry, "_REGISTRY"), (tasks, "_REGISTRY"), (catalogue, "_BLUEPRINTS")):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    start = time.process_time()
    runpy.run_path(str(path), run_name="__main__")
    assert time.process_time() - start < 60.0  # on two cores: 30 seconds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_percent_format(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:\n")
    assert "format_name: percent" in text
    assert "\n# %% [markdown]\n# # " in text


def test_there_are_six() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")
