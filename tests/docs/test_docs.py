"""The documentation says what the code says: generated pages, pictures, links and the names of modules."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from esper.config import TrainingConfig
from esper.environment.observation import FEATURES
from esper.event_table import EVENTS, schema
from esper.seeds.actions import HEADS, Op
from esper.seeds.slots import LAYOUT
from esper.seeds.stages import TRANSITIONS, Stage
from esper.tasks import task_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_observation_table_has_every_feature(generate: ModuleType) -> None:
    found = {row[1]: row for row in rows(generate.observation_page())}
    for feature in FEATURES:
        row = found[f"`{feature.name}`"]
        assert row == [str(feature.index), f"`{feature.name}`", feature.scale, feature.description]
    assert len(FEATURES) == 80


def test_the_action_tables_have_every_head_and_op(generate: ModuleType) -> None:
    found = {row[1]: row for row in rows(generate.action_page())}
    assert [found[f"`{head}`"][0] for head in HEADS] == ["0", "1", "2", "3"]
    assert {op.name: found[f"`{op.name}`"][3] for op in Op} == {
        "WAIT": "op",
        "GERMINATE": "slot, blueprint, blend, op",
        "CULL": "slot, op",
        "FOSSILIZE": "slot, op",
    }


def test_the_reference_has_every_event_field_and_task(generate: ModuleType) -> None:
    pages = generate.pages()
    for name, row in EVENTS.items():
        assert f"## {name}\n" in pages["reference/events.md"]
        assert all(f"| `{key}` |" in pages["reference/events.md"] for key in row.data)
    for name in TrainingConfig.model_fields:
        assert f"| `{name}` |" in pages["reference/configuration.md"]
    for name in task_names():
        assert f"| `{name}` |" in pages["reference/catalogue.md"]


def test_every_module_has_its_place_in_the_site(generate: ModuleType) -> None:
    pages = generate.api_pages()
    listed = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.M)
    source = ROOT / "src" / "esper"
    modules = [p.relative_to(ROOT / "src").with_suffix("") for p in source.rglob("*.py") if not p.name.startswith("__")]
    assert sorted(listed) == sorted(".".join(path.parts) for path in modules)
    navigation = re.findall(r"- (api/\S+)", (ROOT / "mkdocs.yml").read_text())
    assert navigation == sorted(pages)


def test_the_schema_file_can_be_written(generate: ModuleType) -> None:
    assert json.loads(generate.SCHEMA.read_text()) == schema()


def words(picture: Path) -> set[str]:
    return {"".join(text.itertext()) for text in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")}


def test_the_pictures_show_every_stage_and_slot() -> None:
    stages = {stage.name for stage in Stage if stage is not Stage.UNKNOWN}
    assert stages == {stage.name for stage in TRANSITIONS} - {"UNKNOWN"}
    assert stages <= words(DOCS / "images" / "lifecycle.svg")
    assert set(LAYOUT) <= words(DOCS / "images" / "host.svg")


@pytest.mark.parametrize("path", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_and_modules_exist(generate: ModuleType, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    generated = {DOCS / name for name in generate.pages()}
    for link in re.findall(r"\]\(([^)#]+)", text):
        target = (path.parent / link).resolve()
        assert link.startswith("https://") or target.exists() or target in generated, link
    if path.name == "plan.md":
        source = ROOT / "src" / "esper"
        tables = [line for line in text.splitlines() if line.startswith("| ")]
        for name in re.findall(r"`([a-z_/]+)`", "\n".join(line.split(" | ")[-1] for line in tables)):
            places = (source / name, source / f"{name}.py", ROOT / name)
            assert any(place.exists() for place in places) or name in TrainingConfig.model_fields, name
