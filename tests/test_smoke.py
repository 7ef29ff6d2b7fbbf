"""Every preset and every configuration file in the repository trains end to end, for one short epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.config import PRESETS
from esper.train import main
from formats import write_cifar10, write_stories

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.json"))
SMOKE = {"n_envs": 1, "n_episodes": 1, "max_epochs": 1}
SHORT = {
    "synthetic": {"batch_size": 64, "train_samples": 128},
    "mnist": {"train_samples": 256},
    "pydocs": {"batch_size": 8, "train_samples": 16},
    "cifar10": {"batch_size": 8},
    "cifar10_deep": {"batch_size": 8},
    "tinystories": {"batch_size": 1},
}


def prepare(task: str, folder: Path) -> dict[str, object]:
    """Files in the real format where the task reads some, and the fields that keep the run short."""
    if task.startswith("cifar10"):
        write_cifar10(folder, per_file=1004)
    if task == "tinystories":
        write_stories(folder, repeat=8)
    return {**SMOKE, **SHORT.get(task, {}), "data_dir": str(folder)}


def train(path: Path, run_dir: Path) -> dict[str, object]:
    assert main(["--config", str(path), "--run-dir", str(run_dir)]) == 0
    assert (run_dir / "run.png").stat().st_size > 0
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str, tmp_path: Path) -> None:
    fields = {**PRESETS[name], **prepare(str(PRESETS[name]["task"]), tmp_path / "data")}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    summary = train(tmp_path / "run.json", tmp_path / "run")
    assert summary["env_epochs"] == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_trains(path: Path, tmp_path: Path) -> None:
    fields = json.loads(path.read_text())
    fields |= prepare(fields["task"], tmp_path / "data")
    (tmp_path / "run.json").write_text(json.dumps(fields))
    assert train(tmp_path / "run.json", tmp_path / "run")["task"] == fields["task"]
