"""Parse a report's HTML page."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """What a browser would see: tables by id, pictures, scripts, links elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.scripts: list[str] = []
        self.charts, self.links, self.text = 0, 0, ""
        self._tag = self._table = ""
        self.feed(path.read_text(encoding="utf-8"))
        (line,) = [x for x in self.scripts[-1].splitlines() if x.startswith("const charts = ")]
        self.figures = json.loads(line.removeprefix("const charts = ").removesuffix(";"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self._tag = tag
        self.links += tag in {"link", "iframe", "object", "embed", "base", "a"}
        self.charts += told.get("class") == "chart"
        if tag == "table":
            self._table = told.get("id") or "samples"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in {"td", "th"}:
            self.tables[self._table][-1].append("")
        elif tag == "img":
            self.images.append(told)
        elif tag == "script":
            assert not told
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style", "table", "td", "th"}:
            self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.scripts[-1] += data
        elif self._tag in {"td", "th", "b", "br"}:
            self.tables[self._table][-1][-1] += data.strip()
        self.text += data * (self._tag not in {"script", "style"})

    def traces(self, name: str) -> list[dict[str, Any]]:
        return [x for figure in self.figures for x in figure["data"] if x.get("name") == name]

    def row(self, table: str, name: str) -> list[str]:
        (row,) = [row for row in self.tables[table] if row[0] == name]
        return row[1:]
