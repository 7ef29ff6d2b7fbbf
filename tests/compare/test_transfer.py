"""A controller that has learned on one kind of host is judged on others, as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import run, tiny_task
from esper import keys as k
from esper.checkpoint.store import find
from esper.compare import arms
from esper.compare.bench import Bench
from esper.compare.config import CompareConfig
from esper.control.transfer import Transferred
from esper.data.splits import Split, Splits
from esper.errors import InputError
from esper.hosts.cnn import CNNHost
from esper.hosts.transformer import TransformerHost
from esper.seeds.stages import Stage
from esper.tasks import _REGISTRY, get_task, register_task
from tiny import images

HOSTS = {
    "other": CNNHost(1, 10, 2, pool_layers=2),
    "wide": CNNHost(1, 10, 5, pool_layers=2),
    "deep": CNNHost(1, 10, 2, n_blocks=5, pool_layers=2),
}
FIELDS = {"max_epochs": 6, "incubation": "none", "gates": "permissive", "slots": ["early", "mid", "late"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on the tiny task with two blueprints, and tasks with other data and hosts."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with tiny_task():
        for name, host in HOSTS.items():
            task = replace(
                get_task("tiny"), name=name, host=lambda host=host: host, load=lambda key, folder: images(48)
            )
            register_task(task)
        run(folder, n_episodes=8, blueprints=["conv_light", "norm"], **{**FIELDS, "max_epochs": 4})
        yield folder
        for name in HOSTS:
            del _REGISTRY[name]


def judged(run_dir: Path, out: Path, **fields: Any) -> Bench:
    training = {**FIELDS, "seed": 7, **fields}
    given = {"kind": "ppo", "run": str(run_dir)}
    config = {"training": training, "seeds": 3, "arms": [{"kind": "never"}, given]}
    bench = Bench(CompareConfig.from_dict(config), out, lambda text: None)
    list(arms.run_arms(bench))
    return bench


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("other", {"max_epochs": 9}),
        ("wide", {"use_telemetry": False}),
        ("deep", {"slots": ["late", "mid"]}),
        ("other", {"blueprints": ["depthwise", "norm", "conv_expand", "conv_light"]}),
        ("other", {"blueprints": ["attention", "norm"]}),
    ],
)
def test_a_controller_is_judged_elsewhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, fields: dict[str, Any]
) -> None:
    policies: list[Any] = []
    evaluate = Bench.evaluate

    def remember(bench: Bench, name: str, policy: Any, *given: Any, **more: Any) -> None:
        policies.append(policy)
        evaluate(bench, name, policy, *given, **more)

    monkeypatch.setattr(Bench, "evaluate", remember)
    bench = judged(trained, tmp_path, task=task, **fields)
    rows, here = bench.rows, bench.judge.spec.blueprints
    assert rows["ppo-sampled"].chosen["task"] == "tiny"
    assert rows["ppo-sampled"].chosen["blueprints"] == ["conv_light", "norm"]
    records = rows["ppo-sampled"].records
    assert records.batch_size == (3, len(bench.config.shared.slots))
    assert bool((records["planted"] > 0).any()), "it does plant here"
    seeds = records["blueprint"][records["stage"] != Stage.DORMANT].tolist()
    assert {here[b] for b in seeds if b >= 0} <= {"conv_light", "norm"}
    weights = find(trained, trained)[1].parts["learner"]["weights"]
    for policy in policies[1:]:
        inner = policy.policy if isinstance(policy, Transferred) else policy
        assert isinstance(policy, Transferred) == (list(here) != ["conv_light", "norm"])
        assert all(torch.equal(weights[name], value) for name, value in inner.state_dict().items())


def test_no_common_blueprint_is_an_input_error(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has learned none of them but conv_light, norm"):
        judged(trained, tmp_path, task="other", blueprints=["attention"])


def test_the_same_data_ask_for_the_same_seed(trained: Path, tmp_path: Path) -> None:
    register_task(replace(get_task("tiny"), name="tiny_wide", host=lambda: HOSTS["wide"]))
    try:
        with pytest.raises(InputError, match="with seed 42, the comparison has 7"):
            judged(trained, tmp_path, task="tiny_wide")
        assert "ppo-greedy" in judged(trained, tmp_path, task="tiny_wide", seed=42).rows
    finally:
        del _REGISTRY["tiny_wide"]


def test_from_images_to_text(trained: Path, tmp_path: Path) -> None:
    """A transformer has a seed called norm too; everything else it can grow is left alone."""
    tokens = k.integers(k.root(0), 16, 8, 9).to(torch.int32)
    split = Split(tokens[:, :-1], tokens[:, 1:])
    text = replace(get_task("pydocs"), name="text", load=lambda key, folder: Splits(split, split, split), batch_size=4)
    register_task(replace(text, host=lambda: TransformerHost(16, 12, 6, 3, 8), n_outputs=16))
    try:
        rows = judged(trained, tmp_path, task="text", max_epochs=2).rows
    finally:
        del _REGISTRY["text"]
    assert rows["ppo-greedy"].objective.shape == (3,)
