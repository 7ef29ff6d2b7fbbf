"""The table of a comparison: what is reported of every row, as data and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.compare.bench import Row
from esper.compare.statistics import difference, interval, rank_correlation
from esper.learn.responses import BINS, Aim, bin_of

MEASURES = ("objective", "validation", "test")
_TITLES = {"objective": "objective", "validation": "validation accuracy", "test": "test accuracy"}


def summarise(rows: Iterable[Row], key: Tensor) -> list[dict[str, Any]]:
    """One entry per row, the first being what the others are compared to: means with intervals, paired differences,
    mean parameters and FLOPs per seed, FLOPs of the search in all, the values of every seed, the mean course of an
    episode, for learned controllers how the probability of an op goes with the contribution of the seed it would
    concern, and for rows made after another one when that one reached what they ended with."""
    rows = list(rows)
    reference, by_name = rows[0], {row.name: row for row in rows}
    found = [_entry(row, None if row is reference else reference, key) for row in rows]
    for row, entry in zip(rows, found, strict=True):
        if "of" in row.chosen:
            entry["reached"] = _reached(by_name[row.chosen["of"]], row)
    return found


def _reached(grown: Row, static: Row) -> dict[str, Any] | None:
    """Epochs after which the mean validation accuracy of `grown` is first that with which `static` ended, and the FLOPs
    of training until then as a share of the static ones; None if it never is."""
    there = (grown.course.mean(0) >= static.course[:, -1].mean()).nonzero()
    if there.numel() == 0:
        return None
    epoch = int(there[0])
    share = float(grown.spent[:, epoch].double().mean() / static.spent[:, -1].double().mean())
    return {"epochs": epoch + 1, "flops_share": share}


def _entry(row: Row, reference: Row | None, key: Tensor) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in (*MEASURES, "parameters", "training", "evaluation")}
    found: dict[str, Any] = {"name": row.name, "chosen": row.chosen}
    found |= {name: interval(values[name], key)._asdict() for name in MEASURES}
    if reference is not None:
        found["difference"] = {
            name: difference(values[name], getattr(reference, name), key)._asdict() for name in MEASURES
        }
    found["parameters"] = float(row.parameters.double().mean())
    found["flops"] = {name: float(values[name].double().mean()) for name in ("training", "evaluation")}
    found["search_flops"] = {"hosts": row.search, "controller": row.learning}
    found["course"] = {
        "validation": row.course.double().mean(0).tolist(),
        "training": row.spent.double().mean(0).tolist(),
    }
    if row.aimed:
        found["responses"] = {op: _response(aim) for op, aim in row.aimed.items()}
    found["seeds"] = {name: torch.as_tensor(value).tolist() for name, value in values.items()}
    return found


def _response(aim: Aim) -> dict[str, Any]:
    """Rank correlation and on how many seeds and epochs it rests, of all and of those on probation alone, and the mean
    probability by contribution."""
    bins, due = bin_of(aim.contribution), aim.probation
    means = {b: float(aim.probability[bins == i].mean()) for i, b in enumerate(BINS) if bool((bins == i).any())}
    return {
        **_correlated(aim.contribution, aim.probability),
        "probation": _correlated(aim.contribution[due], aim.probability[due]),
        "means": means,
    }


def _correlated(contribution: Tensor, probability: Tensor) -> dict[str, Any]:
    return {"rank_correlation": rank_correlation(contribution, probability), "count": contribution.numel()}


def markdown(summary: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The table for people; `about` is the rest of the JSON file."""
    reference = summary[0]["name"]
    columns = [
        "arm",
        *(_TITLES[name] for name in MEASURES),
        f"objective − {reference}",
        "p",
        f"test − {reference}",
        "p",
    ]
    columns += ["parameters", "training FLOPs", "evaluation FLOPs", "search FLOPs"]
    lines = [
        f"# {about['config']['training']['task']}: {about['config']['seeds']} paired seeds",
        f"Mean and 95 % bootstrap interval over seeds, percentage points. FLOPs are per seed; those of the search are "
        f"for all hosts that were trained to choose or to learn. Made by `{about['command']}`.",
        "\n".join((_line(columns), _line(["---"] * len(columns)), *(_line(_cells(entry)) for entry in summary))),
    ]
    chosen = [f"- {entry['name']}: `{json.dumps(_decided(entry['chosen']))}`" for entry in summary if entry["chosen"]]
    if chosen:
        lines += ["Chosen on the tuning seeds, or given:", "\n".join(chosen)]
    static = [f"- {entry['name']}: {_reaching(entry)}" for entry in summary if "reached" in entry]
    if static:
        title = (
            "When the arm a static one was made after had reached, on the mean, the validation accuracy it ended with:"
        )
        lines += [title, "\n".join(static)]
    learned = [f"- {entry['name']}: {_responses(entry['responses'])}" for entry in summary if "responses" in entry]
    if learned:
        title = "Rank correlation of a seed's measured contribution and the probability of an op, where it is legal:"
        lines += [title, "\n".join(learned)]
    return "\n\n".join(lines) + "\n"


def _reaching(entry: Mapping[str, Any]) -> str:
    arm, reached = entry["chosen"]["of"], entry["reached"]
    if reached is None:
        return f"{arm} never did"
    return f"{arm} after {reached['epochs']} epochs, with {100 * reached['flops_share']:.0f} % of its training FLOPs"


def _responses(responses: Mapping[str, Mapping[str, Any]]) -> str:
    def told(row: Mapping[str, Any]) -> str:
        return f"{ranked(row['rank_correlation'])} (n = {row['count']})"

    return ", ".join(f"{op} {told(row)}, on probation {told(row['probation'])}" for op, row in responses.items())


def ranked(correlation: float | None) -> str:
    """A rank correlation for people."""
    return "none" if correlation is None else f"{correlation:+.2f}"


def _decided(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name != "tried"}


def _cells(entry: Mapping[str, Any]) -> list[str]:
    cells = [entry["name"], *(_interval(entry[name]) for name in MEASURES)]
    for name in ("objective", "test"):
        gap = entry["difference"][name] if "difference" in entry else None
        cells += ["", ""] if gap is None else [_interval(gap, sign="+"), f"{gap['p']:.3g}"]
    search = entry["search_flops"]
    passes = "" if not search["controller"] else f" + {search['controller']:.3g} controller"
    return [
        *cells,
        f"{entry['parameters']:.0f}",
        f"{entry['flops']['training']:.3g}",
        f"{entry['flops']['evaluation']:.3g}",
        "not known" if search["hosts"] is None else f"{search['hosts']:.3g}{passes}",
    ]


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.2f} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
