"""A run whose hosts differ: rates, events, resuming, and what stays as it was."""

import json
from pathlib import Path

import pytest
import torch

from engine import Silent, run, tiny_config, tiny_task
from esper import keys as k
from esper.build import build_env
from esper.config_fields import Family
from esper.data.family import draws
from esper.events import EventLog, load
from esper.run import train
from tiny import differing

FAMILY = {"train_fraction": [0.2, 1.0], "label_noise": [0.0, 0.5], "host_lr_factor": [0.2, 5.0]}


@pytest.fixture(autouse=True)
def _task():
    with tiny_task():
        yield


def trained(epochs: int = 2, **fields):
    env = build_env(tiny_config(n_envs=3, max_epochs=epochs, **fields))
    env.reset()
    for _ in range(epochs):
        action = env.fake_tensordict()
        action["action"] = torch.zeros(3, 4, dtype=torch.int64)
        env.step(action)
    return env


def test_neutral_draws_change_no_bit() -> None:
    neutral = {name: [0.0, 0.0] if name == "label_noise" else [1.0, 1.0] for name in FAMILY}
    assert differing(trained().growth()[0], trained(family=neutral).growth()[0]) == []


def test_each_draw_changes_every_host() -> None:
    plain = trained().growth()[0]["host", "params", "head", "weight"]
    for name, value in {"train_fraction": 0.5, "label_noise": 0.5, "host_lr_factor": 2.0}.items():
        changed = trained(family={name: [value, value]}).growth()[0]["host", "params", "head", "weight"]
        assert not (plain == changed).flatten(1).all(1).any(), name


def test_the_learning_rate_is_the_drawn_share_of_the_given_one() -> None:
    env = trained(host_lr=0.3, family=FAMILY)
    drawn = env.drawn()
    assert drawn is not None
    factor = draws(Family(host_lr_factor=(0.2, 5.0)), env.growth()[0]["key"])["host_lr_factor"]
    assert torch.equal(drawn["host_lr"], 0.3 * factor)
    assert env.growth()[0]["rates", "seed"].unique().numel() == 1


def test_hosts_are_scored_on_all_of_the_same_samples() -> None:
    """Which samples a host trains on and under which labels is nothing to validation: fresh hosts score alike."""
    plain, drawn = (build_env(tiny_config(n_envs=3, max_epochs=2, **f)) for f in ({}, {"family": FAMILY}))
    assert torch.equal(plain.reset()["observation"], drawn.reset()["observation"])


def test_devices_do_not_change_what_is_drawn() -> None:
    one, two = trained(family=FAMILY), trained(family=FAMILY, devices=["cpu", "cpu"])
    assert differing(one.growth()[0], torch.cat(two.growth())) == []


def test_events_tell_what_every_host_drew(tmp_path: Path) -> None:
    _, events = run(tmp_path, controller="never", max_epochs=2, family=FAMILY)
    told = [event for event in events if event["type"] == "hosts"]
    assert [(event["episode"], event["epoch"]) for event in told] == [(0, 0), (1, 0)]
    assert told[0]["data"] != told[1]["data"]
    for episode, event in enumerate(told):
        keys = k.host_keys(k.fold(k.root(42), k.Purpose.EPISODE, episode), 4)
        for name, values in draws(Family.model_validate_json(json.dumps(FAMILY)), keys).items():
            assert event["data"][name] == values.tolist()
    _, events = run(tmp_path / "plain", controller="never", max_epochs=2)
    assert "hosts" not in {event["type"] for event in events}


def test_a_resumed_run_goes_on_with_the_same_hosts(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", max_epochs=2, family=FAMILY)
    run(tmp_path / "part", max_epochs=2, family=FAMILY, n_episodes=4)
    config = tiny_config(max_epochs=2, family=FAMILY)
    folder = tmp_path / "part"
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        resumed = train(run_dir=folder, resume=folder, events=events, progress=Silent(), **config.to_train_kwargs())
    assert resumed["weights_digest"] == whole["weights_digest"]
    logs = [[e for e in load(tmp_path / name) if e["type"] == "hosts"] for name in ("whole", "part")]
    assert [e["data"] for e in logs[0]] == [e["data"] for e in logs[1]]
