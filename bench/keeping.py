"""Does what a seed contributes say what keeping it is worth? Both ways from the same moment.

    python bench/keeping.py --config configs/compare/narrow_keep_or_cull.json --host-lr 0.7 --hosts 512
    python bench/keeping.py --smoke    # seconds

For every schedule of a comparison that plants one seed, the same tuning hosts are played twice. Until the first epoch
in which seeds may be fossilised both are the same, to the bit; then the seed is kept in one and culled in the other.
The accuracy with which a host ends in the first less that of the second is what keeping was worth, before its price;
the contribution measured at that moment is what a controller can go by.

Prints the rank correlation of the two over the hosts whose gate is open, and the mean of both by quarters of the
contribution; writes `bench-keeping.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from choosing import planting
from esper.compare.arms import points_of
from esper.compare.bench import Bench
from esper.compare.config import CompareConfig, Schedule
from esper.compare.play import Outcome, Role, play
from esper.compare.statistics import rank_correlation
from esper.compare.table import ranked
from esper.config import read_json
from esper.config_fields import ScheduleStep
from esper.control.scripted import ScriptedPolicy
from esper.control.simple import patient_schedule
from esper.events import write_json
from esper.learn.responses import measured_contributions
from esper.seeds.actions import Op
from esper.seeds.slots import LAYOUT

SCALE = 100.0
"""Contributions are told apart up to here, percentage points."""
QUARTERS = 4


def decided(bench: Bench, hosts: int, planted: ScheduleStep) -> tuple[int, Tensor, Tensor] | None:
    """The first epoch in which seeds of this kind may be fossilised, and of the hosts `[n]` where they may: what they
    contribute then, and by how much keeping beats culling at the end, both in percentage points. None if no seed
    ever may."""
    env = bench.env(hosts)

    def end(op: str, epoch: int) -> Outcome:
        steps: Sequence[ScheduleStep] = [planted, ScheduleStep(epoch=epoch, op=op, slot=planted.slot)]
        policy = ScriptedPolicy(patient_schedule(steps, env.spec.blueprints, env.spec.rules.max_epochs))
        return play(env, policy, Role.TUNING, host_lr=bench.host_lr)

    kept = end("fossilize", planted.epoch)
    place = LAYOUT.index(planted.slot)
    may = kept.rollout["mask_slot"][..., Op.FOSSILIZE, place].cpu()
    if not may.any():
        return None
    epoch = int(may.any(0).nonzero()[0])
    open_gate = may[:, epoch]
    contribution, _ = measured_contributions(kept.rollout["observation"], SCALE)
    worth = kept.accuracy - end("cull", epoch).accuracy
    return epoch, contribution[:, epoch, place].cpu().double()[open_gate], worth[open_gate]


def row(name: str, epoch: int, contribution: Tensor, worth: Tensor) -> dict[str, Any]:
    """What the table says of one kind of seed."""
    order = contribution.argsort().tensor_split(QUARTERS)
    return {
        "schedule": name,
        "decided": epoch,
        "hosts": len(worth),
        "worth": float(worth.mean()),
        "spread": float(worth.std()),
        "rank_correlation": rank_correlation(contribution, worth),
        "quarters": [[float(contribution[part].mean()), float(worth[part].mean())] for part in order],
    }


def main() -> None:
    """Play, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/compare/smoke.json"))
    parser.add_argument("--host-lr", type=float, help="the hosts' rate; else the configuration's or the task's")
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="eight hosts")
    parser.add_argument("--out", type=Path, default=Path("bench-keeping.json"))
    given = parser.parse_args()
    raw = read_json(given.config)
    raw["training"] = {**raw["training"], "contribution_scale": SCALE}
    config = CompareConfig.from_dict(raw)
    bench = Bench(config, given.out.parent, print)
    bench.host_lr = given.host_lr
    rows = []
    print("| schedule | may be kept from | hosts | keeping is worth | rank correlation | by quarters of contribution |")
    print("|---|---|---|---|---|---|")
    for steps in (p for arm in config.arms if isinstance(arm, Schedule) for p in points_of(arm, config.shared)):
        planted = [step for step in steps if step.op == "germinate"]
        if len(planted) > 1:
            continue
        name = planting(steps)
        played = decided(bench, 8 if given.smoke else given.hosts, planted[0])
        if played is None:
            print(f"| {name} | never | 0 | | | |", flush=True)
            continue
        found = row(name, *played)
        quarters = ", ".join(f"{c:.1f}: {w:+.2f}" for c, w in found["quarters"])
        spread, rank = f"{found['worth']:+.2f} (sd {found['spread']:.2f})", ranked(found["rank_correlation"])
        print(f"| {name} | {found['decided']} | {found['hosts']} | {spread} | {rank} | {quarters} |", flush=True)
        rows.append(found)
    write_json(given.out, {"config": str(given.config), "rows": rows})


if __name__ == "__main__":
    main()
