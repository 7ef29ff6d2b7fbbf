"""The few HTML elements a report is made of. Text is escaped exactly once: here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from esper.report.svg import tag


class Markup(str):
    """HTML that is finished; every other text is escaped."""


@dataclass(frozen=True)
class Section:
    """A part of the page, reached at `#name`."""

    name: str
    title: str
    body: str

    def html(self) -> Markup:
        """The section as HTML."""
        return Markup(tag("section", element("h2", self.title), self.body, id=self.name))


def element(name: str, *body: str, **attributes: object) -> Markup:
    """One element around texts and elements."""
    return Markup(tag(name, *(part if isinstance(part, Markup) else escape(part) for part in body), **attributes))


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return element("p", text)


def note(text: str) -> Markup:
    """A paragraph in small print: how to read what follows."""
    return element("p", text, class_="note")


def grid(name: str, pictures: Iterable[str]) -> Markup:
    """Pictures side by side."""
    return element("div", *map(Markup, pictures), class_=name)


def data_table(
    head: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]], numeric: Iterable[int] = ()
) -> Markup:
    """A table; a cell may be a pair of text and CSS class, `numeric` columns are set flush right."""
    right = set(numeric)
    titles = [element("th", text, class_="n" if i in right else "t") for i, text in enumerate(head)]
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            text, look = cell if isinstance(cell, tuple) else (cell, "")
            cells.append(element("td", text, class_=f"{'n' if i in right else 't'} {look}".strip()))
        lines.append(element("tr", *cells))
    whole = element("table", element("thead", element("tr", *titles)), element("tbody", *lines))
    return element("div", whole, class_="wide")
