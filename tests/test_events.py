"""The event log: what is written, when, and how it is read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from esper.events import EVENTS, LEVELS, EventLog, is_free, load, standard, write_json


def log(run_dir: Path, level: str = "normal") -> EventLog:
    return EventLog(run_dir, {"seed": 1}, level)  # type: ignore[arg-type]


def test_an_event_has_one_shape(tmp_path: Path) -> None:
    with log(tmp_path) as events:
        events.write("run_started", task="digits")
        events.write("germinated", episode=2, epoch=3, host=1, slot="mid", blueprint="norm", blend="linear")
        events.write("anomaly", severity="debug", kind="ratio_explosion")
    nowhere = {"episode": None, "epoch": None, "host": None, "slot": None}
    there = {"episode": 2, "epoch": 3, "host": 1, "slot": "mid"}
    seed = {"blueprint": "norm", "blend": "linear"}
    assert load(tmp_path) == [
        {"step": 0, "type": "run_started", **nowhere, "severity": "info", "data": {"task": "digits"}},
        {"step": 1, "type": "germinated", **there, "severity": "info", "data": seed},
        {"step": 2, "type": "anomaly", **nowhere, "severity": "debug", "data": {"kind": "ratio_explosion"}},
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with log(tmp_path / "run") as events, pytest.raises(ValueError, match="'sprouted'; must be one of"):
        events.write("sprouted")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_filters_what_is_written_and_nothing_else(tmp_path: Path, level: str) -> None:
    with log(tmp_path, level) as events:
        for kind in EVENTS:
            events.write(kind)
        assert events.step == len(EVENTS)
    allowed = LEVELS[: LEVELS.index(level) + 1]  # type: ignore[arg-type]
    written = [(step, kind) for step, (kind, row) in enumerate(EVENTS.items()) if row.level in allowed]
    assert [(event["step"], event["type"]) for event in load(tmp_path)] == written
    assert bool(written) == (level != "off")


def test_the_level_can_be_raised_for_a_while(tmp_path: Path) -> None:
    with log(tmp_path) as events:
        for level in ("normal", "debug", "normal"):
            events.level = level  # type: ignore[assignment]
            events.write("reward", total=1.0)
    assert [event["step"] for event in load(tmp_path)] == [1]


def test_every_line_is_standard_json(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    with log(tmp_path) as events:
        events.write("update", loss=float("nan"), best=float("inf"), worst=-float("inf"), nested={1: [float("nan")]})
        events.time("epoch", float("nan"))
    for name in ("events.jsonl", "timings.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert load(tmp_path)[0]["data"] == {"loss": None, "best": "inf", "worst": "-inf", "nested": {"1": [None]}}


def test_tensors_and_arrays_become_numbers() -> None:
    assert standard(torch.tensor([1.0, float("nan")])) == [1.0, None]
    assert standard({"a": torch.tensor(3), "b": np.float32(0.5), "c": (np.int64(2), True)}) == {
        "a": 3,
        "b": 0.5,
        "c": [2, True],
    }


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    events = log(tmp_path)
    events.write("run_started")
    assert len(load(tmp_path)) == 1
    events.close()


def test_clock_times_stay_out_of_the_event_log(tmp_path: Path) -> None:
    with log(tmp_path) as events:
        events.time("rollout", 1.5, episode=0)
    assert load(tmp_path) == []
    assert load(tmp_path / "timings.jsonl") == [{"phase": "rollout", "seconds": 1.5, "episode": 0}]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert load(tmp_path) == [{"step": 0}, {"step": 1}]
    for bad in ("{", "3"):
        path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
            load(path)


def test_rewinding_forgets_what_comes_later_byte_for_byte(tmp_path: Path) -> None:
    with log(tmp_path) as events:
        for epoch in range(5):
            events.write("reward", epoch=epoch)
            events.write("epoch", epoch=epoch, validation_accuracy=0.1 + 0.2)
        whole = (tmp_path / "events.jsonl").read_bytes()
        events.rewind(5)
        assert [event["step"] for event in load(tmp_path)] == [1, 3]
        events.write("epoch", epoch=2, validation_accuracy=0.1 + 0.2)
        for epoch in (3, 4):
            events.write("reward", epoch=epoch)
            events.write("epoch", epoch=epoch, validation_accuracy=0.1 + 0.2)
    assert (tmp_path / "events.jsonl").read_bytes() == whole


def test_rewinding_drops_a_torn_line(tmp_path: Path) -> None:
    with log(tmp_path) as events:
        events.write("run_started")
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"step": 1, "ty')
    with log(tmp_path) as events:
        events.rewind(1)
        events.write("run_finished")
    assert [event["type"] for event in load(tmp_path)] == ["run_started", "run_finished"]


def test_a_directory_is_free_when_new_or_empty(tmp_path: Path) -> None:
    assert is_free(tmp_path)
    assert is_free(tmp_path / "new")
    write_json(tmp_path / "summary.json", {"loss": float("nan")})
    assert not is_free(tmp_path)
    assert not is_free(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
