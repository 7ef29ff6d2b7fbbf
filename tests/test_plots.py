"""The picture of a run: what it draws, from what, and that the same events give the same files."""

from pathlib import Path
from typing import Any

import pytest

from esper.events import Event
from esper.plots import STAGE_COLOURS, Span, run_picture, save_picture, spans

SLOTS = ("early", "mid", "late")


def event(
    kind: str, episode: int | None = None, epoch: int | None = None, host: int | None = None, **rest: Any
) -> Event:
    slot = rest.pop("slot", None)
    return {"step": 0, "type": kind, "episode": episode, "epoch": epoch, "host": host, "slot": slot, "data": rest}


def life(episode: int, host: int, slot: str) -> list[Event]:
    """A seed that is kept: planted at 1, training to 4, blending to 6, on probation to 8."""
    where = {"episode": episode, "host": host, "slot": slot}
    changed = {"blueprint": "norm", "before": ""}
    return [
        event("germinated", epoch=1, blueprint="norm", blend="linear", **where),
        event("stage_changed", epoch=1, after="TRAINING", **changed, **where),
        event("stage_changed", epoch=4, after="BLENDING", **changed, **where),
        event("stage_changed", epoch=6, after="PROBATIONARY", **changed, **where),
        event("fossilized", epoch=8, blueprint="norm", **where),
    ]


def run(episodes: int = 2, hosts: int = 5, epochs: int = 10) -> list[Event]:
    found = [event("run_started", task="digits", controller="ppo")]
    for episode in range(episodes):
        for host in range(hosts):
            found += life(episode, host, "early")
            for epoch in range(1, epochs + 1):
                found.append(
                    event("epoch", episode, epoch, host, validation_accuracy=50.0 + 4 * epoch + host + episode)
                )
        found.append(
            event(
                "rollout",
                episode,
                validation_accuracy=[90.0 + host for host in range(hosts)],
                returns=[float(episode)] * hosts,
                planted=hosts,
                kept=hosts,
                culled=0,
            )
        )
    return found


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text"))]


def test_spans_tell_the_life_of_a_slot() -> None:
    assert spans(life(0, 0, "mid"), 10) == [
        Span(1, 4, "TRAINING", "norm", 0),
        Span(4, 6, "BLENDING", "norm", 0),
        Span(6, 8, "PROBATIONARY", "norm", 0),
        Span(8, 10, "FOSSILIZED", "norm", 0),
    ]


def test_a_culled_seed_ends_and_the_next_is_another() -> None:
    events = [
        *life(0, 0, "mid")[:2],
        event("culled", 0, 3, 0, slot="mid", blueprint="norm"),
        event("germinated", 0, 5, 0, slot="mid", blueprint="attention", blend="gated"),
    ]
    assert spans(events, 9) == [Span(1, 3, "TRAINING", "norm", 0), Span(5, 9, "GERMINATED", "attention", 1)]
    assert spans([], 9) == []


def test_the_cull_tail_is_empty_time() -> None:
    tail = [
        event("stage_changed", 0, epoch, 0, slot="mid", after=stage)
        for epoch, stage in ((4, "EMBARGOED"), (6, "RESETTING"))
    ]
    events = [*life(0, 0, "mid")[:2], event("culled", 0, 3, 0, slot="mid", blueprint="norm"), *tail]
    assert [span.stage for span in spans(events, 9)] == ["TRAINING"]


def test_the_picture_shows_the_last_episode_of_four_hosts() -> None:
    figure = run_picture(run(), SLOTS)
    shown = texts(figure)
    assert [text for text in shown if text.startswith("host ")] == [f"host {host}" for host in range(4)]
    assert "digits, ppo, episode 2" in shown
    assert shown.count("norm") == 4
    assert {"early", "mid", "late", *(stage.lower() for stage in STAGE_COLOURS)} <= set(shown)
    assert {"final accuracy, % (mean, range)", "return (mean, range)", "seeds"} <= set(shown)


def test_strips_are_coloured_by_stage_and_as_long_as_the_stage() -> None:
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    figure = run_picture(run(hosts=1), SLOTS)
    bars = {to_hex(item.get_facecolor()): item for item in figure.findobj(Rectangle) if item.get_height() == 0.42}
    assert [
        (bars[STAGE_COLOURS[s]].get_x(), bars[STAGE_COLOURS[s]].get_width()) for s in ("TRAINING", "FOSSILIZED")
    ] == [
        (1, 3),
        (8, 2),
    ]


def test_hosts_and_episode_can_be_chosen() -> None:
    shown = texts(run_picture(run(), SLOTS, hosts=[4, 1], episode=0))
    assert [text for text in shown if text.startswith("host ")] == ["host 4", "host 1"]
    assert "digits, ppo, episode 1" in shown
    with pytest.raises(ValueError, match=r"hosts: \[9\]; episode 1 has \[0, 1, 2, 3, 4\]"):
        run_picture(run(), SLOTS, hosts=[9])


def test_a_run_that_is_not_through_its_first_rollout_has_a_picture() -> None:
    events = [item for item in run(episodes=1) if item["type"] != "rollout"]
    assert "host 0" in texts(run_picture(events, SLOTS))


def test_null_accuracies_leave_gaps() -> None:
    events = run(episodes=1, hosts=1)
    events[-2]["data"]["validation_accuracy"] = None
    events[-1]["data"]["validation_accuracy"] = [None]
    save_to = run_picture(events, SLOTS)
    assert "host 0" in texts(save_to)


def test_a_log_without_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="telemetry_level normal or debug"):
        run_picture([event("run_started")], SLOTS)


def test_the_same_events_give_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = save_picture(run_picture(run(), SLOTS), tmp_path / name)
        assert [path.name for path in paths] == ["run.png", "run.svg"]
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")
    assert contents[0][1].startswith(b"<?xml")
