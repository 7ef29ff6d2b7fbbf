"""What the README shows works: its programs run, its commands parse, its files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from esper.flags import parse
from esper.seeds.blueprints import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^python -m .*$", README, flags=re.MULTILINE)]


def test_the_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As written, but with two hosts, two rollouts and two epochs."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    program = "\n".join(blocks).replace("n_envs=8", "n_envs=2, max_epochs=2").replace("rollouts=10", "rollouts=2")
    names: dict[str, object] = {}
    try:
        exec(compile(program, "README.md", "exec"), names)
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert registry.get("cnn", "scale").description
    finally:
        registry.unregister("cnn", "scale")


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[2:6]))
def test_the_commands_exist(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec(words[2]) is not None
    if words[2] != "esper.train" or "--help" in words or "--resume" in words:
        return
    monkeypatch.chdir(ROOT)
    assert parse(words[3:]).config is not None


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
