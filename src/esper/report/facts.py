"""What a run directory says, as plain values: everything a report shows is computed here from the event log."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.events import Event, load

Place = tuple[int, int, str]
"""Episode, host, slot."""

BINS: tuple[tuple[float, float, str], ...] = (
    (-math.inf, -3.0, "< −3"),
    (-3.0, -1.0, "−3…−1"),
    (-1.0, 0.0, "−1…0"),
    (0.0, 1.0, "0…1"),
    (1.0, 3.0, "1…3"),
    (3.0, 6.0, "3…6"),
    (6.0, math.inf, "> 6"),
)
"""Contributions in points, lower edge included; 1 is the least with which a seed can be fossilised."""


@dataclass(frozen=True)
class Run:
    """A run directory. `summary` is None until the run has finished; `timings` are the lines of `timings.jsonl`."""

    name: str
    config: dict[str, Any]
    events: list[Event]
    timings: list[Event] = field(default_factory=list)
    summary: dict[str, Any] | None = None

    def of(self, *types: str) -> list[Event]:
        """The events of some types, in order."""
        return [event for event in self.events if event["type"] in types]

    @property
    def started(self) -> dict[str, Any]:
        """What the run says about itself at its start; empty before and at level off."""
        return next((event["data"] for event in self.of("run_started")), {})

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary is not None or bool(self.of("run_finished"))

    @property
    def rollouts(self) -> int:
        """Rollouts that the configuration asks for."""
        return -(-self.config["n_episodes"] // self.config["n_envs"])


def read_run(run_dir: Path) -> Run:
    """Raises FileNotFoundError for what is not a run directory, ValueError for a file that is torn."""
    missing = [name for name in ("config.json", "events.jsonl") if not (run_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{run_dir}: must be the directory of a run; it has no {' and no '.join(missing)}")
    timings, summary = run_dir / "timings.jsonl", run_dir / "summary.json"
    return Run(
        name=run_dir.resolve().name,
        config=json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
        events=load(run_dir),
        timings=load(timings) if timings.is_file() else [],
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    )


def value(number: Any) -> float:
    """A number as the event log writes it: null is NaN, infinities are texts."""
    return math.nan if number is None else float(number)


def mean(values: Iterable[float]) -> float:
    """Mean of the values that were measured; NaN without any."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; NaN where one side does not vary."""
    mean_a, mean_b = mean(a), mean(b)
    both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return both / spread if spread > 0 else math.nan


@dataclass
class Seed:
    """One seed from germination on. `fate` is kept, culled (by the controller), removed (by a rule) or undecided;
    `contribution` is the last one measured, points."""

    episode: int
    host: int
    slot: str
    blueprint: str
    blend: str
    parameters: int
    planted: int
    fate: str = "undecided"
    ended: int | None = None
    contribution: float = math.nan
    contribution_se: float = math.nan


def seeds(events: Iterable[Event]) -> list[Seed]:
    """Every seed that was planted, in order. Needs level normal."""
    found: list[Seed] = []
    here: dict[Place, Seed] = {}
    for event in events:
        kind, data = event["type"], event["data"]
        place = (event["episode"], event["host"], event["slot"])
        if kind == "germinated":
            here[place] = Seed(*place, data["blueprint"], data["blend"], data["parameters"], event["epoch"])
            found.append(here[place])
        seed = here.get(place)
        if seed is None:
            continue
        if kind == "contribution":
            seed.contribution, seed.contribution_se = value(data["contribution"]), value(data["contribution_se"])
        if kind == "fossilized":
            seed.fate, seed.ended = "kept", event["epoch"]
        if kind == "culled":
            seed.fate, seed.ended = "culled" if data["reason"] == "controller" else "removed", event["epoch"]
    return found


def decisions(events: Sequence[Event]) -> dict[str, dict[str, list[int]]]:
    """What became of a seed right after a contribution of it was measured: counts per bin of `BINS`.

    By stage (BLENDING, PROBATIONARY), then by what the controller did to this slot in its next action: FOSSILIZE, CULL
    or nothing (`left`). Seeds that a rule removed before the controller's turn do not count, nor does the last epoch
    of an episode, after which there is no action. Needs level normal.
    """
    acted: dict[tuple[Place, int], str] = {}
    stage: dict[Place, str] = {}
    trained = {(e["episode"], e["host"], e["epoch"]) for e in events if e["type"] == "epoch"}
    measured: list[tuple[Place, int, str, float]] = []
    for event in events:
        place, epoch = (event["episode"], event["host"], event["slot"]), event["epoch"]
        if event["type"] == "stage_changed":
            stage[place] = event["data"]["after"]
        elif event["type"] == "fossilized":
            acted[place, epoch], stage[place] = "FOSSILIZE", "FOSSILIZED"
        elif event["type"] == "culled":
            acted[place, epoch] = "CULL" if event["data"]["reason"] == "controller" else "rule"
        elif event["type"] == "contribution":
            measured.append((place, epoch, stage.get(place, ""), value(event["data"]["contribution"])))
    counts: dict[str, dict[str, list[int]]] = {
        "BLENDING": {op: [0] * len(BINS) for op in ("left", "CULL")},
        "PROBATIONARY": {op: [0] * len(BINS) for op in ("left", "CULL", "FOSSILIZE")},
    }
    for place, epoch, where, contribution in measured:
        op = acted.get((place, epoch), "left")
        followed = (place[0], place[1], epoch + 1) in trained
        if where in counts and op in counts[where] and followed and not math.isnan(contribution):
            index = next(i for i, (low, high, _) in enumerate(BINS) if low <= contribution < high)
            counts[where][op][index] += 1
    return counts


@dataclass(frozen=True)
class Row:
    """Seeds of one blueprint in one slot: counts by fate, and what those with a measured contribution were worth."""

    blueprint: str
    slot: str
    planted: int
    kept: int
    culled: int
    removed: int
    measured: int
    contribution: float
    standard_error: float
    kept_contribution: float
    parameters: float


def contribution_rows(found: Iterable[Seed], slots: Sequence[str], blueprints: Sequence[str]) -> list[Row]:
    """Seeds by blueprint and slot, in the run's order. The standard error is that of the mean over seeds."""
    groups: Mapping[tuple[str, str], list[Seed]] = defaultdict(list)
    for seed in found:
        groups[seed.blueprint, seed.slot].append(seed)
    rows = []
    for blueprint in blueprints:
        for slot in slots:
            group = groups.get((blueprint, slot), [])
            rows.append(_row(blueprint, slot, group))
    return rows


def _row(blueprint: str, slot: str, group: Sequence[Seed]) -> Row:
    known = [s.contribution for s in group if not math.isnan(s.contribution)]
    center = mean(known)
    spread = sum((v - center) ** 2 for v in known)
    fates = Counter(s.fate for s in group)
    return Row(
        blueprint=blueprint,
        slot=slot,
        planted=len(group),
        kept=fates["kept"],
        culled=fates["culled"],
        removed=fates["removed"],
        measured=len(known),
        contribution=center,
        standard_error=math.sqrt(spread / (len(known) - 1) / len(known)) if len(known) > 1 else math.nan,
        kept_contribution=mean(s.contribution for s in group if s.fate == "kept"),
        parameters=mean(s.parameters for s in group),
    )


def metric(updates: Sequence[Event], name: str) -> list[float]:
    """One metric of every update; NaN where it was not reported."""
    return [value(event["data"].get(name)) for event in updates]
