"""Three epochs in half precision end where float32 ends: `bench/amp.py` at a size for a CPU, with all its limits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

import amp
from esper.data.text import load_pydocs
from esper.growth.executors.stacked import StackedExecutor
from esper.hosts.ops import conv2d, norm_relu_pool
from esper.hosts.transformer import TransformerHost
from esper.seeds.blueprints import registry
from esper.tasks import get_task

CPU = torch.device("cpu")
LENGTH = 16
TASKS = {
    "cnn": get_task("digits"),
    "transformer": replace(
        get_task("pydocs"),
        host=lambda: TransformerHost(256, 16, 2, 3, LENGTH, 0.0),
        load=lambda key, folder: load_pydocs(LENGTH),
    ),
}
SIZES = {"cnn": amp.Size(1, 64, 32, (2,), 6.0, 20.0), "transformer": amp.Size(1, 48, 16, (2,), 6.0, 20.0)}


@pytest.mark.parametrize("executor", ["loop", "stacked"])
@pytest.mark.parametrize("topology", list(TASKS))
def test_three_epochs_end_where_float32_ends(topology: str, executor: str) -> None:
    rows = amp.measure(TASKS[topology], SIZES[topology], executor, ("bf16", "fp16"), CPU)
    assert [row["broken"] for row in rows] == [[], [], []]
    assert [row["amp"] for row in rows] == ["off", "bf16", "fp16"]
    assert rows[2]["scale_halvings"]["hosts"] == 0
    # The precisions are different ones: coarser bits, larger distance.
    assert 0.0 < rows[2]["ratio_median"] < rows[1]["ratio_median"]


@pytest.mark.parametrize("topology", list(TASKS))
def test_every_blueprint_takes_part_in_every_way(topology: str) -> None:
    task = TASKS[topology]
    spec = amp.make_spec(task)
    records = amp.make_growth(task, spec, amp.FULL[topology])["slots"]
    assert set(spec.blueprints) == set(registry.names(topology)) - {"noop"}
    ways = zip(*(records[name].flatten().tolist() for name in ("blueprint", "stage", "blend")), strict=True)
    n = len(spec.blueprints)
    blending = {(b, amp.Stage.BLENDING, f) for b in range(n) for f in range(3)}
    others = {(b, stage, 0) for b in range(n) for stage in (amp.Stage.TRAINING, amp.Stage.FOSSILIZED)}
    assert set(ways) == blending | others
    assert bool((records["parameters"] > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stack_convolves_and_normalises_in_half_precision_like_one_host(dtype: torch.dtype) -> None:
    x, w, ones = torch.randn(3, 4, 2, 8, 8), torch.randn(3, 5, 2, 3, 3), torch.ones(3, 5)

    def layer(x, w, scale):
        return norm_relu_pool(conv2d(x, w), 0 * scale, scale, scale, 0 * scale, momentum=0.1, pool=2)[0]

    with torch.autocast("cpu", dtype, cache_enabled=False):
        stacked, alone = torch.func.vmap(layer)(x, w, ones), layer(x[0], w[0], ones[0])
        assert torch.func.vmap(conv2d)(x, w).dtype is dtype
    assert stacked.dtype is alone.dtype is dtype
    torch.testing.assert_close(stacked[0], alone)


class Coarse(StackedExecutor):
    """An executor whose seeds report gradients a tenth too large in half precision."""

    def measured(self, carry: object) -> TensorDict:
        measured = super().measured(carry)
        if self.spec.amp != "off":
            measured["seed_norm"] *= 1.1
        return measured


class Broken(StackedExecutor):
    """An executor that loses one host's last layer in half precision."""

    def finish(self, carry: object, growth: TensorDict) -> TensorDict:
        growth = super().finish(carry, growth)
        if self.spec.amp != "off":
            next(iter(growth["host", "params"].values(True, True)))[0] = float("nan")
        return growth


@pytest.mark.parametrize(("kind", "limits"), [(Coarse, {"ratio of the median slot"}), (Broken, {"no panic"})])
def test_the_limits_are_limits(kind: type, limits: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(amp.EXECUTORS, "stacked", kind)
    size = amp.Size(1, 32, 16, (2,), 6.0, 20.0)
    rows = amp.measure(TASKS["transformer"], size, "stacked", ("bf16",), CPU)
    assert rows[0]["broken"] == []
    assert limits <= set(rows[1]["broken"])


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "amp.json"
    small = {"cnn": amp.Size(1, 32, 16, (2,), 6.0, 50.0)}
    monkeypatch.setattr(amp, "SMALL", small)
    monkeypatch.setattr(
        sys,
        "argv",
        ["amp.py", "--smoke", "--topologies", "cnn", "--executors", "loop", "--amp", "bf16", "--out", str(out)],
    )
    amp.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["executor"], row["amp"]) for row in rows] == [
        ("digits", "loop", "off"),
        ("digits", "loop", "bf16"),
    ]
    assert capsys.readouterr().out.count("digits") == 2
