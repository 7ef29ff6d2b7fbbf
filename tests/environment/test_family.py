"""A run whose hosts differ: rates, events, resuming, and what stays as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import Silent, run, tiny_config, tiny_task
from esper import keys as k
from esper.build import build_env
from esper.config_fields import Family
from esper.data.family import class_names, draws
from esper.data.splits import Split
from esper.environment.observation import feature
from esper.environment.rewards import reward
from esper.events import EventLog, load
from esper.growth.step import evaluate
from esper.run import train
from esper.seeds.actions import Op
from esper.telemetry import RolloutBook
from tiny import differing

FAMILY = {"train_fraction": [0.2, 1.0], "label_noise": [0.0, 0.5], "host_lr_factor": [0.2, 5.0], "classes": [2, 9]}
NEUTRAL = {"train_fraction": [1.0, 1.0], "label_noise": [0.0, 0.0], "host_lr_factor": [1.0, 1.0], "classes": [10, 10]}


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


WIDTHS = {"width": [1, 2, 4]}


def test_neutral_draws_change_no_bit() -> None:
    assert differing(trained().growth()[0], trained(family=NEUTRAL).growth()[0]) == []


def test_each_draw_changes_every_host() -> None:
    plain = trained().growth()[0]["host", "params", "head", "weight"]
    for name, value in {"train_fraction": 0.5, "label_noise": 0.5, "host_lr_factor": 2.0, "classes": 2}.items():
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
    family = {name: ends for name, ends in FAMILY.items() if name != "classes"}
    plain, drawn = (build_env(tiny_config(n_envs=3, max_epochs=2, **f)) for f in ({}, {"family": family}))
    assert torch.equal(plain.reset()["observation"], drawn.reset()["observation"])


@pytest.mark.parametrize("part", ["validation", "test"])
def test_hosts_are_scored_by_the_names_they_have_for_classes(part: str) -> None:
    env = trained(1, family={"classes": [2, 5]})
    (growth,) = env.growth()
    shard = env.backend.shards[0]
    names = class_names(Family(classes=(2, 5)), shard.splits.train, growth["key"])
    scores = evaluate([shard], [growth], [((None,) * 3,) * 3], env.backend.settings, part)
    split = getattr(shard.splits, part)
    for host in range(3):
        one = growth[host : host + 1]
        own = replace(shard.splits, **{part: Split(split.inputs, names[host][split.targets])})
        alone = replace(shard, size=1, splits=own)
        expected = evaluate([alone], [one], [((None,) * 3,)], replace(env.backend.settings, family=None), part)
        for name in ("loss", "correct", "seen"):
            assert torch.equal(scores[host : host + 1][name], expected[name])


def test_devices_do_not_change_what_is_drawn() -> None:
    one, two = trained(family=FAMILY), trained(family=FAMILY, devices=["cpu", "cpu"])
    assert differing(one.growth()[0], torch.cat(two.growth())) == []


def test_events_tell_what_every_host_drew(tmp_path: Path) -> None:
    _, events = run(tmp_path, controller="never", max_epochs=2, family=FAMILY)
    kinds = [event["type"] for event in events]
    assert kinds.index("hosts") < kinds.index("epoch")
    told = [event for event in events if event["type"] == "hosts"]
    assert [(event["episode"], event["epoch"]) for event in told] == [(0, 0), (1, 0)]
    assert told[0]["data"] != told[1]["data"]
    for episode, event in enumerate(told):
        keys = k.host_keys(k.fold(k.root(42), k.Purpose.EPISODE, episode), 4)
        for name, values in draws(Family.model_validate_json(json.dumps(FAMILY)), keys).items():
            assert event["data"][name] == values.tolist()
            assert event["data"]["classes"] != [None] * 4
    _, events = run(tmp_path / "plain", controller="never", max_epochs=2)
    assert "hosts" not in {event["type"] for event in events}


def test_a_resumed_run_goes_on_with_the_same_hosts(tmp_path: Path) -> None:
    family = {**FAMILY, **WIDTHS}
    whole, _ = run(tmp_path / "whole", max_epochs=2, family=family)
    run(tmp_path / "part", max_epochs=2, family=family, n_episodes=4)
    config = tiny_config(max_epochs=2, family=family)
    folder = tmp_path / "part"
    with EventLog(folder, config.to_dict(), config.telemetry_level) as events:
        resumed = train(run_dir=folder, resume=folder, events=events, progress=Silent(), **config.to_train_kwargs())
    assert resumed["weights_digest"] == whole["weights_digest"]
    logs = [[e for e in load(tmp_path / name) if e["type"] == "hosts"] for name in ("whole", "part")]
    assert [e["data"] for e in logs[0]] == [e["data"] for e in logs[1]]


def test_growth_is_seen_and_priced_against_the_hosts_own_size() -> None:
    env = build_env(tiny_config(n_envs=6, max_epochs=1, family=WIDTHS, incubation="none", blueprints=["conv_expand"]))
    env.reset()
    own = env.host_parameters()
    assert set(own.tolist()) == {163, 496, 1702}
    results = []
    env.observer = results.append
    step = env.fake_tensordict()
    step["action"] = torch.tensor([1, 0, 0, Op.GERMINATE]).expand(6, 4).clone()
    seen = env.step(step)["next"]
    (result,) = results
    extra = result["after"]["parameters"].sum(1)
    assert torch.allclose(feature(seen["observation"], "growth"), extra / own)
    assert result["param_budget"].tolist() == (4 * own).tolist()
    book = RolloutBook(0.1)
    book.add(result)
    outcome = book.close()
    price = 0.1 * 100 * extra / (4 * own)
    assert outcome["objective"] == pytest.approx((result["metrics", "val_accuracy"] - price).tolist(), rel=1e-5)
    assert outcome["parameters"] == (own + extra).tolist()
    prices = replace(env.settings.reward, host_parameters=own)
    again, common = (reward(result, p, terminal=True)["total"] for p in (prices, env.settings.reward))
    assert torch.equal(again, seen["reward"].squeeze(1))
    assert not torch.equal(again, common)


def test_a_budget_of_ones_own_is_the_same_for_every_width() -> None:
    env = build_env(tiny_config(n_envs=2, max_epochs=1, family=WIDTHS, param_budget=77))
    results = []
    env.observer = results.append
    env.rollout(1)
    assert results[0]["param_budget"].tolist() == [77, 77]
