"""What a run shows: lines where output is a file, a live line on a terminal, a table at the end."""

import io

import pytest
from rich.console import Console

from esper import progress
from esper.progress import RunProgress, rollout_line, summary_table

OUTCOME = {"validation_accuracy": [90.0, 92.0], "returns": [1.0, 2.0], "planted": 3, "kept": 2, "culled": 1}


def test_a_rollout_is_one_line() -> None:
    line = rollout_line(4, 20, OUTCOME)
    assert line == "rollout 5/20: accuracy 91.0 %, return +1.50, seeds 3 planted, 2 kept, 1 culled"


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunProgress(Console(file=stream, width=200), rollouts=2, max_epochs=25, n_envs=2) as shown:
        shown.epoch(0, 1, [10.0, 20.0])
        now[0] += 6.0
        shown.epoch(0, 2, [30.0, 40.0])
        now[0] += 1.0
        shown.epoch(0, 3, [30.0, 40.0])
        shown.rollout(0, OUTCOME)
    assert stream.getvalue().splitlines() == ["rollout 1/2, epoch 2/25, 35.0 %", rollout_line(0, 2, OUTCOME)]
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_live_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    with RunProgress(console, rollouts=2, max_epochs=5, n_envs=2) as shown:
        for epoch in range(1, 6):
            shown.epoch(0, epoch, [50.0, 60.0])
        shown.rollout(0, OUTCOME)
    assert "epoch 5/5" in stream.getvalue()
    assert "seeds 3 planted" in stream.getvalue()


def test_the_table_names_the_outcome() -> None:
    summary = {
        "task": "digits",
        "controller": "ppo",
        "seed": 42,
        "episodes": 160,
        "validation_accuracy": 93.456,
        "test_accuracy": 92.0,
        "objective": 91.5,
        "host_parameters": 496,
        "parameters": 1488.0,
        "seeds_planted": 7,
        "seeds_kept": 4,
        "seeds_culled": 2,
        "timing": {"seconds": 61.2, "env_epochs_per_second": 65.4},
    }
    stream = io.StringIO()
    Console(file=stream, width=100).print(summary_table(summary))
    text = stream.getvalue()
    for fragment in (
        "ppo on digits, seed 42",
        "93.46 %",
        "92.00 %",
        "1,488 (host 496 + seeds 992)",
        "7 / 4 / 2",
        "65.4",
    ):
        assert fragment in text
