"""Run the first step of a fresh process under a memory limit and print one line of JSON.

    python benchmarks/card_parts/room.py --vram 22

`card.py` compares two such processes: a kernel that is chosen by free memory sums in another order.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import torch
import tyro

from benchmarks.card_parts.bench import Bench
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.runtime.device import deterministic, device_of, set_precision
from xlsd_train.memory.choose import cap_card


@dataclass(frozen=True)
class RoomConfig:
    """Run one step of the plan for 24 GB."""

    tiny: bool = False
    """Use the smallest model on the CPU."""

    vram: float | None = None
    """Limit of the GPU memory in GB. Default: all of it."""


def main(config: RoomConfig) -> None:
    """Print the hash of the momentum, the number of failed allocations, and the peak in GiB."""
    quiet_libraries()
    set_precision("fp32")
    deterministic(True)
    bench = Bench(config.tiny, config.vram or 24.0, 600.0)
    if config.vram and not config.tiny:
        cap_card(config.vram, device_of("cuda"))
    step, digest = bench.step, hashlib.sha256()
    step.plan = bench.plans[:3][-1]
    step([bench.drawn(bench.batch)], 0.0)
    for parameter in step.parameters:
        momentum = step.optimizer.state[parameter]["exp_avg"]
        digest.update(momentum.cpu().numpy().tobytes())
    stats = {} if config.tiny else torch.cuda.memory_stats()
    results = {
        "momentum": digest.hexdigest()[:16],
        "refused": stats.get("num_ooms", 0),
        "peak_gib": stats.get("allocated_bytes.all.peak", 0) / 2**30,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(tyro.cli(RoomConfig, description=__doc__))
