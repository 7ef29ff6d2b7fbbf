"""Pages of the documentation that are made from the code, and the schema file of events.

As a hook of mkdocs it adds the pages while the site is built; `python docs/generate.py` writes the schema file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import esper
from esper.config import PRESETS, TrainingConfig
from esper.config_problems import legal
from esper.environment.observation import FEATURES
from esper.event_table import EVENTS, PLACES, schema
from esper.seeds import blueprints  # noqa: F401  (registers them)
from esper.seeds.actions import HEADS, MAX_BLUEPRINTS, RELEVANT, Op
from esper.seeds.blueprints import registry
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import BLENDS
from esper.tasks import get_task, task_names

SCHEMA = Path(__file__).parent / "events.schema.json"
TOPOLOGIES = ("cnn", "transformer")
_OPS = {
    Op.WAIT: "nothing",
    Op.GERMINATE: "plants a seed of the chosen blueprint, to be blended in as chosen, in an empty slot",
    Op.CULL: "removes a seed that is not a fossil and has lived for an epoch",
    Op.FOSSILIZE: "keeps a seed on probation for good, if it is worth a percentage point",
}


def pages() -> dict[str, str]:
    """Markdown by path within the documentation."""
    return {
        "reference/observation.md": observation_page(),
        "reference/actions.md": action_page(),
        "reference/events.md": event_page(),
        "reference/configuration.md": configuration_page(),
        "reference/catalogue.md": catalogue_page(),
        **api_pages(),
    }


def observation_page() -> str:
    """Every number the controller sees."""
    rows = [(f.index, f"`{f.name}`", f.scale, f.description) for f in FEATURES]
    about = (
        "What the controller sees of each host, made from `esper.environment.observation.FEATURES`. The first 50 "
        "numbers are always there; `use_telemetry` adds the rest. A slot that is empty or not part of the run is zero."
    )
    return page("Observation", about, table(("index", "name", "scale", "what it is"), rows))


def action_page() -> str:
    """Heads, ops, and which head matters for which op."""
    choices = {
        "slot": ", ".join(LAYOUT),
        "blueprint": f"up to {MAX_BLUEPRINTS}, the run's `blueprints` in order",
        "blend": ", ".join(BLENDS),
        "op": ", ".join(op.name for op in Op),
    }
    heads = table(("column", "head", "choices"), [(i, f"`{head}`", choices[head]) for i, head in enumerate(HEADS)])
    ops = [
        (int(op), f"`{op.name}`", _OPS[op], ", ".join(h for h, used in zip(HEADS, RELEVANT[op], strict=True) if used))
        for op in Op
    ]
    about = (
        "An action is int64 `[N, 4]`. `op` is drawn first and selects the row of the slot mask; a head that does not "
        "matter for the op counts nowhere: not in the log-probability, the entropy, the divergence or the gradient. A "
        "choice is masked exactly when the lifecycle would refuse it."
    )
    parts = (about, "## Heads", heads, "## Ops", table(("code", "op", "does", "heads that matter"), ops))
    return page("Action", *parts)


def event_page() -> str:
    """Every type of event and what it holds."""
    parts = [
        "Lines of `events.jsonl`, made from `esper.event_table.EVENTS`; also as a "
        "[JSON schema](../events.schema.json). `esper.table.table(run, type)` gives one type as a pandas table with "
        "these entries as columns.",
        "## Every event",
        table(("entry", "JSON type", "meaning"), [(f"`{n}`", kind, about) for n, (kind, about) in PLACES.items()]),
    ]
    for name, row in EVENTS.items():
        data = [(f"`{key}`", entry.kind, entry.about) for key, entry in row.data.items()]
        data += [("...", row.others, "further entries, one per name")] if row.others else []
        parts += [f"## {name}", f"{row.about} From level `{row.level}` on; severity {row.severity}."]
        parts += [table(("entry", "holds", "meaning"), data)] if data else []
    return page("Events", *parts)


def configuration_page() -> str:
    """Every field of a configuration, and the presets."""
    whole, defaults = TrainingConfig.json_schema(), TrainingConfig().to_dict()
    rows = [
        (f"`{name}`", f"`{json.dumps(defaults[name])}`", legal(whole, whole["properties"][name]), field.description)
        for name, field in TrainingConfig.model_fields.items()
    ]
    presets = [(f"`{name}`", f"`{json.dumps(changes)}`") for name, changes in PRESETS.items()]
    about = (
        "A field is a key of the JSON file of `--config` and, with `-` for `_`, a flag. "
        "`python -m esper.train --print-config` prints an effective configuration to start from."
    )
    fields = table(("field", "default", "legal", "meaning"), rows)
    return page("Configuration", about, fields, "## Presets", table(("preset", "changes"), presets))


def catalogue_page() -> str:
    """Tasks and blueprints."""
    tasks = [
        (f"`{t.name}`", t.kind, t.topology, t.max_epochs, t.batch_size, t.host_lr, ", ".join(t.blueprints))
        for t in map(get_task, task_names())
    ]
    kinds = [(topology, registry.get(topology, name)) for topology in TOPOLOGIES for name in registry.names(topology)]
    return page(
        "Tasks and blueprints",
        "## Tasks",
        table(("task", "kind", "hosts", "epochs", "batch", "host lr", "blueprints offered"), tasks),
        "## Blueprints",
        table(("hosts", "name", "what it is"), [(where, f"`{b.name}`", b.description) for where, b in kinds]),
    )


def api_pages() -> dict[str, str]:
    """A page per package and one for the modules at the top, each module by its docstrings. Files are listed, not
    imported: the GPU kernels need a package that is not there without a GPU."""
    groups: dict[str, list[str]] = {}
    for path in sorted(Path(esper.__path__[0]).rglob("*.py")):
        parts = ("esper", *path.relative_to(esper.__path__[0]).with_suffix("").parts)
        if not path.name.startswith("__"):
            groups.setdefault(parts[1] if len(parts) > 2 else "esper", []).append(".".join(parts))
    return {f"api/{room}.md": page(room, *(f"::: {name}" for name in names)) for room, names in sorted(groups.items())}


def page(title: str, *parts: str) -> str:
    """Markdown with a title."""
    return "\n\n".join((f"# {title}", *parts)) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks which files there are; these are added to them."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
