"""What is wrong with what the user gave us, as opposed to what is wrong with the program."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. `problems` lists every one of them as `"field: value: what is legal"`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = "1 problem:" if count == 1 else f"{count} problems:"
        super().__init__("\n  ".join((title, *self.problems)))


class ConfigError(InputError):
    """A configuration that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used."""


class RunStopped(RuntimeError):
    """A run that cannot go on although the program is in order: no space, no memory, numbers that are not finite."""
