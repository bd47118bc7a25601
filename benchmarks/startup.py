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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.errors import UserError

CODE = """
import json, resource, sys
from {module} import main
try:
    code = main({words})
except SystemExit as error:
    code = error.code
used = resource.getrusage(resource.RUSAGE_SELF)
own = sum(name.split(".")[0] in ("xlsd_cache", "xlsd_train") for name in sys.modules)
row = {{"cpu_s": used.ru_utime + used.ru_stime, "modules": len(sys.modules), "own_modules": own}}
print("@" + json.dumps({{**row, "torch": "torch" in sys.modules}}), file=sys.__stderr__)
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class StartupConfig(JsonOption):
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


def commands(config: StartupConfig, out: Path) -> dict[str, list[str]]:
    """Command -> the package and its arguments."""
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


def measure(checkout: Path, words: list[str]) -> dict[str, Any]:
    """CPU seconds, modules, own modules, and whether torch is loaded, of one process."""
    code = CODE.format(module=f"{words[0]}.cli", words=words[1:])
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [line[1:] for line in done.stderr.splitlines() if line.startswith("@")]
    if done.returncode or not rows:
        raise UserError(f"{' '.join(words)} of {checkout} failed: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(rows[-1])
    return row


def main(config: StartupConfig, arguments: Sequence[str]) -> None:
    """Measure and print the table."""
    report = Report("benchmarks/startup.py", arguments, machine("tyro", "pyarrow"))
    sides = {"before": config.before, "after": config.after}
    print(f"{'command':<20}{'side':<8}{'CPU s':>8}{'modules':>9}{'own':>6}  torch")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(config, Path(folder)).items():
            turns = [*sides] * config.repeats
            rows = [(side, measure(sides[side], words)) for side in turns]
            for side in sides:
                mine = [row for turn, row in rows if turn == side]
                row = min(mine, key=lambda each: each["cpu_s"])
                report.add("start", command=name, side=side, **row)
                print(
                    f"{name:<20}{side:<8}{row['cpu_s']:>8.2f}{row['modules']:>9}"
                    f"{row['own_modules']:>6}  {'yes' if row['torch'] else 'no'}"
                )
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, StartupConfig, __doc__)
