"""What to look at when learning goes wrong (plan step 12): anomalies of an update, exploded ratios, gradients by layer.

Nothing here changes what is learned. Letters: `N` hosts, `T` epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from esper.control.policy import RecurrentPolicy
from esper.seeds.actions import HEADS, OP, Op

MAX_ENTRIES = 32
"""Ratios that one diagnostic lists."""
SMALL_GRADIENT, LARGE_GRADIENT = 1e-6, 10.0


@dataclass(frozen=True)
class Anomaly:
    """Something that an update should not show: a `kind`, and `detail` for people."""

    kind: str
    detail: str


@dataclass(frozen=True)
class AnomalyDetector:
    """Thresholds; a metric has to be strictly beyond one to be an anomaly.

    `value_phases` is (progress, explained variance) pairs: up to that share of the run, not included, the explained
    variance may fall to that value, and to `value_late` after the last of them.
    """

    max_ratio: float = 5.0
    min_ratio: float = 0.1
    value_phases: tuple[tuple[float, float], ...] = ((0.10, -0.5), (0.25, -0.2), (0.75, 0.0))
    value_late: float = 0.1

    def detect(self, metrics: Mapping[str, float], progress: float) -> list[Anomaly]:
        """The anomalies of an update, at most one of each kind: ratio_explosion, ratio_collapse, value_collapse and
        numerical_instability.

        `metrics` is what `ppo_update` returns, `progress` the share of the run's episodes that are done, this rollout
        included. A metric that is not there is not judged.
        """
        return list(self._found(metrics, progress))

    def ratios_wrong(self, metrics: Mapping[str, float]) -> bool:
        """Whether a head's ratio exploded or collapsed."""
        return bool(self._exploded(metrics) or self._collapsed(metrics))

    def least_explained_variance(self, progress: float) -> float:
        """The explained variance below which the value function counts as collapsed."""
        return next((least for until, least in self.value_phases if progress < until), self.value_late)

    def _found(self, metrics: Mapping[str, float], progress: float) -> Iterator[Anomaly]:
        if exploded := self._exploded(metrics):
            yield Anomaly("ratio_explosion", f"{_listed(exploded)}: above {self.max_ratio:g}")
        if collapsed := self._collapsed(metrics):
            yield Anomaly("ratio_collapse", f"{_listed(collapsed)}: below {self.min_ratio:g}")
        least = self.least_explained_variance(progress)
        if (explained := metrics.get("explained_variance", least)) < least:
            detail = f"explained_variance {explained:g}: below {least:g} after {100 * progress:.0f} % of the episodes"
            yield Anomaly("value_collapse", detail)
        broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        refused = [name.removeprefix("non_finite/") for name in metrics if name.startswith("non_finite/")]
        if broken or refused:
            parts = ([_listed(broken)] if broken else []) + [f"{name} not finite" for name in refused]
            yield Anomaly("numerical_instability", ", ".join(parts))

    def _exploded(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {n: v for n, v in metrics.items() if n.startswith("ratio_max/") and v > self.max_ratio}

    def _collapsed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {n: v for n, v in metrics.items() if n.startswith("ratio_min/") and v < self.min_ratio}


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items())


@dataclass(frozen=True)
class ExplodedRatio:
    """One probability ratio out of bounds; `epoch` is the number of epochs trained when the action was taken."""

    host: int
    epoch: int
    head: str
    op: str
    ratio: float


@dataclass(frozen=True)
class RatioExplosionDiagnostic:
    """Where an update's probability ratios left their bounds, in all heads.

    `entries` are the worst `MAX_ENTRIES` of `count`, the worst first. `mean_change` and `max_change` are those of the
    size of the log-probability's change, over everything relevant.
    """

    entries: tuple[ExplodedRatio, ...]
    count: int
    mean_change: float
    max_change: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-like data; a ratio may be infinite or NaN."""
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}


def ratio_explosion(
    policy: RecurrentPolicy, rows: TensorDictBase, hosts: Tensor, detector: AnomalyDetector
) -> RatioExplosionDiagnostic:
    """The diagnostic of `rows` `[n, T]` of a rollout, those of the hosts `hosts` `[n]`, under the policy as it is.

    It evaluates the policy anew, so it is worth its price only when ratios are known to be out of bounds.
    """
    with torch.no_grad():
        actions, _ = policy.evaluate(rows)
        terms = actions.head_terms(rows["action"])
        log_ratio = (terms.log_prob - rows["action_log_prob"]).cpu()
    relevant = terms.relevant.cpu()
    ratio = log_ratio.exp()
    wrong = relevant & ~((ratio <= detector.max_ratio) & (ratio >= detector.min_ratio))
    places = wrong.nonzero()
    change = log_ratio.abs().nan_to_num(nan=torch.inf)
    worst = places[change[wrong].argsort(descending=True, stable=True)[:MAX_ENTRIES]]
    ops, numbers = rows["action"][..., OP].cpu(), hosts.cpu()
    entries = tuple(
        ExplodedRatio(int(numbers[i]), t, HEADS[head], Op(int(ops[i, t])).name, float(ratio[i, t, head]))
        for i, t, head in worst.tolist()
    )
    mattered = change[relevant]
    return RatioExplosionDiagnostic(entries, len(places), float(mattered.mean()), float(mattered.max()))


LAYER_STATISTICS = ("norm", "mean", "std", "min", "max", "zero", "small", "large", "nan", "inf")
"""What is known of a layer's gradient besides its name and size. `std` is that of the population; `zero`, `small`
(below 1e-6) and `large` (above 10) are shares of its entries, `nan` and `inf` counts."""


def layer_statistics(module: nn.Module) -> tuple[list[tuple[str, int]], Tensor]:
    """Name and size of every parameter that has a gradient, and its statistics `[layers, 10]` on the device, with no
    transfer to the host; `layer_records` makes that one."""
    gradients = [(name, p.grad.detach()) for name, p in module.named_parameters() if p.grad is not None]
    known = [(name, gradient.numel()) for name, gradient in gradients]
    rows = [_statistics(gradient.flatten().double()) for _, gradient in gradients]
    return known, torch.stack(rows) if rows else torch.zeros(0, len(LAYER_STATISTICS))


def _statistics(g: Tensor) -> Tensor:
    if g.numel() == 0:
        return g.new_zeros(len(LAYER_STATISTICS))
    size = g.abs()
    shares = [(size == 0), (size < SMALL_GRADIENT), (size > LARGE_GRADIENT)]
    counts = [g.isnan().sum(), g.isinf().sum()]
    values = [g.norm(), g.mean(), g.std(unbiased=False), g.min(), g.max()]
    return torch.stack([*values, *(share.double().mean() for share in shares), *(c.double() for c in counts)])


def layer_records(known: list[tuple[str, int]], statistics: Tensor) -> list[dict[str, Any]]:
    """One record per layer, read from the device in a single transfer."""
    records: list[dict[str, Any]] = [
        {"name": name, "size": size, **dict(zip(LAYER_STATISTICS, row, strict=True))}
        for (name, size), row in zip(known, statistics.tolist(), strict=True)
    ]
    return [{**record, "nan": int(record["nan"]), "inf": int(record["inf"])} for record in records]


@dataclass
class UpdateWatch:
    """Looks at one update while it happens: the `observer` of `ppo_update`.

    `explosion` is the worst diagnostic met, None while all ratios stayed in bounds. `layers()` are the gradients of the
    last backward pass, before clipping, if `per_layer` asks for them.
    """

    detector: AnomalyDetector
    per_layer: bool
    explosion: RatioExplosionDiagnostic | None = None
    _gradients: tuple[list[tuple[str, int]], Tensor] | None = field(default=None, repr=False)

    def evaluated(
        self, policy: RecurrentPolicy, rows: TensorDictBase, hosts: Tensor, metrics: Mapping[str, float]
    ) -> None:
        """The loss of some rows is known."""
        if self.detector.ratios_wrong(metrics):
            seen = ratio_explosion(policy, rows, hosts, self.detector)
            if self.explosion is None or seen.max_change > self.explosion.max_change:
                self.explosion = seen

    def differentiated(self, policy: RecurrentPolicy) -> None:
        """The gradients of a step are known and not yet clipped."""
        if self.per_layer:
            self._gradients = layer_statistics(policy)

    def layers(self) -> list[dict[str, Any]]:
        """A record per layer; empty if none was asked for, or no gradient ever computed."""
        return [] if self._gradients is None else layer_records(*self._gradients)
