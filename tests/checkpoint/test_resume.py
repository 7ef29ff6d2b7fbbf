"""A run that was cut short and goes on ends like one that was left alone, to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Silent, run, tiny_config, tiny_task
from esper.checkpoint.snapshot import Snapshot, checkpoints, name_of, read_snapshot, write_snapshot
from esper.checkpoint.store import FOLDER, versions
from esper.engine import Engine
from esper.environment.env import GrowthEnv
from esper.events import EventLog, load
from esper.growth.executors.loop import LoopExecutor
from esper.run import train
from tiny import differing

HOSTS, EPOCHS, ROLLOUTS = 2, 4, 2
SMALL = {"n_envs": HOSTS, "max_epochs": EPOCHS, "n_episodes": HOSTS * ROLLOUTS, "telemetry_level": "debug"}
CUTS = {
    "before the first step": 0,
    "within the first episode": 1,
    "before the last step of an episode": EPOCHS - 1,
    "after the first update": EPOCHS,
    "within an episode with grown hosts": EPOCHS + 2,
    "before the last step of all": 2 * EPOCHS - 1,
    "after the last update": ROLLOUTS * EPOCHS,
}


@pytest.fixture(scope="module", autouse=True)
def _task() -> Iterator[None]:
    with tiny_task():
        yield


class Reference:
    """A run left alone: what it left behind, and every moment it went through, written down only afterwards."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        moments: dict[int, tuple[Engine, Callable[[], Snapshot]]] = {}
        mark = Engine.mark

        def remember(engine: Engine, *position: Any) -> None:
            mark(engine, *position)
            moments[engine.moment().step] = (engine, engine.moment)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "mark", remember)
            self.summary, self.events = run(folder, **fields)
        self.folder, self.fields, self.moments = folder, fields, moments

    def cut(self, at: int, folder: Path) -> Path:
        """A run directory as it is if the process was cut `at` steps: its log goes on a little further."""
        engine, moment = self.moments[at]
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(FOLDER, "summary.json"))
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
        count = moment().counters["events"] + 3
        (folder / "events.jsonl").write_text(
            "".join(lines[:count]) + lines[count][:20] if count < len(lines) else "".join(lines)
        )
        about = {
            "versions": versions(),
            "config": engine.config.to_dict(),
            "groups": [group.model_dump() for group in engine.groups],
        }
        write_snapshot(folder / FOLDER, moment(), about)
        return folder


def resume(folder: Path, checkpoint: Path | None = None, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = tiny_config(**fields)
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        summary = train(
            run_dir=folder,
            events=events,
            progress=Silent(),
            resume=checkpoint or folder,
            **config.to_train_kwargs(),
        )
    return dict(summary), load(folder)


def same_end(reference: Reference, folder: Path, summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
    """Summary, every event, and every tensor of the last checkpoint."""
    assert {**summary, "timing": None} == {**reference.summary, "timing": None}
    assert events == reference.events
    assert_same_checkpoint(checkpoints(reference.folder / FOLDER)[-1], checkpoints(folder / FOLDER)[-1])


def assert_same_checkpoint(one: Path, other: Path) -> None:
    (a, first), (b, second) = read_snapshot(one), read_snapshot(other)
    assert first.parts.keys() == second.parts.keys()
    for part in first.parts:
        assert differing(first.parts[part], second.parts[part]) == []
    assert {**a.counters, "seconds": 0} == {**b.counters, "seconds": 0}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference") / "run", **SMALL)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_resumed_run_ends_like_one_left_alone(reference: Reference, tmp_path: Path, cut: int) -> None:
    folder = reference.cut(cut, tmp_path / "run")
    same_end(reference, folder, *resume(folder, **SMALL))


def test_moments_noted_while_devices_work_are_the_same(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where what happened is told during the next epoch: what is left behind, and every moment."""
    monkeypatch.setattr(GrowthEnv, "overlaps", True)
    later = Reference(tmp_path / "later", **SMALL)
    same_end(reference, later.folder, later.summary, later.events)
    assert later.moments.keys() == reference.moments.keys()
    for at, (_, moment) in reference.moments.items():
        here, there = moment(), later.moments[at][1]()
        assert {**here.counters, "seconds": 0} == {**there.counters, "seconds": 0}
        assert all(differing(here.parts[part], there.parts[part]) == [] for part in here.parts)
    folder = later.cut(EPOCHS + 2, tmp_path / "run")
    same_end(reference, folder, *resume(folder, **SMALL))


def test_twins_are_taken_up_again(tmp_path: Path) -> None:
    """Before they have run, halfway through an episode, and at the end of one."""
    fields = {**SMALL, "reward_baseline": "twin"}
    reference = Reference(tmp_path / "reference", **fields)
    for cut in (0, 2, EPOCHS):
        folder = reference.cut(cut, tmp_path / f"run-{cut}")
        same_end(reference, folder, *resume(folder, **fields))


def test_imitation_is_taken_up_again(tmp_path: Path) -> None:
    """Within a teacher's rollout, and after it, when what the teacher remembers is only carried on."""
    steps = [
        {"epoch": 0, "op": "germinate", "slot": "early", "blueprint": "norm", "blend": "linear"},
        {"epoch": 1, "op": "cull", "slot": "early"},
    ]
    fields = {**SMALL, "schedule": steps, "imitation_rollouts": 1}
    reference = Reference(tmp_path / "reference", **fields)
    # The slot is empty again when the run is cut: a teacher that had forgotten what it did would plant anew.
    assert [e["epoch"] for e in reference.events if e["type"] == "germinated" and e["episode"] == 0] == [0] * HOSTS
    # What its teacher reached is not the policy's best.
    scores = [reference.moments[step][1]().score for step in (EPOCHS, 2 * EPOCHS)]
    assert scores[0] is None
    assert scores[1] is not None
    for cut in (3, EPOCHS + 2):
        folder = reference.cut(cut, tmp_path / f"run-{cut}")
        same_end(reference, folder, *resume(folder, **fields))


def test_the_cut_points_have_seeds_moments_and_statistics(reference: Reference) -> None:
    """What makes the test above a test: the states that were cut hold something of everything."""
    snapshot = reference.moments[CUTS["within an episode with grown hosts"]][1]()
    growth = snapshot.parts["environment"]["growth", "0"]
    assert bool((growth["slots", "blueprint"] >= 0).any())
    assert any(bool((leaf != 0).any()) for leaf in growth["seeds"].values(True, True))
    assert any(bool((leaf != 0).any()) for leaf in growth["host", "moments"].values(True, True))
    learner = snapshot.parts["learner"]
    assert float(learner["rewards", "count"]) == HOSTS * EPOCHS
    assert float(learner["moments", "0", "step"]) > 0
    assert snapshot.parts["collector"]["rollout"].batch_size == (HOSTS, 2)
    assert bool((snapshot.parts["collector"]["carrier"]["hidden_h"] != 0).any())


def test_killed_twice_and_resumed_from_an_older_checkpoint(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a step, then in the middle of an update, then taken back to an older checkpoint."""
    folder = reference.cut(EPOCHS, tmp_path / "run")
    steps = 0

    class Killed(BaseException):
        pass

    def dies(env: Any, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return validate(env, *arguments)

    from esper.growth import step as growth_step
    from esper.learn import learner

    validate = growth_step.contributions
    with monkeypatch.context() as patch:
        patch.setattr(growth_step, "contributions", dies)
        with pytest.raises(KeyboardInterrupt):
            resume(folder, **SMALL)
    assert int(checkpoints(folder / FOLDER)[-1].name) == EPOCHS + 2
    with monkeypatch.context() as patch:
        patch.setattr(learner, "update_reward_scale", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            resume(folder, **SMALL)
    same_end(reference, folder, *resume(folder, **SMALL))
    older = folder / FOLDER / name_of(EPOCHS + 2)
    same_end(reference, folder, *resume(folder, older, **SMALL))


def test_groups_of_stacked_hosts_and_a_controller_that_does_not_learn(tmp_path: Path) -> None:
    fields = {**SMALL, "controller": "heuristic", "devices": ["cpu", "cpu"], "executor": "stacked", "n_episodes": 2}
    reference = Reference(tmp_path / "whole", **fields)
    folder = reference.cut(2, tmp_path / "cut")
    same_end(reference, folder, *resume(folder, **fields))


def test_the_room_of_programs_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums depend on it, and a new process would make its programs as small as its first plan allows."""
    reserved: list[Any] = []
    monkeypatch.setattr(LoopExecutor, "rooms", property(lambda self: {"seats": ((3, 0), (1, 2))}))
    monkeypatch.setattr(LoopExecutor, "reserve", lambda self, rooms: reserved.append(rooms))
    fields = {**SMALL, "controller": "random", "devices": ["cpu", "cpu"], "n_episodes": HOSTS}
    reference = Reference(tmp_path / "whole", **fields)
    assert reserved == []
    folder = reference.cut(2, tmp_path / "cut")
    same_end(reference, folder, *resume(folder, **fields))
    assert reserved == [{"seats": ((3, 0), (1, 2))}] * 2


def test_more_episodes_than_planned(reference: Reference, tmp_path: Path) -> None:
    """A finished run that is given more episodes ends like one that had them from the start."""
    folder = tmp_path / "run"
    run(folder, **{**SMALL, "n_episodes": HOSTS})
    summary, _ = resume(folder, **SMALL)
    assert {**summary, "timing": None} == {**reference.summary, "timing": None}


_TERMINATED = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from engine import Silent, tiny_config, tiny_task
from esper.events import EventLog
from esper.run import train
with tiny_task():
    config = tiny_config(**{fields!r})
    folder = Path({folder!r})
    fields, say = config.to_train_kwargs(), partial(print, flush=True)
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        train(run_dir=folder, events=events, progress=Silent(), farewell=say, **fields)
"""


def test_sigterm_saves_within_the_episode_and_the_run_goes_on(reference: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = _TERMINATED.format(tests=str(Path(__file__).parents[1]), fields=SMALL, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        while (
            not (folder / "events.jsonl").exists()
            or '"epoch": 2, "host": 1' not in (folder / "events.jsonl").read_text()
        ):
            assert process.poll() is None
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert time.monotonic() - start < 10
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "interrupted\n"
    assert int(checkpoints(folder / FOLDER)[-1].name) >= 1
    same_end(reference, folder, *resume(folder, **SMALL))


@pytest.mark.slow
def test_a_killed_and_resumed_demo_ends_with_the_same_summary(tmp_path: Path) -> None:
    demo = ["-m", "esper.train", "--config", str(Path(__file__).parents[2] / "configs" / "demo.json")]
    small = ["--n-episodes", "24", "--max-epochs", "8"]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *demo[:2], *arguments])

    whole = start(*demo[2:], *small, "--run-dir", str(tmp_path / "whole"))
    assert whole.wait() == 0
    killed = start(*demo[2:], *small, "--run-dir", str(tmp_path / "killed"))
    folder = tmp_path / "killed" / FOLDER
    try:
        # One of the beginning and one of the first of three rollouts: most of the run is still ahead.
        while len(checkpoints(folder)) < 2:
            assert killed.poll() is None, "it has to be killed before it ends"
            time.sleep(0.02)
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert int(checkpoints(folder)[-1].name) < 24, "all is done, so there is nothing to go on with"
    assert start("--resume", "--run-dir", str(tmp_path / "killed")).wait() == 0
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert {**one, "timing": None} == {**other, "timing": None}
    assert load(tmp_path / "whole") == load(tmp_path / "killed")
