"""Show that a change of the code changes no bit: two checkouts run the same commands.

    git worktree add /tmp/before COMMIT
    python benchmarks/same.py --before /tmp/before --after . --work /tmp/same

Every command is a subprocess of `python -m xlsd_cache` or `python -m xlsd_train` on one thread,
from the same photos and the same model. Then every file that either side wrote is compared: see
`benchmarks/same_parts/`. Cases named `resume` and `read` begin with what BEFORE wrote. Prints a
table of hashes, and exits with 1 where anything differs. All cases take about ten minutes a side.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

import tyro

from benchmarks.lib.machine import machine
from benchmarks.same_parts.cases import Case, cases
from benchmarks.same_parts.files import FAILED, NOT_COMPARED, differences, hashes, one_hash

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class SameConfig:
    """Compare what two checkouts write."""

    before: Path
    """A checkout of the commit before the change."""

    after: Path
    """A checkout with the change."""

    work: Path = Path("same")
    """The folder for what both write."""

    only: tuple[str, ...] = ()
    """Cases to compare, as patterns: 'te-*'. Default: all."""

    reuse: bool = False
    """Keep what a checkout wrote in WORK at an earlier time, where its commit and its commands are
    the same."""

    json: Path | None = None
    """Also write the hashes of every file."""


def main(config: SameConfig, command: Sequence[str]) -> int:
    """Run, compare, and print the table; 1 where something differs."""
    told = {
        "machine": machine("torch", "diffusers", "transformers", "zarr", "pyarrow"),
        "command": shlex.join(("python", "benchmarks/same.py", *command)),
        "before": commit_of(config.before.resolve()),
        "after": commit_of(config.after.resolve()),
        "not compared": NOT_COMPARED,
    }
    for name, text in told.items():
        print(f"{name}: {text}")
    known, sides = cases(), Sides(config)
    patterns = config.only or ("*",)
    shown = [name for name in known if any(fnmatch(name, pattern) for pattern in patterns)]
    if not shown:
        sys.exit(f"--only {' '.join(patterns)}: no such case; known are {', '.join(known)}")
    print(f"{'case':28}{'files':>6}  {'before':18}{'after':18}equal", flush=True)
    found, different = {}, []
    for name in shown:
        case = known[name]
        for side, needed in jobs(name, known):
            sides.run(side, needed, known[needed])
        before = hashes(sides.work / "before" / (case.equals or name))
        after = hashes(sides.work / "after" / name)
        found[name] = {"before": before, "after": after}
        differ = [f"{name}: {line}" for line in differences(before, after)]
        different += differ
        sums = f"{one_hash(before):18}{one_hash(after):18}"
        print(f"{name:28}{len(before):6}  {sums}{'NO' if differ else 'yes'}", flush=True)
    for line in different:
        print(line)
    files = sum(len(case["before"]) for case in found.values())
    print(f"{len(found)} cases, {files} files: {len(different)} differ")
    if config.json:
        config.json.write_text(json.dumps({**told, "cases": found}, indent=1) + "\n")
    return 1 if different else 0


def jobs(name: str, known: dict[str, Case]) -> Iterator[tuple[str, str]]:
    """What must have run before a case's files can be compared: (side, case), in order."""
    case = known[name]
    for other in (case.of, case.equals):
        if other:
            yield from (job for job in jobs(other, known) if job[0] == "before")
    for side in ("after",) if case.equals else ("before", "after"):
        for other in case.needs:
            yield from (job for job in jobs(other, known) if job[0] == side)
        yield side, name


class Sides:
    """The folders `before` and `after`, a folder a case in each, and the inputs of both."""

    def __init__(self, config: SameConfig) -> None:
        self.work = config.work.resolve()
        self.checkouts = {"before": config.before.resolve(), "after": config.after.resolve()}
        self.reuse = config.reuse
        self.inputs = make_inputs(self.work / "inputs")
        self._done: set[tuple[str, str]] = set()

    def run(self, side: str, name: str, case: Case) -> None:
        """Run a case's commands, once; a file FAILED in its folder says which failed, and how."""
        folder, checkout = self.work / side / name, self.checkouts[side]
        done = self.work / side / f"{name}.done"
        told = "\n".join([commit_of(checkout), *case.commands])
        kept = self.reuse and done.exists() and done.read_text() == told
        if (side, name) in self._done or kept:
            return
        self._done.add((side, name))
        done.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if case.of:
            shutil.copytree(self.work / "before" / case.of, folder, dirs_exist_ok=True)
        for command in case.commands:
            if failed := run_command(command.format(inputs=self.inputs), folder, checkout):
                print(f"{folder}: {failed}", file=sys.stderr)
                (folder / FAILED).write_text(failed)
                return
        done.write_text(told)


def run_command(command: str, folder: Path, checkout: Path) -> str:
    """Run it in a subprocess with a checkout's code; says how it failed."""
    command, _, out = command.partition(" > ")
    module, *given = shlex.split(command.removeprefix("2x "))
    launch = [sys.executable, "-m", module]
    if command.startswith("2x "):
        launch[1:] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        launch += ["-m", module]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*launch, *given], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"{command}\nexit status {done.returncode}\n{done.stderr[-3000:]}"
    if out:
        (folder / out).write_text(done.stdout)
    return ""


@functools.cache
def commit_of(checkout: Path) -> str:
    """Its commit; SystemExit where Python would take the packages from another place."""
    code = "import xlsd_cache, xlsd_train; print(xlsd_cache.__file__, xlsd_train.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    paths = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd="/")
    for path in paths.decode().split():
        if not Path(path).resolve().is_relative_to(checkout):
            sys.exit(f"{checkout}: not a checkout, Python imports {path}; give a checkout's folder")
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    said = subprocess.run(git, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "no commit"


def make_inputs(folder: Path) -> Path:
    """The photos and the model of both sides, made once: their inodes and times are in a store."""
    if not folder.exists():
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        images, more = str(temporary / "images"), str(temporary / "more")
        pipeline = ["pipeline", str(temporary / "model"), "--captions", images, "--size", "nano"]
        for args in (["photos", images], ["subjects", more, "--each", "1"], pipeline):
            made = [sys.executable, "-m", f"benchmarks.demo.{args[0]}", *args[1:]]
            subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
        shutil.copy(temporary / "images/cat.png", temporary / "more/duplicate.png")
        (temporary / "prompts.txt").write_text("cat, solo\nan espresso --size 128x64 --seed 5\n")
        temporary.rename(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SameConfig, description=__doc__), sys.argv[1:]))
