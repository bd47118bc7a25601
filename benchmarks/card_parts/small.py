"""Steps under the limits of small GPUs, with resident and with streamed momentum."""

import hashlib

import torch

from benchmarks.card_parts.bench import Bench, Results
from benchmarks.lib.allocations import peak_of
from xlsd_cache.runtime.device import deterministic
from xlsd_train.memory.choose import asked, cap_card, memory_limit
from xlsd_train.memory.planner import GIB
from xlsd_train.optim.factory import settle
from xlsd_train.step.backend import MemoryPlan

CARDS_GB = (12.0, 8.0)


def small(bench: Bench) -> Results:
    """For each limit: the planner's plan, speed, peak, and the momentum's hash after some steps."""
    deterministic(True)
    results: Results = {}
    for vram in (bench.vram,) if bench.tiny else CARDS_GB:
        if not bench.tiny:
            cap_card(vram, bench.device)
        limit = memory_limit(vram) or 0.0
        found = bench.planner.fastest(bench.batch, bench.size, limit, asked(bench.settings))
        if found is None:
            results[f"{vram:g} GB"] = "no plan fits"
            continue
        for momentum in ("resident", "streamed"):
            plan = found.plan._replace(momentum=momentum)
            predicted = bench.planner.predict(plan, bench.batch, bench.size).peak
            row: Results = {"predicted": predicted / GIB, "chosen": plan == found.plan}
            if predicted <= limit:
                row |= _measured(bench, plan)
            results[f"{vram:g} GB, {momentum}, {plan.way} by {plan.micro_batch}"] = row
    if not bench.tiny:
        cap_card(bench.vram, bench.device)
    bench.with_optimizer("lion")
    return results


def _measured(bench: Bench, plan: MemoryPlan) -> Results:
    """Images/s, peak GiB, and the hash of the momentum after the same steps from zeros."""
    bench.with_optimizer("lion", plan.momentum == "streamed")
    bench.step.plan = plan
    batch, optimizer = bench.drawn(bench.batch), bench.step.optimizer
    if not bench.tiny:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.clock(lambda: bench.step([batch], 0.0))  # the weights stay the same
    settle(optimizer)
    digest = hashlib.sha256()
    for parameter in bench.step.parameters:
        digest.update(optimizer.state[parameter]["exp_avg"].cpu().contiguous().numpy())
    # A CPU's peak includes what a GPU leaves to the CPU.
    peak = peak_of(bench.step, [batch]) if bench.tiny else torch.cuda.max_memory_allocated()
    return {
        "images_per_s": bench.batch / seconds, "peak": peak / GIB,
        "momentum": digest.hexdigest()[:16],
    }  # fmt: skip
