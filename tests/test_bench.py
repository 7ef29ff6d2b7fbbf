"""`bench/gpu.py` at a size for a CPU: every section gives its rows, and a row that fails loses no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import choosing
import gpu
import keeping
import plain
import surrogate
from esper import tasks
from esper.compare.bench import Bench
from esper.compare.config import CompareConfig
from esper.config_fields import ScheduleStep
from esper.data.batches import evaluation_batches
from esper.growth.executors import coalitions
from esper.growth.executors.stacked import StackedExecutor
from esper.growth.plan import make_plan
from esper.seeds.blueprints import registry
from grown import make_growth, make_spec

CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict[str, Any]]:
    # The bench adds a task of its own.
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks._REGISTRY))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--amp", "off", "--out", str(out), *arguments])
    gpu.main()
    return json.loads(out.read_text())["rows"]


def test_every_section_gives_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path / "bench.json", "--models", "base8")
    # On CPUs two groups of hosts stand for two devices.
    two_devices = [] if torch.cuda.device_count() == 1 else ["scaling"]
    assert [row["section"] for row in rows] == [
        "floor",
        *["check"] * 3,
        *["steps"] * 2,
        "coalitions",
        "whole",
        "telemetry",
        *two_devices,
        "profile",
    ]
    assert (tmp_path / "bench.png").exists()
    found = {row["section"]: row for row in rows}
    assert found["steps"]["ratio"] == found["steps"]["images_per_second"] / found["steps"]["plain_images_per_second"]
    # Not which of them is larger: at this size they are as near as the machine's noise.
    assert min(found["coalitions"][name] for name in ("bare_ms", "eight_ms", "one_ms", "one_estimated_ms")) > 0.0
    for measured in (
        found["whole"],
        *(found["telemetry"][name] for name in ("silent", "told")),
        *(found[section][name] for section in two_devices for name in ("on_1", "on_2")),
    ):
        assert measured["recorded_after_warm_up"] == 0
        assert measured["filled"] == 0.5
        assert sum(measured["share"].values()) == pytest.approx(1.0)
        assert all(share > 0.0 for share in measured["share"].values())
    assert found["profile"]["ms"] == pytest.approx(sum(found["profile"]["group_ms"].values()))


def test_language_hosts_are_timed_with_their_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path / "bench.json", "--only", "steps", "--models", "transformer")
    assert [row["cells"] for row in rows] == ["none", "half"]
    assert all(row["ratio"] > 0.0 for row in rows)


def test_a_row_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, asked = tmp_path / "bench.json", []

    def fails(bench: gpu.Bench, row: gpu.Row) -> None:
        asked.append(row["section"])
        row["before"] = 1
        raise ValueError("no memory")

    monkeypatch.setitem(gpu.SECTIONS, "profile", (fails, ()))
    with pytest.raises(SystemExit, match="1 of 2 rows failed"):
        run(monkeypatch, out, "--only", "profile", "floor")
    first, second = json.loads(out.read_text())["rows"]
    assert (first["before"], first["error"]) == (1, "ValueError: no memory")
    assert second["bytes_fp32"] > 0
    with pytest.raises(SystemExit):
        run(monkeypatch, out, "--only", "profile", "floor", "--resume")
    assert asked == ["profile"]
    assert run(monkeypatch, out, "--only", "floor", "--budget", "-1") == []


@pytest.mark.parametrize("host", ["base8", "transformer"])
def test_plain_networks_have_what_the_hosts_have(host: str) -> None:
    spec = make_spec(gpu.HOSTS[host])
    records = make_growth(spec, 4, "half")["slots"]
    for (net, _), row in zip(plain.networks(spec, records, CPU), records["blueprint"].tolist(), strict=True):
        seeds = [
            registry.parameter_count(spec.kinds[b], site.channels)
            for b, site in zip(row, spec.sites, strict=True)
            if b >= 0
        ]
        assert len(seeds) in (1, 2)
        assert sum(p.numel() for p in net.parameters()) == spec.host_parameters + sum(seeds)


def test_one_pass_scores_what_the_tree_scores_with_all_seeds() -> None:
    spec = make_spec(gpu.HOSTS["base8"])
    growth = make_growth(spec, 3, "all")
    x, y = next(evaluation_batches(splits := gpu.Bench(CPU, True, 1).splits, splits.validation, 6))
    executor = StackedExecutor(spec, CPU)
    carry = executor.begin_evaluation(growth, make_plan(growth["slots"], spec), None)
    targets = y.expand(3, *y.shape)
    right, _, loss = coalitions.score(spec, carry, x, targets)
    once, _, one_loss = gpu.score_once(spec, carry, x, targets)
    torch.testing.assert_close(one_loss, loss)
    assert torch.equal(once[:3], right[carry.tree.leaf[:, -1]])


def test_the_surrogate_learns_in_both_ways_to_end_an_episode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["surrogate.py", "--smoke", "--out", str(out)])
    surrogate.main()
    found = json.loads(out.read_text())
    assert {name: len(rows) for name, rows in found.items()} == {
        "never": 1,
        "schedule": 1,
        "terminal": 2,
        "truncated": 2,
        "imitated": 2,
    }
    assert found["never"][0]["return"] == 0.0  # the twin does the same
    assert found["schedule"][0]["grown"] > 0.0
    assert found["schedule"][0]["objective"] > found["never"][0]["objective"]
    assert found["terminal"][0] == found["truncated"][0]
    assert found["terminal"][1] != found["truncated"][1]
    assert found["imitated"][0]["grown"] >= found["schedule"][0]["grown"]  # what is refused is asked for again


def test_predictions_are_those_of_a_regression_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a ridge regression with a free intercept, fitted anew for every host that is left out."""
    monkeypatch.setattr(choosing, "RIDGES", (0.1,))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=g, dtype=torch.float64)
    x[:, 3] = 1.0
    y = 2.0 * x[:, 0] + torch.randn(12, generator=g, dtype=torch.float64)
    z = ((x - x.mean(0)) / x.std(0))[:, :3]
    design = torch.cat([z, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    penalty = torch.diag(torch.tensor([1.2, 1.2, 1.2, 0.0], dtype=torch.float64))
    for i in range(12):
        others = torch.arange(12) != i
        a, b = design[others], y[others]
        expected = design[i] @ torch.linalg.solve(a.T @ a + penalty, a.T @ b)
        assert choosing.left_out(x, y)[i] == pytest.approx(float(expected), abs=1e-9)


def test_choosing_is_worth_nothing_where_all_gain_and_everything_where_it_shows() -> None:
    """Four hosts in ten lose; a number that the controller sees says which, and so does the contribution."""
    n = 200
    loses = torch.arange(n) % 10 < 4
    accuracy = torch.where(loses, -3.0, 2.0).double()[:, None].expand(n, 2).clone()
    accuracy[:, 1] = 1.0
    seen = torch.stack([loses.double(), torch.arange(n).double().sin()], dim=1)[:, None].expand(n, 5, 2)
    found = choosing.Played(["a", "b"], [0, 3], accuracy, torch.full((n, 2), 10.0).double(), accuracy, seen)
    free, _, both = choosing.worth(found, 0.0)
    assert free["all"] == pytest.approx(0.0)
    assert free["seen"] == free["contribution"] == free["foresight"] == pytest.approx(0.6 * 2.0)
    assert both["all"] == pytest.approx(1.0)
    assert both["seen"] == pytest.approx(0.6 * 2.0 + 0.4 * 1.0)
    dear = choosing.worth(found, 0.15)
    assert [row["all"] for row in dear[:2]] == pytest.approx([-1.5, -0.5])
    assert dear[2]["seen"] == pytest.approx(0.6 * 0.5)


def test_choosing_plays_every_schedule_of_a_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["choosing.py", "--smoke", "--price", "0", "0.1", "--out", str(out)])
    choosing.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["price"] for row in rows] == [0.0] * 5 + [0.1] * 5
    assert rows[4]["schedule"] == "choice of all"
    assert rows[4]["all"] == max(row["all"] for row in rows[:4])
    for free, dear in zip(rows[:4], rows[5:9], strict=True):
        assert dear["all"] < free["all"] <= free["foresight"]


def test_keeping_is_worth_what_kept_hosts_end_with_more_than_culled_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both are the same until the decision, and the contribution is the one of that moment."""
    training = {"task": "digits_narrow", "slots": ["early"], "seed": 3, "max_epochs": 8, "train_samples": 256}
    training |= {"incubation": "none", "gates": "permissive", "contribution_scale": keeping.SCALE}
    arms = [{"kind": "never"}, {"kind": "schedule", "grid": {"blueprints": ["conv_expand"]}}]
    bench = Bench(CompareConfig.from_dict({"training": training, "seeds": 2, "arms": arms}), tmp_path, print)
    outcomes, play = [], keeping.play

    def noted(*args: Any, **options: Any) -> Any:
        outcomes.append(play(*args, **options))
        return outcomes[-1]

    monkeypatch.setattr(keeping, "play", noted)
    planted = ScheduleStep(epoch=0, op="germinate", slot="early", blueprint="conv_expand", blend="linear")
    found = keeping.decided(bench, 8, planted)
    assert found is not None
    epoch, contribution, worth = found
    kept, culled = outcomes
    assert torch.equal(kept.course[:, :epoch], culled.course[:, :epoch])
    may = kept.rollout["mask_slot"][:, epoch, keeping.Op.FOSSILIZE, 0]
    assert int(may.sum()) == len(worth) > 1
    assert bool((culled.records["blueprint"][may] == -1).all())
    assert torch.equal(worth, (kept.accuracy - culled.accuracy)[may])
    assert bool((contribution >= 1.0).all())
    assert keeping.decided(bench, 2, planted.model_copy(update={"epoch": 7})) is None


def test_keeping_ranks_contributions_against_what_keeping_is_worth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contribution = torch.tensor([1.0, 8.0, 2.0, 4.0, 7.0, 3.0, 6.0, 5.0], dtype=torch.float64)
    rising = keeping.row("a", 5, contribution, contribution - 4.5)
    assert rising["rank_correlation"] == pytest.approx(1.0)
    assert rising["worth"] == pytest.approx(0.0)
    assert rising["quarters"] == [pytest.approx([m, m - 4.5]) for m in (1.5, 3.5, 5.5, 7.5)]
    assert keeping.row("a", 5, contribution, -contribution)["rank_correlation"] == pytest.approx(-1.0)

    out, config = tmp_path / "bench.json", tmp_path / "compare.json"
    training = {"task": "digits_narrow", "slots": ["early"], "max_epochs": 8, "train_samples": 256}
    training |= {"incubation": "none", "gates": "permissive", "blueprints": ["conv_expand"]}
    sweep = {"kind": "schedule", "grid": {"epochs": [0, 7]}}
    config.write_text(json.dumps({"training": training, "seeds": 2, "arms": [{"kind": "never"}, sweep]}))
    monkeypatch.setattr(sys, "argv", ["keeping.py", "--config", str(config), "--hosts", "8", "--out", str(out)])
    keeping.main()
    (kept,) = json.loads(out.read_text())["rows"]  # one planted in the last epoch can never be kept
    assert (kept["schedule"], kept["decided"]) == ("early:conv_expand@0", 5)
    assert kept["hosts"] > 1
    assert len(kept["quarters"]) == keeping.QUARTERS
