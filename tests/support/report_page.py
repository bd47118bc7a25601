"""Parse a report's HTML page."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """What a browser would see: tables by id, pictures, scripts, links elsewhere, charts' data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.sheets: dict[
            str, list[str | None]
        ] = {}  # "run step", or a model's number -> pictures by prompt
        self.scripts: list[str] = []  # that run
        self.inert: dict[str, str] = {}  # JSON elements
        self.sentences: list[str] = []  # of charts
        self.text_of_pictures = ""  # of SVGs
        self.commands: list[str] = []  # to copy
        self.links, self.text = 0, ""
        self._tag = self._table = self._element = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.inert.pop("data"))
        self.sheets = {name: json.loads(text) for name, text in self.inert.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self._tag = tag
        self.links += tag in {"link", "iframe", "object", "embed", "base"}
        self.links += tag == "a" and not (told.get("href") or "#").startswith("#")
        if tag == "svg":
            self.text_of_pictures += told.get("aria-label") or ""
        if "data-copy" in told:
            self.commands.append(str(told["data-copy"]))
        if told.get("class") == "plot":
            self.sentences.append(str(told["aria-label"]))
        if tag == "table":
            self._table = told.get("id") or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in {"td", "th"}:
            self.tables[self._table][-1].append("")
        elif tag == "img":
            self.images.append(told)
        elif tag == "script":
            self._element = ""
            if told:
                self._element = told.get("id") or told.get("data-sheet") or told["data-model"] or ""
                assert told["type"] == "application/json"
            else:
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style", "table", "td", "th"}:
            self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script" and self._element:
            self.inert[self._element] = self.inert.get(self._element, "") + data
        elif self._tag == "script":
            self.scripts[-1] += data
        elif self._tag in {"td", "th"}:
            self.tables[self._table][-1][-1] += data.strip()
        self.text += data * (self._tag not in {"script", "style"})

    def lines(self, chart: str, label: str = "", run: int = 0) -> list[dict[str, Any]]:
        """The lines of a chart whose label begins so."""
        (lines,) = [it["lines"] for it in self.data["charts"] if it["id"] == chart]
        return [it for it in lines if it["run"] == run and it["label"].startswith(label)]

    def row(self, table: str, name: str) -> list[str]:
        (row,) = [row for row in self.tables[table] if row[0] == name]
        return row[1:]
