"""What every benchmark prints first, its option `--json`, and how a script is started."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import tyro

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "zarr", "pyarrow",
    "pillow", "tensorstore", "lion-pytorch",
)  # fmt: skip


@dataclass(frozen=True)
class JsonOption:
    """The option that all benchmarks share."""

    json: Path | None = None
    """Also write machine, versions, command and every row to this file."""


class Report:
    """The results of one benchmark. Prints the machine and the command when it is created."""

    def __init__(self, script: str, arguments: Sequence[str], machine: str) -> None:
        self._facts: dict[str, Any] = {"versions": _versions()}
        self._rows: list[dict[str, Any]] = []
        self.fact("machine", machine)
        self.fact("command", shlex.join(("python", script, *arguments)))

    def fact(self, name: str, value: str) -> None:
        """Print and record a fact that holds for all rows."""
        print(f"{name}: {value}", flush=True)
        self._facts[name] = value

    def add(self, table: str, **row: Any) -> None:
        """Record a row of one of the printed tables; values are JSON types."""
        self._rows.append({"table": table, **row})

    def target(self, what: str, value: float, *, least: float = 0.0, most: float = 0.0) -> None:
        """Print and record whether a figure meets its target: `least` or `most`, one of them."""
        met = value >= least if least else value <= most
        wanted = f"at least {least:.3g}" if least else f"at most {most:.3g}"
        print(f"{'PASS' if met else 'FAIL'}  {what}: {value:.3g}, target {wanted}")
        self.add("target", what=what, value=value, target=wanted, met=met)

    def write(self, path: Path | None) -> None:
        """Write all facts and rows as JSON if there is a path."""
        if path:
            write_json(path, {**self._facts, "rows": self._rows})


def _versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def run_script(main: Callable[[Any, Sequence[str]], Any], options: type, doc: str | None) -> None:
    """Parse the command line, run `main(options, arguments)` and exit with what it returns."""
    try:
        sys.exit(main(tyro.cli(options, description=doc), sys.argv[1:]))
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
