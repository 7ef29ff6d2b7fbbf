"""The command line of a run: one flag per configuration field, made from the fields themselves.

Nothing is validated here: a flag's text becomes plain data and is checked together with everything else.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from esper.config import PRESETS, ConfigError, TrainingConfig, read_json
from esper.config_problems import alternatives, legal, problems
from esper.errors import InputError

_DEFAULT_PRESET = "digits"


class Command(NamedTuple):
    """What the user asked for. `resume` is the run or the checkpoint to go on from, None for a fresh run."""

    config: TrainingConfig
    run_dir: Path | None
    resume: Path | None
    print_config: bool
    print_schema: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError([message])


def parse(arguments: Sequence[str]) -> Command:
    """Read the command line. Raises InputError with every problem at once; `--help` prints and exits."""
    parser = _build()
    given, unknown = parser.parse_known_args(arguments)
    options = vars(given)
    found = [_unknown(parser, text) for text in unknown]
    base: dict[str, Any] = {}
    try:
        base = _base(options)
    except ConfigError as error:
        found += error.problems
    schema = TrainingConfig.json_schema()
    chosen = {name: _value(schema, name, options[name]) for name in TrainingConfig.model_fields if name in options}
    data = {**base, **chosen}
    found += problems(data)
    preset = options["preset"]
    if preset in PRESETS and data.get("task") != PRESETS[preset]["task"]:
        found.append(f"task: {json.dumps(data.get('task'))}: preset {preset} is for task {PRESETS[preset]['task']}")
    if options["resume"] is not None and options["run_dir"] is None:
        found.append("resume: needs --run-dir, the directory of the run to go on with")
    if found:
        raise InputError(found)
    return Command(
        config=TrainingConfig.from_dict(data),
        run_dir=options["run_dir"],
        resume=None if options["resume"] is None else Path(options["resume"] or options["run_dir"]),
        print_config=options["print_config"],
        print_schema=options["print_schema"],
    )


def _base(options: Mapping[str, Any]) -> dict[str, Any]:
    """The data that flags change: the run's own configuration, a file, a preset, or the preset of the task."""
    sources = [name for name in ("config", "preset", "resume") if options[name] is not None]
    if len(sources) > 1:
        raise ConfigError([f"{' and '.join(f'--{name}' for name in sources)}: one of them says where to start from"])
    if options["resume"] is not None:
        return read_json(options["run_dir"] / "config.json") if options["run_dir"] is not None else {}
    if options["config"] is not None:
        return read_json(options["config"])
    name = options["preset"] or options.get("task", _DEFAULT_PRESET)
    if options["preset"] is not None and name not in PRESETS:
        raise ConfigError([f"preset: {json.dumps(name)}: must be one of {', '.join(PRESETS)}"])
    return dict(PRESETS.get(name, {}))


def _build() -> _Parser:
    parser = _Parser(prog="python -m esper.train", description="Grow networks while they train.", allow_abbrev=False)
    start = parser.add_argument_group("where to start from")
    start.add_argument("--config", type=Path, metavar="FILE", help="JSON file with configuration fields")
    start.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: the task's)")
    start.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run goes (default: a new one in runs/)")
    start.add_argument(
        "--resume", nargs="?", const="", metavar="PATH", help="go on with --run-dir, from PATH or its latest"
    )
    start.add_argument("--print-config", action="store_true", help="print the effective configuration and stop")
    start.add_argument("--print-schema", action="store_true", help="print the JSON schema of --config and stop")
    fields = parser.add_argument_group("configuration fields")
    schema = TrainingConfig.json_schema()
    for name, field in TrainingConfig.model_fields.items():
        part = schema["properties"][name]
        kinds = {option.get("type") for option in alternatives(schema, part)}
        settings: dict[str, Any] = {"metavar": name.rsplit("_", 1)[-1].upper()}
        if "boolean" in kinds:
            settings = {"action": argparse.BooleanOptionalAction}
        elif "array" in kinds and name != "schedule":
            settings["nargs"] = "*"
        about = f"{field.description} {legal(schema, part).capitalize()}; default {json.dumps(part['default'])}."
        fields.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=about, **settings)
    return parser


def _value(schema: Mapping[str, Any], name: str, given: Any) -> Any:
    """Plain data from a flag; text that does not fit stays text and is refused by validation."""
    kinds = {part.get("type") for part in alternatives(schema, schema["properties"][name])}
    if "null" in kinds and given in ("null", ["null"]):
        return None
    if kinds & {"integer", "number", "object"} or name == "schedule":
        for convert in (int, float, json.loads):
            try:
                return convert(given)
            except (ValueError, RecursionError):
                continue
    return given


def _unknown(parser: argparse.ArgumentParser, text: str) -> str:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(text.split("=")[0], flags, n=1)
    return f"{text}: there is no such flag" + (f"; did you mean {close[0]}?" if close else "; --help lists them")
