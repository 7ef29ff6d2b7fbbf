"""What stops a run: a configuration that does not fit, numbers that are not finite, no space, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import run, tiny_config, tiny_task
from esper.build import build_controller, build_env
from esper.checkpoint import snapshot as snapshots
from esper.checkpoint.compatible import MAY_CHANGE, differences
from esper.checkpoint.snapshot import checkpoints, read_snapshot
from esper.checkpoint.store import FOLDER, find
from esper.config import TrainingConfig
from esper.errors import CheckpointError, InputError, RunStopped
from esper.events import EventLog, load
from esper.learn import learner as learning
from esper.learn.collector import BatchFirstCollector
from esper.memory import memory_named
from esper.run import REFUSALS, build_learner, train
from esper.train import STOPPED, main
from tiny import differing

SMALL: dict[str, Any] = {"n_envs": 2, "max_epochs": 2, "n_episodes": 4}


@pytest.fixture(scope="module", autouse=True)
def _task() -> Iterator[None]:
    with tiny_task():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, **SMALL)
    return folder


def resume(folder: Path, **fields: Any) -> None:
    config = tiny_config(**{**SMALL, **fields})
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        train(run_dir=folder, events=events, progress=_Nothing(), resume=folder, **config.to_train_kwargs())


class _Nothing:
    def epoch(self, *_: Any) -> None:
        pass

    def rollout(self, *_: Any) -> None:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_shape_is_refused_saying_which_fields_differ(finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(CheckpointError) as refused:
        resume(finished, n_envs=3, lstm_hidden_dim=8, gamma=0.9, n_episodes=1, checkpoint_every=5)
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "gamma",
        "lstm_hidden_dim",
        "n_envs",
        "n_episodes",
    ]
    assert "n_envs: 3: must be 2, as in the checkpoint" in refused.value.problems
    assert contents(finished) == before


def test_what_may_change_and_what_may_not() -> None:
    saved = TrainingConfig(devices=["cuda:0", "cuda:1"], device="cuda:0", n_envs=4).to_dict()
    moved = {**saved, "devices": ["cuda:2", "cuda:3"], "device": "cuda", "n_episodes": 500, "telemetry_level": "off"}
    moved |= {"checkpoint_every": 9, "data_dir": "elsewhere", "collector": {"backend": "ray"}}
    assert differences(saved, moved, 8) == []
    assert [p.split(":")[0] for p in differences(saved, {**saved, "devices": ["cuda:0"]}, 8)] == ["devices"]
    assert [p.split(":")[0] for p in differences(saved, {**saved, "device": "cpu"}, 8)] == ["device"]
    assert differences(saved, {**saved, "n_episodes": 7}, 8) == ["n_episodes: 7: must be at least 8, which are done"]
    numbers = set(saved) - set(MAY_CHANGE)
    for name in numbers:
        assert [p.split(":")[0] for p in differences(saved, {**saved, name: "other"}, 8)] == [name]


def test_a_field_that_came_later_had_its_default() -> None:
    """A run saved before there was such a field goes on, unless it is used now; one with a field that is gone stops."""
    now = TrainingConfig(n_envs=2).to_dict()
    saved = {name: value for name, value in now.items() if name not in ("imitation_rollouts", "checkpoint_every")}
    assert differences(saved, now, 0) == []
    expected = ["imitation_rollouts: 1: must be 0, as in the checkpoint"]
    assert differences(saved, {**now, "imitation_rollouts": 1}, 0) == expected
    assert differences({**saved, "germination_tax": 2}, now, 0) == [
        "germination_tax: null: must be 2, as in the checkpoint"
    ]


def test_a_directory_that_holds_a_run_is_not_written_over(finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(InputError, match="must be new or empty"):
        run(finished, **SMALL)
    assert contents(finished) == before


def test_updates_that_are_not_finite_are_never_made_and_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rollout learns; from then on every update yields a weight that is not finite, then the run stops."""
    folder = tmp_path / "run"
    update, calls = learning.ppo_update, 0

    def breaks(policy: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        metrics = update(policy, *arguments, **options)
        if calls > 1:
            with torch.no_grad():
                policy.value[0].weight[0, 0] = torch.inf
        return metrics

    monkeypatch.setattr(learning, "ppo_update", breaks)
    with pytest.raises(RunStopped, match=f"not finite in {REFUSALS} rollouts in a row"):
        run(folder, **{**SMALL, "n_episodes": 40})
    assert calls == 1 + REFUSALS
    assert [int(path.name) for path in checkpoints(folder / FOLDER)] == [0, SMALL["max_epochs"]]
    _, last = find(folder, folder)
    assert all(bool(leaf.isfinite().all()) for leaf in last.parts["learner"]["weights"].values())
    updates = [event["data"] for event in load(folder) if event["type"] == "update"]
    assert [data["updates"] > 0 for data in updates] == [True] + [False] * REFUSALS
    assert all(data["non_finite/weights"] == 1.0 for data in updates[1:])


def test_a_single_refused_update_changes_nothing_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr("esper.checkpoint.store.KEEP_LAST", 10)
    update, calls = learning.ppo_update, 0

    def breaks_once(policy: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {**update(policy, *arguments, **options), **({"non_finite/loss_critic": 1.0} if calls == 2 else {})}

    monkeypatch.setattr(learning, "ppo_update", breaks_once)
    run(folder, **{**SMALL, "n_episodes": 6})
    assert [int(path.name) for path in checkpoints(folder / FOLDER)] == [0, 2, 6]
    first, last = (read_snapshot(folder / FOLDER / name)[1] for name in ("00000002", "00000006"))
    samples = SMALL["n_envs"] * SMALL["max_epochs"]
    assert float(first.parts["learner"]["rewards", "count"]) == samples
    assert float(last.parts["learner"]["rewards", "count"]) == 2 * samples
    assert last.counters["updates"] == 3
    assert differing(first.parts["learner"]["weights"], last.parts["learner"]["weights"]) != []


def test_a_refused_update_leaves_the_learner_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and both statistics, although the update had taken its steps before it was found out."""
    config = tiny_config(**SMALL)
    env = build_env(config)
    policy = build_controller(config, env)
    learner = build_learner(config, policy)
    first, second = BatchFirstCollector(env, policy, rollouts=2)
    learner.learn(first)
    before, update = learner.state(), learning.ppo_update
    monkeypatch.setattr(
        learning, "ppo_update", lambda *a, **options: {**update(*a, **options), "non_finite/loss_critic": 1.0}
    )
    assert learner.learn(second)["updates"] == 0.0
    assert learner.refused == 1
    assert differing(learner.state(), before) == []
    monkeypatch.undo()
    learner.learn(second)
    assert learner.refused == 0
    assert differing(learner.state(), before) != []


@pytest.mark.parametrize(("code", "text"), [(28, "No space left on device"), (30, "Read-only file system")])
def test_a_disk_that_takes_no_more_stops_the_run_and_loses_nothing(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    folder = tmp_path / "run"
    written, write = 0, snapshots.write_tensors

    def full(path: Path, value: Any) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(code, text, str(path))
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "write_tensors", full)
        with pytest.raises(RunStopped, match=text):
            run(folder, **SMALL)
    assert [path.name for path in (folder / FOLDER).iterdir()] == ["00000000"]
    resume(folder)
    ends = [read_snapshot(checkpoints(place / FOLDER)[-1])[1] for place in (folder, finished)]
    for part in ends[0].parts:
        assert differing(ends[0].parts[part], ends[1].parts[part]) == []
    assert load(folder) == load(finished)


@pytest.mark.parametrize(
    "fault",
    [
        lambda: torch.empty(10**15),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: (_ for _ in ()).throw(MemoryError()),
    ],
    ids=["cpu", "cuda", "python"],
)
def test_running_out_of_memory_names_the_knobs(fault: Any) -> None:
    with pytest.raises(RunStopped, match=r"n_envs \(64\).*batch_size \(512\)"), memory_named(64, 512):
        fault()
    with pytest.raises(RuntimeError, match="something else"), memory_named(64, 512):
        raise RuntimeError("something else")


def test_the_command_says_why_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "tiny", "--n-envs", "2", "--max-epochs", "1", "--n-episodes", "2"]

    def no_memory(*_: Any) -> None:
        torch.empty(10**15)

    with monkeypatch.context() as patch:
        patch.setattr("esper.run.build_env", no_memory)
        assert main([*arguments, "--run-dir", str(tmp_path / "a")]) == STOPPED
    said = capsys.readouterr().err
    assert said.startswith("esper.train: stopped: out of memory: n_envs (2)")
    assert said.count("\n") == 1

    def full(self: EventLog, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "events.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "time", full)
        assert main([*arguments, "--run-dir", str(tmp_path / "b")]) == STOPPED
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "--resume goes on" in said
    assert [path.name for path in checkpoints(tmp_path / "b" / FOLDER)] == ["00000000"]
