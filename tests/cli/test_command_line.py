"""`python -m esper.train`: what it refuses, how, and what it leaves behind."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esper.config import PRESETS, TrainingConfig
from esper.events import load
from esper.train import BAD_INPUT, INTERRUPTED, main

CONFIGS = Path(__file__).parents[2] / "configs"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == BAD_INPUT
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--n-env", "3"], ["--n-env: there is no such flag", "did you mean --n-envs?"]),
        (["extra"], ["extra: there is no such flag"]),
        (["--n-envs", "many"], ['n_envs: "many": must be an integer']),
        (["--n-envs"], ["--n-envs: expected one argument"]),
        (["--slots"], ["slots: []:"]),
        (["--slots", "top"], ['slots[0]: "top": must be one of early, mid, late']),
        (["--devices", "cpu", "cpu", "--n-envs", "1"], ["devices:", "n_envs (1)"]),
        (["--device", "gpu"], ['device: "gpu": must be cpu, cuda or cuda:<index>']),
        (["--preset", "imagenet"], ['preset: "imagenet": must be one of digits']),
        (["--preset", "mnist", "--task", "digits"], ['task: "digits": preset mnist is for task mnist']),
        (["--preset", "mnist", "--config", "x.json"], ["--config and --preset"]),
        (["--config", "missing.json"], ['config: "missing.json": must be a file']),
        (["--resume"], ["resume: needs --run-dir"]),
        (["--resume", "--preset", "digits", "--run-dir", "x"], ["--preset and --resume"]),
        (["--schedule", "[{"], ["schedule:", "must be a list"]),
        (["--lr", "abc", "--seed", "-1", "--amp", "on"], ["3 problems", 'lr: "abc"', "seed: -1", 'amp: "on"']),
    ],
)
def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], fragments: list[str]) -> None:
    message = refusal(capsys, *arguments)
    for fragment in fragments:
        assert fragment in message


def test_problems_of_file_and_flags_come_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"n_env": 3, "lr": "fast", "slots": []}))
    message = refusal(capsys, "--config", str(path), "--gamma", "2", "--frobnicate", "--task", "chess")
    assert "6 problems" in message
    for place in ("--frobnicate", "n_env: 3", 'lr: "fast"', "slots: []", "gamma: 2", 'task: "chess"'):
        assert place in message


def test_bad_input_is_refused_without_torch_in_under_two_seconds(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"n_env": 3, "slots": ["top"], "devices": ["cuda"]}')
    script = (
        "import sys; from esper.train import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was loaded'; sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script, "--config", str(path)], capture_output=True, text=True, check=False
        )
        seconds.append(time.monotonic() - start)
        assert done.returncode == BAD_INPUT, done.stderr
        assert "Traceback" not in done.stderr
        assert "3 problems" in done.stderr
        assert done.stdout == ""
    assert min(seconds) < 2.0


def test_the_module_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "esper.train", "--gamma", "2"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr == "esper.train: 1 problem:\n  gamma: 2: must be a number > 0 and <= 1\n"


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in TrainingConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_the_printed_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "mnist", "--n-envs", "3", "--print-config"]) == 0
    path = tmp_path / "printed.json"
    path.write_text(capsys.readouterr().out)
    assert TrainingConfig.from_json_path(path) == TrainingConfig.from_dict({**PRESETS["mnist"], "n_envs": 3})


def test_the_printed_schema_is_the_config_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == TrainingConfig.json_schema()


def test_a_task_brings_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "cifar10", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["entropy_coef"] == PRESETS["cifar10"]["entropy_coef"]


def test_null_is_a_text_where_nothing_else_is_legal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-dir", "null", "--target-kl", "null", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["data_dir"], shown["target_kl"]) == ("null", None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    TrainingConfig.from_json_path(path)


def test_a_run_leaves_its_directory(tmp_path: Path, engine, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(["--run-dir", str(run_dir), "--n-envs", "2", "--n-episodes", "2", "--max-epochs", "2"]) == 0
    names = ["config.json", "events.jsonl", "run.png", "run.svg", "summary.json", "timings.jsonl"]
    assert sorted(path.name for path in run_dir.iterdir()) == names
    config = TrainingConfig.from_json_path(run_dir / "config.json")
    (call,) = engine.calls
    assert call == {"run_dir": run_dir, "resume": None, **config.to_train_kwargs()}
    assert [event["type"] for event in load(run_dir)] == ["run_started", *["epoch"] * 4, "rollout"]
    assert json.loads((run_dir / "summary.json").read_text())["weights_digest"] == "0123abcd"
    shown = capsys.readouterr().out
    for fragment in ("hosts 0-1 on cpu; policy on cpu", "rollout 1/1", "90.50 %", "3 / 1 / 2", str(run_dir)):
        assert fragment in shown.replace("\n", "") or fragment in shown


def test_on_a_terminal_a_run_shows_its_hosts_and_phases(
    tmp_path: Path, engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--run-dir", str(tmp_path / "run"), "--n-envs", "2", "--slots", "late", "early"]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"host +40 to 40 % +now +early +late", shown)
    assert re.search(r"   1  ▄ +40\.0 %  · +·", shown)
    assert "collect 100 %" in shown


def test_without_a_run_dir_a_new_one_is_made_under_runs(
    tmp_path: Path, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.endswith("-digits-ppo-42")


def test_telemetry_off_still_leaves_config_and_summary(tmp_path: Path, engine) -> None:
    assert main(["--run-dir", str(tmp_path / "run"), "--telemetry-level", "off"]) == 0
    assert load(tmp_path / "run") == []
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "run.png").exists()


def test_a_directory_in_use_is_refused_and_left_alone(
    tmp_path: Path, engine, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("precious")
    assert "run_dir: " in refusal(capsys, "--run-dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "precious"
    assert "run_dir: " in refusal(capsys, "--run-dir", str(tmp_path / "summary.json"))
    assert engine.calls == []


def test_cuda_that_is_not_there_is_refused_before_the_engine(
    tmp_path: Path, engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(capsys, "--devices", "cuda:0", "--device", "cuda", "--run-dir", str(tmp_path / "run"))
    assert 'devices[0]: "cuda:0": CUDA is not available' in message
    assert 'device: "cuda": CUDA is not available' in message
    assert engine.calls == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("batch_size: 512; too large"), FileNotFoundError("looked in data/x")])
def test_what_stops_a_run_before_it_starts_is_bad_input(
    tmp_path: Path, engine, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    engine.error_before = error
    assert str(error) in refusal(capsys, "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_later_is_not_called_bad_input(tmp_path: Path, engine) -> None:
    engine.error_after = ValueError("a fault in the program")
    with pytest.raises(ValueError, match="a fault in the program"):
        main(["--run-dir", str(tmp_path / "run")])


def test_an_interrupt_is_one_line(tmp_path: Path, engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.error_after = KeyboardInterrupt()
    assert main(["--run-dir", str(tmp_path / "run")]) == INTERRUPTED
    assert capsys.readouterr().err == "esper.train: interrupted\n"


def test_resume_goes_on_with_the_runs_own_config(tmp_path: Path, engine) -> None:
    run_dir = tmp_path / "run"
    assert main(["--run-dir", str(run_dir), "--seed", "7"]) == 0
    assert main(["--run-dir", str(run_dir), "--resume", "--n-episodes", "900"]) == 0
    assert main(["--run-dir", str(run_dir), "--resume", str(run_dir / "checkpoints" / "3")]) == 0
    assert [call["seed"] for call in engine.calls] == [7, 7, 7]
    assert [call["n_episodes"] for call in engine.calls] == [400, 900, 900]
    assert [call["resume"] for call in engine.calls] == [None, run_dir, run_dir / "checkpoints" / "3"]


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(
    tmp_path: Path, engine, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["--run-dir", str(tmp_path / "run")]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == after
