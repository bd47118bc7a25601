"""Measure on a GPU, in ten minutes, what cannot be measured on a CPU.

    python benchmarks/card.py                               writes benchmarks/results/CARD.json
    python benchmarks/card.py --tiny --out FOLDER/cpu.json  on a CPU, to test the script

Weights are random and nothing is downloaded. Each part is written when it is done. If a part fails,
its error is recorded, the other parts run, and the exit status is 1.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file


from benchmarks.card_parts.bench import Bench, Results
from benchmarks.card_parts.encode import encode
from benchmarks.card_parts.exact import determinism, room, strict
from benchmarks.card_parts.measured import measured_plans
from benchmarks.card_parts.memory import largest, peaks
from benchmarks.card_parts.small import small
from benchmarks.card_parts.speed import attention, compiled, free, kernels, speed, syncs
from benchmarks.lib.real_step import machine_of
from benchmarks.lib.report import run_script
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_bytes, write_json
from xlsd_cache.runtime.device import deterministic, device_of, set_precision
from xlsd_train.memory.choose import cap_card

Part = Literal[
    "strict", "attention", "room", "measured", "encode", "determinism", "peaks", "speed", "kernels",
    "syncs", "free", "compiled", "largest", "small"
]  # fmt: skip
PARTS: dict[Part, Callable[[Bench], Results]] = {
    "strict": strict, "attention": attention,
    # Before the step is made: they need the GPU's memory.
    "room": room, "measured": measured_plans, "encode": encode,
    "determinism": determinism, "peaks": peaks, "speed": speed, "kernels": kernels,
    "syncs": syncs, "free": free, "compiled": compiled, "largest": largest, "small": small,
}  # fmt: skip


@dataclass(frozen=True)
class CardConfig:
    """Measure this GPU."""

    tiny: bool = False
    """Measure the smallest model on the CPU."""

    out: Path | None = None
    """A .json file; the table goes next to it. Default: benchmarks/results/CARD.json."""

    part: tuple[Part, ...] = tuple(PARTS)
    """Parts to measure, in this order. Other parts in the file stay if the machine is the same."""

    vram: float = 24.0
    """Limit of the GPU memory in GB."""

    seconds: float = 600.0
    """No part is started after this time."""


def main(config: CardConfig, command: Sequence[str]) -> int:
    """Measure and write. Returns 1 if a part failed."""
    if config.tiny and config.out is None:
        raise UserError("--tiny needs --out FILE, as it does not measure a GPU")
    if not config.tiny:
        device_of("cuda")  # raises if there is none
    quiet_libraries()
    bench = Bench(config.tiny, config.vram, config.seconds)
    folder = Path(__file__).parent / "results"
    slug = re.sub(r"[^a-z0-9]+", "-", bench.name.lower()).strip("-")
    out = config.out or folder / f"{slug}.json"
    deterministic(True)
    results: Results = {
        "machine": machine_of(bench.device.type),
        "command": shlex.join(("python", "benchmarks/card.py", *command)),
        "precision": set_precision("fp32"),
        "model": f"{bench.model}, {8 * bench.size[1]}x{8 * bench.size[0]}, batch {bench.batch}",
        "vram_gb": config.vram,
    }
    for key, value in results.items():
        print(f"{key}: {value}", flush=True)
    if before := previous_results(out, results["machine"]):
        results = {**before, **results, "command": f"{before['command']}; {results['command']}"}
    if not config.tiny:
        cap_card(config.vram, bench.device)
    for name in config.part:
        results[name] = measured(PARTS[name], bench)
        write_json(out, results)
        print("\n".join(table({name: results[name]})), flush=True)
    write_bytes(out.with_suffix(".txt"), ("\n".join(table(results)) + "\n").encode())
    print(f"written: {out}")
    return 1 if any("failed" in results[name] for name in config.part) else 0


def previous_results(out: Path, here: str) -> Results:
    """The content of the file if it is from this machine with these versions."""
    before: Results = json.loads(out.read_text()) if out.exists() else {}
    return before if before.get("machine") == here else {}


def measured(part: Callable[[Bench], Results], bench: Bench) -> Results:
    """The results and the duration of a part, or its error."""
    begun = time.perf_counter()
    if bench.left() < 0:
        return {"failed": "no time left"}
    try:
        results = part(bench)
    except Exception as error:  # GPU time is rented: the other parts still run
        results = {"failed": f"{type(error).__name__}: {error}"}
    deterministic(True)
    set_precision("fp32")
    bench.free()
    return {**results, "took_s": time.perf_counter() - begun}


def table(results: Results) -> list[str]:
    """The results as text: the name of each part, and a line per measurement."""
    lines = []
    for name, value in results.items():
        if not isinstance(value, dict):
            lines.append(f"{name}: {value}")
            continue
        lines.append(name)
        for key, cell in value.items():
            rows = [(key, cell)] if not isinstance(cell, list) else [(key, x) for x in cell]
            lines += [f"  {first!s:<28} {_text(second)}" for first, second in rows]
    return lines


def _text(value: object) -> str:
    if isinstance(value, dict):
        cells = [(key, cell, _text(cell)) for key, cell in value.items()]
        return ", ".join(f"{k} ({t})" if isinstance(x, dict) else f"{k} {t}" for k, x, t in cells)
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main, CardConfig, __doc__)
