"""Anomalies by threshold, exploded ratios by host and epoch, gradients by layer; and none of it changes anything."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from esper.control.policy import RecurrentPolicy
from esper.keys import root
from esper.learn.diagnostics import (
    LAYER_STATISTICS,
    MAX_ENTRIES,
    AnomalyDetector,
    UpdateWatch,
    layer_records,
    layer_statistics,
    ratio_explosion,
)
from esper.learn.update import PPOSettings, ppo_update
from esper.seeds.actions import HEADS, OP, SLOT, Op
from learn.learning_tasks import Memory, collect

DETECTOR = AnomalyDetector()
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("metrics", "progress", "kinds"),
    [
        ({}, 0.5, []),
        ({"ratio_max/op": 5.0, "ratio_min/op": 0.1}, 0.5, []),
        *(({f"ratio_max/{head}": 5.01}, 0.5, ["ratio_explosion"]) for head in HEADS),
        *(({f"ratio_min/{head}": 0.09}, 0.5, ["ratio_collapse"]) for head in HEADS),
        ({"explained_variance": -0.5}, 0.09, []),
        ({"explained_variance": -0.51}, 0.09, ["value_collapse"]),
        ({"explained_variance": -0.2}, 0.10, []),
        ({"explained_variance": -0.21}, 0.10, ["value_collapse"]),
        ({"explained_variance": 0.0}, 0.25, []),
        ({"explained_variance": -0.01}, 0.25, ["value_collapse"]),
        ({"explained_variance": 0.1}, 0.75, []),
        ({"explained_variance": 0.09}, 0.75, ["value_collapse"]),
        ({"grad_norm": NAN}, 0.5, ["numerical_instability"]),
        ({"loss_critic": INF}, 0.5, ["numerical_instability"]),
        ({"updates": 0.0, "non_finite/next.reward": 1.0}, 0.9, ["numerical_instability"]),
        ({"ratio_max/op": INF}, 0.5, ["ratio_explosion", "numerical_instability"]),
        (
            {"ratio_max/slot": 9.0, "ratio_max/op": 6.0, "ratio_min/op": 0.01, "explained_variance": -3.0},
            1.0,
            ["ratio_explosion", "ratio_collapse", "value_collapse"],
        ),
    ],
)
def test_an_anomaly_is_strictly_beyond_its_threshold(metrics, progress, kinds) -> None:
    assert [anomaly.kind for anomaly in DETECTOR.detect(metrics, progress)] == kinds


def test_the_detail_names_metric_value_and_threshold() -> None:
    metrics = {"ratio_max/slot": 9.0, "ratio_max/op": 6.0, "explained_variance": -0.3, "non_finite/loss_critic": 1.0}
    details = {anomaly.kind: anomaly.detail for anomaly in DETECTOR.detect(metrics, 0.2)}
    assert details == {
        "ratio_explosion": "ratio_max/slot 9, ratio_max/op 6: above 5",
        "value_collapse": "explained_variance -0.3: below -0.2 after 20 % of the episodes",
        "numerical_instability": "loss_critic not finite",
    }


@pytest.fixture(scope="module")
def collected():
    env = Memory(2)
    policy = RecurrentPolicy(env.features, 16, seed=2)
    return policy, collect(env, policy)


def shifted(rollout, *places):
    """The rollout as if the policy had given what happened at (host, epoch, head) a log-probability lower by `by`."""
    changed = rollout.clone()
    for host, epoch, head, by in places:
        changed["action_log_prob"][host, epoch, head] -= by
    return changed


def test_exploded_ratios_are_named_by_host_epoch_and_head(collected) -> None:
    policy, rollout = collected
    host, epoch = (rollout["action"][..., OP] != Op.WAIT).nonzero()[0].tolist()
    rows = shifted(rollout, (host, epoch, SLOT, 3.0), (9, 1, OP, -4.0), (5, 2, OP, 1.0))
    seen = ratio_explosion(policy, rows, torch.arange(rows.shape[0]), DETECTOR)
    ops = rollout["action"][..., OP]
    assert [(e.host, e.epoch, e.head, e.op) for e in seen.entries] == [
        (9, 1, "op", Op(int(ops[9, 1])).name),
        (host, epoch, "slot", Op(int(ops[host, epoch])).name),
    ]
    assert [e.ratio for e in seen.entries] == pytest.approx([math.exp(-4.0), math.exp(3.0)], rel=1e-4)
    assert seen.count == 2
    assert seen.max_change == pytest.approx(4.0, abs=1e-4)
    assert 0 < seen.mean_change < 0.2


def test_hosts_of_a_minibatch_keep_their_numbers(collected) -> None:
    policy, rollout = collected
    hosts = torch.tensor([9, 40, 3])
    seen = ratio_explosion(policy, shifted(rollout, (40, 2, OP, 3.0))[hosts], hosts, DETECTOR)
    assert [(e.host, e.epoch) for e in seen.entries] == [(40, 2)]


def test_the_list_is_bounded_keeps_the_worst_and_is_plain_json(collected) -> None:
    policy, rollout = collected
    rows = rollout.clone()
    rows["action_log_prob"][..., OP] -= 2.0
    rows["action_log_prob"][:4, 0, OP] = float("nan")
    seen = ratio_explosion(policy, rows, torch.arange(rows.shape[0]), DETECTOR)
    assert seen.count == rollout.numel()
    assert len(seen.entries) == MAX_ENTRIES
    assert {e.host for e in seen.entries[:4]} == {0, 1, 2, 3}
    data = seen.to_dict()
    assert json.loads(json.dumps(data))["count"] == seen.count
    assert data["entries"][5].keys() == {"host", "epoch", "head", "op", "ratio"}


def update(collected, observer, rollout=None, settings=None):
    policy = copy.deepcopy(collected[0])
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    rows = collected[1] if rollout is None else rollout
    settings = PPOSettings() if settings is None else settings
    metrics = ppo_update(policy, optimizer, rows, settings, entropy_coef=0.01, key=root(0), observer=observer)
    return metrics, policy


def test_looking_on_changes_nothing(collected) -> None:
    rows = shifted(collected[1], (3, 1, OP, 3.0))
    settings = PPOSettings(target_kl=None)
    watch = UpdateWatch(DETECTOR, per_layer=True)
    seen, watched = update(collected, watch, rows, settings)
    plain, alone = update(collected, None, rows, settings)
    assert watch.explosion is not None
    assert watch.layers()
    assert seen == plain
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_a_sound_update_costs_no_second_look(collected, monkeypatch) -> None:
    calls = []
    evaluate = RecurrentPolicy.evaluate
    monkeypatch.setattr(RecurrentPolicy, "evaluate", lambda *given: calls.append(1) or evaluate(*given))
    watch = UpdateWatch(DETECTOR, per_layer=False)
    update(collected, watch)
    assert len(calls) == PPOSettings().ppo_updates_per_batch
    assert watch.explosion is None
    assert watch.layers() == []


@pytest.mark.parametrize("minibatches", [1, 4])
def test_an_update_reports_the_host_that_exploded(collected, minibatches) -> None:
    watch = UpdateWatch(DETECTOR, per_layer=False)
    settings = PPOSettings(target_kl=None, minibatches=minibatches)
    metrics, _ = update(collected, watch, shifted(collected[1], (7, 2, OP, 3.0)), settings)
    assert metrics["ratio_max/op"] > 5
    assert watch.explosion is not None
    assert [(e.host, e.epoch, e.head) for e in watch.explosion.entries] == [(7, 2, "op")]


def test_gradients_by_layer() -> None:
    layers = nn.ParameterDict({name: nn.Parameter(torch.zeros(4)) for name in ("a", "b", "without")})
    layers["empty"] = nn.Parameter(torch.zeros(0))
    layers["a"].grad = torch.tensor([0.0, 3.0, -4.0, 5e-7])
    layers["b"].grad = torch.tensor([float("nan"), float("inf"), 11.0, -0.0])
    layers["empty"].grad = torch.zeros(0)
    records = {record["name"]: record for record in layer_records(*layer_statistics(layers))}
    assert records.keys() == {"a", "b", "empty"}
    a, b = records["a"], records["b"]
    assert a["size"] == 4
    assert a["norm"] == pytest.approx(5.0)
    assert a["mean"] == pytest.approx(-0.25)
    assert a["std"] == pytest.approx(math.sqrt(25 / 4 - 0.0625))
    assert (a["min"], a["max"]) == (-4.0, 3.0)
    assert (a["zero"], a["small"], a["large"], a["nan"], a["inf"]) == (0.25, 0.5, 0.0, 0, 0)
    assert (b["zero"], b["large"], b["nan"], b["inf"]) == (0.25, 0.5, 1, 1)
    assert records["empty"] == {"name": "empty", "size": 0, **dict.fromkeys(LAYER_STATISTICS, 0.0)}


def test_the_gradient_that_stopped_an_update_is_the_one_shown(collected) -> None:
    policy = copy.deepcopy(collected[0])
    policy.get_parameter("memory.weight_hh").register_hook(lambda gradient: gradient * float("nan"))
    watch = UpdateWatch(DETECTOR, per_layer=True)
    ppo_update(
        policy,
        torch.optim.Adam(policy.parameters()),
        collected[1],
        PPOSettings(),
        entropy_coef=0.01,
        key=root(0),
        observer=watch,
    )
    by_name = {record["name"]: record for record in watch.layers()}
    assert by_name["memory.weight_hh"]["nan"] == by_name["memory.weight_hh"]["size"]
    assert by_name["value.0.weight"]["nan"] == 0
