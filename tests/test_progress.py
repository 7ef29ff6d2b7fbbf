"""What a run shows: lines where output is a file, a live view on a terminal, a table at the end."""

import io
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console, Group

from esper.events import Event, EventLog
from esper.progress import RunProgress, health, rollout_line, summary_table
from esper.progress.seen import MOST_HOSTS, Seen
from esper.progress.view import sparkline, squeezed, view

OUTCOME = {"validation_accuracy": [90.0, 92.0], "returns": [1.0, 2.0], "planted": 3, "kept": 2, "culled": 1}
SLOTS = ("early", "mid")
UPDATE: dict[str, Any] = {
    "updates": 4.0,
    "explained_variance": 0.53,
    "kl_joint": 0.0123,
    **{f"clip_fraction/{head}": value for head, value in (("op", 0.08), ("slot", 0.02), ("blend", None))},
    **{f"entropy/{head}": value for head, value in (("op", 0.9), ("slot", 0.8), ("blend", None))},
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def event(
    kind: str, host: int | None, epoch: int | None, slot: str | None = None, episode: int = 0, **data: Any
) -> Event:
    place = {"episode": episode, "epoch": epoch, "host": host, "slot": slot}
    return {"step": 0, "type": kind, **place, "severity": "info", "data": data}


def life(host: int) -> Iterator[Event]:
    """Five epochs of a host: a seed in `early` that is kept, one in `mid` that is culled."""
    happens = {
        1: [event("germinated", host, 0, "early"), event("stage_changed", host, 1, "early", after="TRAINING")],
        2: [event("stage_changed", host, 2, "early", after="BLENDING"), event("germinated", host, 1, "mid")],
        3: [event("stage_changed", host, 3, "early", after="PROBATIONARY")],
        4: [event("fossilized", host, 3, "early"), event("culled", host, 3, "mid")],
        5: [],
    }
    for epoch, events in happens.items():
        yield from events
        yield event("epoch", host, epoch, validation_accuracy=20.0 * epoch - host)
        yield event("reward", host, epoch, op="GERMINATE" if epoch < 3 else "WAIT")


def seen_life(n_envs: int = 2) -> Seen:
    seen = Seen(rollouts=4, max_epochs=10, n_envs=n_envs, slots=SLOTS)
    lives = [list(life(host)) for host in range(n_envs)]
    for events in lives:
        for happened in events:
            seen.event(happened)
    for epoch in range(1, 6):
        seen.epoch_over(0, epoch, [20.0 * epoch - host for host in range(n_envs)], now=2.0 * epoch)
    return seen


def shown(seen: Seen, width: int = 100, height: int = 40) -> list[str]:
    """The lines of the view as a terminal would show them."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(Group(view(seen, 10.0, width, height)))
    return console.export_text().splitlines()


def terminal(stream: io.StringIO) -> Console:
    return Console(file=stream, width=120, height=40, force_terminal=True, force_interactive=True)


def test_a_rollout_is_one_line() -> None:
    line = rollout_line(4, 20, OUTCOME)
    assert line == "rollout 5/20: accuracy 91.0 %, return +1.50, seeds 3 planted, 2 kept, 1 culled"


def test_elsewhere_than_on_a_terminal_there_are_plain_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, width=40)
    with RunProgress(console, rollouts=2, max_epochs=25, n_envs=2, slots=SLOTS, clock=clock) as progress:
        progress.epoch(0, 1, [10.0, 20.0])
        clock.now += 6.0
        progress.epoch(0, 2, [30.0, 40.0])
        clock.now += 2.0
        progress.epoch(0, 3, [30.0, 40.0])
        progress.event(event("update", None, None, **UPDATE))
        progress.rollout(0, OUTCOME)
    assert stream.getvalue().splitlines() == [
        "rollout 1/2, epoch 2/25, 35.0 %, 0.3 env-epochs/s",
        f"{rollout_line(0, 2, OUTCOME)}, EV 0.53, KL 0.0123, clip 0.08, entropy 0.85, 0.5 env-epochs/s",
    ]


def test_the_learners_health_is_what_the_update_measured() -> None:
    assert health(UPDATE) == pytest.approx({"EV": 0.53, "KL": 0.0123, "clip": 0.08, "entropy": 0.85})
    assert all(math.isnan(value) for value in health({"updates": 0.0, "non_finite/observation": 1.0}).values())
    assert health({"explained_variance": "-inf"})["EV"] == -math.inf


def test_strips_follow_the_slots_of_the_present_episode() -> None:
    seen = seen_life()
    assert seen.strips[1, "early"] == ["TRAINING", "BLENDING", "PROBATIONARY", "FOSSILIZED", "FOSSILIZED"]
    assert seen.strips[1, "mid"] == ["DORMANT", "GERMINATED", "GERMINATED", "CULLED", "DORMANT"]
    assert seen.accuracy[1] == [19.0, 39.0, 59.0, 79.0, 99.0]
    seen.event(event("epoch", 0, 1, episode=1, validation_accuracy=30.0))
    assert (seen.accuracy[0], seen.strips[0, "early"], sum(seen.ops.values())) == ([30.0], ["DORMANT"], 0)


def test_a_run_taken_up_within_an_episode_claims_nothing_about_what_was_before() -> None:
    seen = Seen(rollouts=4, max_epochs=10, n_envs=1, slots=SLOTS)
    seen.event(event("stage_changed", 0, 4, "early", after="BLENDING"))
    seen.event(event("epoch", 0, 4, validation_accuracy=None))
    assert seen.strips[0, "early"] == ["", "", "", "BLENDING"]
    assert seen.strips[0, "mid"] == [""] * 4
    assert all(math.isnan(accuracy) for accuracy in seen.accuracy[0])
    assert not any(line.startswith("host") for line in shown(seen))


def test_the_view_shows_hosts_ops_learner_phases_and_time() -> None:
    seen = seen_life()
    for explained in (0.1, 0.3, 0.53):
        seen.event(event("update", None, None, **{**UPDATE, "explained_variance": explained}))
    seen.phase("collect", 9.0)
    seen.phase("learn", 1.0)
    seen.event(event("governor_rollback", 0, 5))
    lines = shown(seen)
    assert lines[0] == "rollout 1/4, epoch 5/10   accuracy 99.5 % (99.0 to 100.0) of 2 hosts"
    assert lines[1].split("━")[-1] == "  12 %   0:10 so far   1:10 left   1.0 env-epochs/s"
    assert lines[2].split() == ["host", "19", "to", "100", "%", "now", "early", "mid"]
    assert lines[3].split() == ["0", "▁▃▅▆█", "100.0", "%", "▂▄▆██", "·▁▁×·"]
    assert lines[4].split() == ["1", "▁▃▄▆█", "99.0", "%", "▂▄▆██", "·▁▁×·"]
    assert "× culled" in lines[5]
    assert lines[6].split("█")[-1] == "  WAIT 60 %  GERMINATE 40 %  CULL 0 %  FOSSILIZE 0 %"
    assert lines[7].split("  ")[0] == "learner EV 0.53 ▁▄█"
    assert "KL 0.0123" in lines[7]
    assert lines[8].split("█")[-1] == "  collect 90 %  learn 10 %"
    assert lines[9].split() == ["alarms", "governor", "rollback", "1"]


@pytest.mark.parametrize(("width", "height"), [(100, 24), (60, 16), (40, 12), (300, 200)])
def test_the_view_fits_the_terminal(width: int, height: int) -> None:
    seen = seen_life(n_envs=50)
    seen.event(event("governor_rollback", 0, 5))
    lines = shown(seen, width, height)
    assert len(lines) < height, "the cursor needs a line of its own"
    assert max(map(len, lines)) <= width
    told = next(line for line in lines if "more hosts" in line)
    rows = sum(line.lstrip()[:1].isdigit() for line in lines)
    assert told.strip() == f"and {50 - rows} more hosts"
    assert 1 <= rows <= MOST_HOSTS


def test_sparklines_leave_out_what_was_not_measured() -> None:
    assert sparkline([0.0, math.nan, 50.0, 100.0, 120.0], 0.0, 100.0) == "▁ ▅██"
    assert sparkline([3.0, 3.0], 3.0, 3.0) == "▄▄"


def test_a_squeezed_strip_keeps_its_place_and_its_culls() -> None:
    strip = ["DORMANT", "TRAINING", "CULLED", "DORMANT", "DORMANT", "TRAINING", "BLENDING"]
    assert squeezed(strip, 10, 10) == strip
    assert squeezed(strip, 10, 5) == ["TRAINING", "CULLED", "TRAINING", "BLENDING"]


def test_a_terminal_gets_a_live_view_and_rollouts_above_it() -> None:
    clock, stream = Clock(), io.StringIO()
    with RunProgress(terminal(stream), rollouts=2, max_epochs=5, n_envs=2, slots=SLOTS, clock=clock) as progress:
        for epoch in range(1, 6):
            clock.now += 1.0
            progress.event(event("epoch", 0, epoch, validation_accuracy=50.0))
            progress.epoch(0, epoch, [50.0, 60.0])
        progress.rollout(0, OUTCOME)
        assert "seeds 3 planted" not in stream.getvalue()
        clock.now += 1.0
        progress.epoch(1, 1, [50.0, 60.0])
        assert "seeds 3 planted" in stream.getvalue()
        progress.rollout(1, {**OUTCOME, "planted": 7})
    text = stream.getvalue()
    assert "epoch 5/5" in text
    assert "seeds 7 planted" in text


def redraws(cost: float, per_second: int, seconds: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a view that takes `cost` seconds to make is drawn."""
    clock, drawn = Clock(), []

    def slow(*arguments: Any) -> str:
        drawn.append(clock.now)
        clock.now += cost
        return "view"

    monkeypatch.setattr("esper.progress.display.view", slow)
    with RunProgress(terminal(io.StringIO()), 10, 10**6, 2, SLOTS, clock) as progress:
        for epoch in range(1, per_second * seconds + 1):
            clock.now += 1.0 / per_second
            progress.epoch(0, epoch, [1.0, 2.0])
    return len(drawn)


def test_there_are_at_most_four_redraws_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 36 <= redraws(0.0, per_second=100, seconds=10, monkeypatch=monkeypatch) <= 41


def test_slow_redraws_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= redraws(0.1, per_second=100, seconds=30, monkeypatch=monkeypatch) <= 4


def updates(progress: RunProgress, epochs: int, pause: Callable[[], None]) -> float:
    """Seconds of processor time that `epochs` epochs of eight hosts take to be shown."""
    spent = 0.0
    for epoch in range(1, epochs + 1):
        pause()
        began = time.process_time()
        for host in range(8):
            progress.event(event("stage_changed", host, epoch, "early", after="TRAINING"))
            progress.event(event("epoch", host, epoch, validation_accuracy=50.0 + host))
            progress.event(event("reward", host, epoch, op="WAIT"))
        progress.epoch(0, epoch, [50.0] * 8)
        spent += time.process_time() - began
    return spent


def test_showing_takes_less_than_two_percent_of_epochs_of_one_second() -> None:
    """Every one of the thousand epochs is drawn: a second passes between them."""
    clock = Clock()

    def second() -> None:
        clock.now += 1.0

    stream = io.StringIO()
    with RunProgress(terminal(stream), 1, 1000, 8, SLOTS, clock) as progress:
        spent = updates(progress, 1000, second)
    assert stream.getvalue().count("env-epochs/s") >= 999
    assert spent < 0.02 * 1000 * 1.0


def test_clocks_hear_of_every_phase(tmp_path: Any) -> None:
    heard = []
    with EventLog(tmp_path, {}) as log:
        log.clocks.append(lambda phase, seconds: heard.append((phase, seconds)))
        log.time("collect", 2.0, episode=0)
    assert heard == [("collect", 2.0)]


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
