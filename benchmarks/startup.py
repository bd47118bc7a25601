"""CPU time and modules of the commands that must start at once, for two checkouts.

    git worktree add /tmp/before COMMIT
    python benchmarks/startup.py --before /tmp/before --after . --store STORE --run RUN

Each command runs in a process of its own, the checkouts alternating; the least of `repeats` counts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

import tyro

from benchmarks.lib.machine import machine

CODE = """
import json, resource, sys
from {module} import main
try:
    code = main({words})
except SystemExit as error:
    code = error.code
used = resource.getrusage(resource.RUSAGE_SELF)
ours = sum(name.split(".")[0] in ("xlsd_cache", "xlsd_train") for name in sys.modules)
row = used.ru_utime + used.ru_stime, len(sys.modules), ours, "torch" in sys.modules, code
print("@" + json.dumps(row), file=sys.__stderr__)
"""


@dataclass(frozen=True)
class StartupConfig:
    """Compare how two checkouts start."""

    before: Path
    """A checkout of the commit before the change."""

    after: Path
    """A checkout with the change."""

    store: Path
    """A store with one caption column."""

    run: Path
    """A run folder."""

    repeats: int = 3
    """Runs of each command on each side."""

    json: Path | None = None
    """Also write the rows."""


@dataclass(frozen=True)
class Row:
    """One command on one side."""

    command: str
    side: str
    cpu_s: float
    modules: int
    own_modules: int
    torch: bool


def commands(config: StartupConfig, out: Path) -> dict[str, list[str]]:
    """Words by command; the first is the package."""
    return {
        "xlsd-cache --help": ["xlsd_cache", "--help"],
        "xlsd-cache info": ["xlsd_cache", "info", str(config.store.absolute())],
        "xlsd-train --help": ["xlsd_train", "--help"],
        "xlsd-train recipes": ["xlsd_train", "recipes"],
        "xlsd-train tags": ["xlsd_train", "tags", str(config.store.absolute())],
        "xlsd-train report": [
            "xlsd_train", "report", str(config.run.absolute()), "--out", str(out / "report.html"),
        ],
    }  # fmt: skip


def measure(checkout: Path, words: list[str]) -> tuple[float, int, int, bool, int]:
    """CPU seconds, modules, modules of ours, whether torch is loaded, exit code."""
    code = CODE.format(module=f"{words[0]}.cli", words=words[1:])
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stderr.splitlines():
        if line.startswith("@"):
            cpu_s, modules, ours, torch, exit_code = json.loads(line[1:])
            return cpu_s, modules, ours, torch, exit_code
    raise RuntimeError(done.stderr[-2000:])


def main(config: StartupConfig, command: Sequence[str]) -> int:
    """Measure and print the table."""
    print(f"machine: {machine('tyro', 'pyarrow')}")
    print(f"command: {' '.join(command)}")
    sides = {"before": config.before, "after": config.after}
    rows: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(config, Path(folder)).items():
            for side, checkout in [*sides.items()] * config.repeats:
                cpu_s, modules, ours, torch, exit_code = measure(checkout, words)
                if exit_code:
                    raise RuntimeError(f"{name} of {checkout} ended with {exit_code}")
                best = rows.get((name, side))
                if best is None or cpu_s < best.cpu_s:
                    rows[name, side] = Row(name, side, cpu_s, modules, ours, torch)
    print(f"{'command':<20}{'side':<8}{'CPU s':>8}{'modules':>9}{'ours':>6}  torch")
    for row in rows.values():
        print(
            f"{row.command:<20}{row.side:<8}{row.cpu_s:>8.2f}{row.modules:>9}{row.own_modules:>6}"
            f"  {'yes' if row.torch else 'no'}"
        )
    if config.json:
        config.json.write_text(json.dumps([asdict(row) for row in rows.values()], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(StartupConfig), ["python", *sys.argv]))
