"""The event log as pandas tables."""

import math
import sys
from pathlib import Path

import pytest

from esper.event_table import EVENTS
from esper.events import EventLog
from esper.table import columns, table


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with EventLog(tmp_path, {}, "debug") as events:
        events.write("run_started", task="digits", slots=["early", "mid"])
        place = {"episode": 0, "epoch": 4, "host": 1, "slot": "mid"}
        events.write("contribution", **place, contribution=float("nan"), contribution_se=float("inf"), alpha=1)
        events.write("contribution", **{**place, "epoch": 5}, contribution=2.5, contribution_se=0.5, alpha=1.0)
        events.write("reward", episode=0, epoch=1, host=0, op="WAIT", total=1.0, rent=-0.5)
        events.write(
            "rollout",
            episode=0,
            validation_accuracy=[80.0, 90.0],
            returns=[1.0, 2.0],
            ops={"WAIT": 3, "CULL": 1},
            kept=2,
        )
    return tmp_path


def test_a_row_an_event(run: Path) -> None:
    frame = table(run, "contribution")
    assert list(frame.columns) == list(columns("contribution"))
    assert frame.epoch.tolist() == [4, 5]
    assert frame.slot.tolist() == ["mid", "mid"]
    assert math.isnan(frame.contribution[0])
    assert frame.contribution_se.tolist() == [math.inf, 0.5]
    assert {frame[name].dtype.name for name in ("contribution", "contribution_se", "alpha")} == {"float64"}
    assert frame.step.tolist() == [1, 2]


def test_what_an_event_says_per_host_is_a_row_per_host(run: Path) -> None:
    frame = table(run, "rollout")
    assert frame.host.tolist() == [0, 1]
    assert frame.validation_accuracy.tolist() == [80.0, 90.0]
    assert frame["ops.WAIT"].tolist() == [3, 3]
    assert frame.kept.tolist() == [2, 2]
    assert frame.epoch.isna().all()


def test_further_entries_are_further_columns(run: Path) -> None:
    frame = table(run / "events.jsonl", "reward")
    assert frame.rent.tolist() == [-0.5]
    assert frame.rent.dtype.name == "float64"
    assert "rent" not in columns("reward")


@pytest.mark.parametrize("kind", EVENTS)
def test_every_type_has_a_table_even_without_events(tmp_path: Path, kind: str) -> None:
    (tmp_path / "events.jsonl").write_text("")
    frame = table(tmp_path, kind)
    assert list(frame.columns) == list(columns(kind))
    assert len(frame) == 0
    assert all(columns(kind).values())


def test_an_unknown_type_and_a_missing_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'sprouted'; must be one of run_started"):
        table(tmp_path, "sprouted")
    with pytest.raises(FileNotFoundError):
        table(tmp_path, "epoch")


def test_without_pandas_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'esper\[analysis\]'"):
        table(tmp_path, "epoch")
