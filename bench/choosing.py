"""What could choosing hosts be worth? A bound for controllers that a fixed schedule cannot reach.

    python bench/choosing.py --config configs/compare/digits_narrow.json --host-lr 0.7 --hosts 384
    python bench/choosing.py --smoke    # seconds

Plays never-grow and every schedule of a comparison on the same tuning hosts. What a schedule adds to a host, net of its
price, is that host's gain; never growing adds nothing. A controller beats the schedule that is best for all only as far
as gains differ between hosts and it can tell which host gains. The table says what each way of telling is worth, in
points of the objective:

| column | plants |
|---|---|
| all | in every host |
| seen | where a ridge regression on what the controller sees before it plants says that the gain is positive |
| contribution | where the contribution at the end is above the best threshold, as if planting and removing were free |
| foresight | where the gain is positive |

Predictions are those for a host left out of the regression. The last line lets the regression choose among all
schedules as well. Prints a table and writes `bench-choosing.json`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.compare.arms import points_of
from esper.compare.bench import Bench
from esper.compare.config import CompareConfig, Point, Schedule
from esper.compare.play import Role, play
from esper.config import read_json
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import never_grow, patient_schedule
from esper.environment.rewards import objective
from esper.events import write_json

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Strengths of the regression tried, per host."""


def left_out(x: Tensor, y: Tensor) -> Tensor:
    """Ridge predictions `[N]` of `y` from `x` `[N, D]`, each by the other hosts; the strength is the one that errs
    least."""
    spread = x.std(0)
    z = ((x - x.mean(0)) / spread)[:, spread > 1e-6]
    mean, found = y.mean(), []
    for ridge in RIDGES:
        weight = len(y) * ridge * torch.eye(z.shape[1], dtype=z.dtype)
        hat = z @ torch.linalg.solve(z.T @ z + weight, z.T) + 1.0 / len(y)
        found.append(y - (y - mean - (hat @ (y - mean))) / (1.0 - hat.diagonal()))
    return min(found, key=lambda predicted: float((predicted - y).square().sum()))


@dataclass(frozen=True)
class Played:
    """P schedules on N hosts: their names, the epoch in which each begins, and `[N, P]` what it adds to accuracy
    (percentage points), its seeds' parameters in per cent of the budget, and the largest contribution of its seeds at
    the end; `seen` `[N, T, D]` is what a controller sees of the hosts if they never grow."""

    names: list[str]
    epochs: list[int]
    accuracy: Tensor
    load: Tensor
    contribution: Tensor
    seen: Tensor


def planting(steps: Point) -> str:
    """What a schedule plants where and when, for people."""
    return " ".join(f"{s.slot}:{s.blueprint}@{s.epoch}" for s in steps if s.op == "germinate")


def played(bench: Bench, hosts: int) -> Played:
    """Play never-grow and every schedule of the comparison on the same hosts."""
    env = bench.env(hosts)
    alone, spec = play(env, ScriptedPolicy(never_grow()), Role.TUNING, host_lr=bench.host_lr), env.spec
    budget = torch.as_tensor(replace(env.settings.reward, host_parameters=alone.parameters).budget)
    points = [p for arm in bench.config.arms if isinstance(arm, Schedule) for p in points_of(arm, bench.config.shared)]
    names, columns = [], []
    for steps in points:
        policy = ScriptedPolicy(patient_schedule(steps, spec.blueprints, spec.rules.max_epochs))
        grown = play(env, policy, Role.TUNING, host_lr=bench.host_lr)
        names.append(planting(steps))
        contribution = grown.records["contribution"].nan_to_num(-torch.inf).amax(1)
        extra = 100.0 * (grown.parameters - alone.parameters) / budget
        columns.append(torch.stack([grown.accuracy - alone.accuracy, extra.double(), contribution.double()]))
        bench.say(f"{names[-1]}: {float(columns[-1][0].mean()):+.2f} points of accuracy")
    seen = alone.rollout["observation"].cpu().double()
    return Played(names, [steps[0].epoch for steps in points], *torch.stack(columns, dim=-1), seen)


def worth(found: Played, price: float) -> list[dict[str, Any]]:
    """A row for each schedule at a price, and one for a choice among all."""
    gain, rows, predictions = objective(found.accuracy, found.load, 100, price), [], []
    for name, epoch, y, contribution in zip(found.names, found.epochs, gain.T, found.contribution.T, strict=True):
        predicted = left_out(found.seen[:, epoch], y)
        kept = [torch.where(contribution >= c, y, 0.0).mean() for c in contribution]
        row = {"price": price, "schedule": name, "all": y.mean(), "spread": y.std()}
        row |= {"correlation": torch.corrcoef(torch.stack([predicted, y]))[0, 1]}
        row |= {
            "seen": torch.where(predicted > 0, y, 0.0).mean(),
            "contribution": torch.stack(kept).max().clamp(min=0.0),
        }
        rows.append(row | {"foresight": y.clamp(min=0.0).mean()})
        predictions.append(predicted)
    likeliest, which = torch.stack(predictions, 1).max(1)
    chosen = torch.where(likeliest > 0, gain.gather(1, which[:, None]).squeeze(1), 0.0)
    rows.append({"price": price, "schedule": "choice of all", "all": gain.mean(0).max(), "seen": chosen.mean()})
    rows[-1]["foresight"] = gain.amax(1).clamp(min=0.0).mean()
    return [{k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]


def main() -> None:
    """Play, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/compare/smoke.json"))
    parser.add_argument("--host-lr", type=float, help="the hosts' rate; else the configuration's or the task's")
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--price", type=float, nargs="+", help="prices to look at instead of the configuration's")
    parser.add_argument("--smoke", action="store_true", help="eight hosts")
    parser.add_argument("--out", type=Path, default=Path("bench-choosing.json"))
    given = parser.parse_args()
    config = CompareConfig.from_dict(read_json(given.config))
    bench = Bench(config, given.out.parent, print)
    bench.host_lr = given.host_lr
    found = played(bench, 8 if given.smoke else given.hosts)
    rows = [row for price in given.price or [config.shared.param_penalty_weight] for row in worth(found, price)]
    names = ("all", "spread", "correlation", "seen", "contribution", "foresight")
    print(f"| price | schedule | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for row in rows:
        cells = [f"{row[name]:+.2f}" if name in row else "" for name in names]
        print(f"| {row['price']} | {row['schedule']} | {' | '.join(cells)} |")
    write_json(given.out, {"config": str(given.config), "rows": rows})


if __name__ == "__main__":
    main()
