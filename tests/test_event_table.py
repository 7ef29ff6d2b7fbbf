"""The table of events: its JSON schema, and that a run's events keep to it."""

import json
from pathlib import Path

import jsonschema
import pytest

from engine import run, tiny_task
from esper.event_table import EVENTS, KINDS, LEVELS, PLACES, SEVERITIES, schema
from esper.events import EventLog, load

SCHEMA = Path(__file__).parents[1] / "docs" / "events.schema.json"


def test_the_file_is_the_schema_of_the_table() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), "python docs/generate.py writes it"


def test_the_table_uses_its_own_words() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    for name, row in EVENTS.items():
        assert row.level in LEVELS[1:], name
        assert row.severity in SEVERITIES, name
        assert {entry.kind for entry in row.data.values()} <= KINDS.keys(), name
        assert row.others in ("", *KINDS), name
        assert not row.data.keys() & PLACES.keys(), name


def test_whole_runs_keep_to_the_schema(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    with tiny_task():
        for controller in ("ppo", "random"):
            _, events = run(tmp_path / controller, controller=controller, telemetry_level="debug")
            for event in events:
                validator.evolve(schema=schema()["$defs"][event["type"]]).validate(event)
    seen = {event["type"] for event in events}
    assert {"run_started", "germinated", "culled", "epoch", "reward", "rollout", "run_finished"} <= seen


def test_a_line_with_everything_fits_and_nothing_else_does(tmp_path: Path) -> None:
    with EventLog(tmp_path, {}) as events:
        events.write(
            "contribution",
            episode=0,
            epoch=3,
            host=1,
            slot="mid",
            contribution=1.5,
            contribution_se=float("nan"),
            alpha=0.5,
        )
    (event,) = load(tmp_path)
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(event)
    data = event["data"]
    for wrong in (
        {**event, "type": "sprouted"},
        {**event, "severity": "loud"},
        {**event, "epoch": "three"},
        {**event, "colour": "red"},
        {name: value for name, value in event.items() if name != "slot"},
        {**event, "data": {**data, "colour": "red"}},
        {**event, "data": {**data, "alpha": "half"}},
        {**event, "data": {"contribution": 1.5}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)
