"""Trackers: what they are told, by which TorchRL logger, and what is said when a package is missing."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torchrl.record.loggers
from torchrl.record.loggers import Logger

from esper.config import TrainingConfig
from esper.errors import InputError
from esper.events import EventLog
from esper.trackers import Tracker, check_tracker, scalars
from esper.train import BAD_INPUT, main

PACKAGED = ("tensorboard", "wandb", "mlflow", "trackio")


class Experiment:
    """What a logger writes to."""

    closed = False

    def finish(self) -> None:
        self.closed = True


class FakeLogger(Logger):
    """TorchRL's logger interface, remembering what it is told."""

    def __init__(self, exp_name: str, log_dir: str) -> None:
        super().__init__(exp_name, log_dir)
        self.told: list[tuple[str, float, int | None]] = []

    def _create_experiment(self) -> Experiment:
        return Experiment()

    def log_scalar(self, name: str, value: float, step: int | None = None, **kwargs: Any) -> None:
        self.told.append((name, value, step))

    def log_video(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def log_hparams(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def log_histogram(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def __repr__(self) -> str:
        return "FakeLogger()"


def write(events: EventLog, episode: int) -> None:
    place = {"episode": episode}
    events.write("epoch", **place, epoch=1, host=0, validation_accuracy=80.0)
    events.write("rollout", **place, validation_accuracy=[80.0, 90.0], returns=[1.0, math.nan], ops={"WAIT": 3}, kept=2)
    events.write("update", **place, updates=4.0, **{"kl/op": 0.5, "loss": math.nan, "worst": math.inf})


def expected(step: int) -> list[tuple[str, float, int]]:
    values = {"validation_accuracy": 85.0, "ops/WAIT": 3.0, "kept": 2.0}
    rollout = [(f"rollout/{name}", value, step) for name, value in values.items()]
    return [*rollout, ("update/updates", 4.0, step), ("update/kl/op", 0.5, step)]


def test_every_choice_is_a_configuration() -> None:
    for kind in ("none", "csv", *PACKAGED):
        assert TrainingConfig(tracker=kind).tracker == kind
    assert TrainingConfig().tracker == "none"


@pytest.mark.parametrize("level", ["off", "normal"])
def test_csv_files_hold_rollouts_and_updates(tmp_path: Path, level: str) -> None:
    run_dir = tmp_path / "one"
    with EventLog(run_dir, {}, level) as events, Tracker("csv", run_dir) as tracker:  # type: ignore[arg-type]
        events.listeners.append(tracker)
        for episode in (0, 1):
            write(events, episode)
    scalars_dir = run_dir / "tracker" / "one" / "scalars"
    files = {str(path.relative_to(scalars_dir)): path.read_text() for path in scalars_dir.rglob("*.csv")}
    assert files == {f"{name}.csv": f"1,{value}\n2,{value}\n" for name, value, _ in expected(1)}


@pytest.mark.parametrize("kind", PACKAGED)
def test_torchrl_s_logger_is_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made: list[tuple[FakeLogger, dict[str, Any]]] = []

    def get_logger(logger_type: str, logger_name: str, experiment_name: str, **options: Any) -> FakeLogger:
        assert logger_type == kind
        made.append((FakeLogger(experiment_name, logger_name), options))
        return made[-1][0]

    def mlflow_logger(exp_name: str, tracking_uri: str, artifact_location: str) -> FakeLogger:
        assert tracking_uri == f"sqlite:///{tmp_path}/one/tracker/mlflow.db"
        assert artifact_location == f"file://{tmp_path}/one/tracker"
        return get_logger("mlflow", str(tmp_path / "one" / "tracker"), exp_name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torchrl.record.loggers, "MLFlowLogger", mlflow_logger)
    monkeypatch.setattr(torchrl.record.loggers, "get_logger", get_logger)
    run_dir = tmp_path / "one"
    with EventLog(run_dir, {}) as events, Tracker(kind, run_dir) as tracker:
        events.listeners.append(tracker)
        assert not made, "opened before the first event"
        for episode in (0, 1):
            write(events, episode)
    ((logger, options),) = made
    assert (logger.exp_name, logger.log_dir) == ("one", str(run_dir / "tracker"))
    assert logger.told == [*expected(1), *expected(2)]
    assert logger.experiment.closed
    if kind != "mlflow":
        assert options["wandb_kwargs"] == {"offline": True, "project": "esper"}
        assert options["trackio_kwargs"] == {"project": "esper"}


@pytest.mark.parametrize("kind", PACKAGED)
def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"tracker: \"{kind}\": .* pip install 'esper\[{kind}\]'"):
        check_tracker(kind)
    assert main(["--tracker", kind, "--run-dir", str(tmp_path / "run")]) == BAD_INPUT
    assert f'tracker: "{kind}"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    with EventLog(tmp_path, {}) as events, Tracker("none", tmp_path) as tracker:
        events.listeners.append(tracker)
        write(events, 0)
    assert not (tmp_path / "tracker").exists()


def test_a_run_tells_its_tracker(tmp_path: Path, engine: Any) -> None:
    run_dir = tmp_path / "run"
    assert main(["--run-dir", str(run_dir), "--n-envs", "2", "--n-episodes", "2", "--tracker", "csv"]) == 0
    file = run_dir / "tracker" / "run" / "scalars" / "rollout" / "validation_accuracy.csv"
    assert file.read_text() == "1,80.0\n"
    assert json.loads((run_dir / "config.json").read_text())["tracker"] == "csv"


def test_other_events_have_no_scalars() -> None:
    assert scalars({"type": "epoch", "data": {"validation_accuracy": 80.0}}) == {}
