"""The files that a command wrote, as hashes: without what no two runs have in common.

Files are hashed whole, but for these. A .safetensors is two parts, tensors and metadata; a .png is
two, pixels and metadata; JSON with keys that are not compared is parsed, so the order of its keys
does not count.
"""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

NOT_COMPARED = """
  times: builders.json's pid, host, born, began, ended; bytes and disk of `info --json`, which
    count that file; images_per_s, wait_s, peak_gib of metrics; modelspec.date of exports
  what the two sides are given: config.json's command, config.stop_after, stores.path
  a library that is no longer used: config.json's settings.prodigyopt version
  what earlier versions lack: config.json's measured, tflop and the options in NEW; the plan's
    attention, in config.json and state.json; .webp thumbnails; a store's encode.json and folded log
  TensorBoard's logs, whose tags have other names; metrics.jsonl has the same numbers
  the layout of grids (grid.png); the samples in them are files of their own
  sentences: config.json's precision, memory, remarks; modelspec.description and xlsd.folded of
    exports; HTML pages and model cards (.html, .md)"""

NEW = (
    "attention", "momentum", "measure", "remeasure", "compile", "quiet", "json", "on_event",
    "log_with",
)  # fmt: skip
KEYS = {  # by file name, the keys that are not compared, with those that they are under
    "builders.json": {f"builders.{key}" for key in ("pid", "host", "born", "began", "ended")},
    "info.json": {"bytes", "disk"},
    "config.json": {
        *("command", "config.stop_after", "stores.path"),
        *("precision", "memory", "remarks", "settings.prodigyopt version"),
        *(
            "plan",
            "measured",
            "tflop",
            *(f"{at}.{x}" for at in ("config", "settings") for x in NEW),
        ),
    },
    "state.json": {"plan"},
    "metrics.jsonl": {"images_per_s", "wait_s", "peak_gib"},
    "metadata": {"modelspec.date", "modelspec.description", "xlsd.folded"},
}
LEFT_OUT = ("*.html", "*.md", "*.webp", "grid.png", "events.out.tfevents*", "encode.json", "folded")
FAILED = "FAILED"  # is never equal


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every part of every file in a folder, by its path in it."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        if path.is_file() and not any(fnmatch(x, y) for x in within.parts for y in LEFT_OUT):
            for part, content in parts(path):
                found[f"{within.as_posix()}{part}"] = hashlib.sha256(content).hexdigest()
    return found


def one_hash(found: dict[str, str]) -> str:
    """One for all, 16 digits."""
    return hashlib.sha256(_dumped(sorted(found.items()))).hexdigest()[:16]


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each file that differs, is on one side only, or says that a command failed."""
    found = ["no files"] if not before else []
    for path in sorted({*before, *after}):
        both = [side.get(path, "absent") for side in (before, after)]
        if both[0] != both[1] or path == FAILED:
            found.append(f"{path}: {both[0][:16]} {both[1][:16]}")
    return found


def parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """What is compared in a file, each with a name."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        metadata = header.pop("__metadata__", {})
        yield " tensors", json.dumps(header).encode() + data[begin:]
        yield " metadata", _dumped(without(metadata, KEYS["metadata"]))
    elif path.suffix == ".png":
        with Image.open(path) as image:
            yield " pixels", f"{image.mode} {image.size} ".encode() + image.tobytes()
            metadata = {k: v for k, v in image.info.items() if isinstance(v, str)}
        yield " metadata", _dumped(without(metadata, set()))
    elif path.name in KEYS:
        texts = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        yield "", _dumped([without(json.loads(text), KEYS[path.name]) for text in texts])
    else:
        yield "", data


def without(value: Any, keys: set[str], under: str = "") -> Any:
    """A JSON value less some keys; texts that are JSON objects are read as such."""
    if isinstance(value, dict):
        named = {f"{under}{key}": key for key in value}
        return {k: without(value[k], keys, f"{at}.") for at, k in named.items() if at not in keys}
    if isinstance(value, list):
        return [without(item, keys, under) for item in value]
    if isinstance(value, str) and value.startswith("{"):
        return without(json.loads(value), keys, under)
    return value


def _dumped(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
