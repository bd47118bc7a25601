"""Predicted against measured memory on a GPU, and the largest batch that fits."""

import torch

from benchmarks.card_parts.bench import Bench, Results
from benchmarks.lib.allocations import peak_of
from benchmarks.train.max_batch import whole
from xlsd_cache.runtime.device import deterministic
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_train.memory.choose import memory_limit
from xlsd_train.memory.planner import GIB, KEEPING
from xlsd_train.step.backend import MemoryPlan

TINY_LIMIT = 30 * 2**20  # bytes above the smallest step


def peaks(bench: Bench) -> Results:
    """Predicted and measured peak of each plan in GiB, under the limit of GPU memory."""
    deterministic(True)
    results: Results = {}
    for plan in bench.plans:
        predicted = bench.planner.predict(plan, bench.batch, bench.size).peak
        bench.free()
        bench.step.plan = plan
        try:
            real = _real(bench)
        except RuntimeError as error:
            if not is_full(error):
                raise
            real = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        far = {"error": predicted / GIB / real["peak"] - 1} if "peak" in real else {}
        results[str(plan)] = {"predicted": predicted / GIB, **real, **far}
    return results


def _real(bench: Bench) -> Results:
    """Peak GiB of a step: tensors, and all memory that torch reserved."""
    batch = bench.drawn(bench.batch)
    if bench.tiny:
        return {"peak": peak_of(bench.step, [batch]) / GIB}
    torch.cuda.reset_peak_memory_stats()
    bench.step([batch], 0.0)
    bench.sync()
    stats = torch.cuda.memory_stats()
    return {
        "peak": stats["allocated_bytes.all.peak"] / GIB,
        "reserved": stats["reserved_bytes.all.peak"] / GIB,
        "alloc_retries": stats["num_alloc_retries"],
    }


def largest(bench: Bench) -> Results:
    """The largest batch that fits for each strategy, to 1/16 of the predicted one."""
    deterministic(True)
    limit = memory_limit(bench.vram) or 0.0
    if bench.tiny:
        limit = bench.planner.predict(MemoryPlan("sliced", 1), 1, bench.size).peak + TINY_LIMIT
    results: Results = {}
    for way in KEEPING[:1] if bench.tiny else ("sliced", *KEEPING):
        plan = MemoryPlan(way, 4 if way == "sliced" else 1)
        predicted = bench.planner.largest_batch(plan, bench.size, limit)
        tried: dict[int, str] = {}

        def fits(count: int, plan: MemoryPlan = plan, tried: dict[int, str] = tried) -> bool:
            return _fits(bench, whole(plan, count), count, limit, tried)

        stride = max(1, predicted // 16)  # a step with the largest batch takes most of a minute
        real = predicted
        while real > 0 and not fits(real):
            real -= stride
        while real >= predicted and fits(real + stride):
            real += stride
        results[way] = {"predicted": predicted, "largest": real, "tried": tried}
    return results


def _fits(bench: Bench, plan: MemoryPlan, count: int, limit: float, tried: dict[int, str]) -> bool:
    """Whether a step with this batch fits. False if no time is left to try it."""
    if bench.tiny:  # a CPU has no limit, so the prediction decides
        tried[count] = "predicted"
        return bench.planner.predict(plan, count, bench.size).peak <= limit
    if bench.left() < 60:
        tried[count] = "no time left"
        return False
    bench.free()
    bench.step.plan = plan
    try:
        bench.step([bench.drawn(count)], 0.0)
        bench.sync()
    except RuntimeError as error:
        if not is_full(error):
            raise
        tried[count] = type(error).__name__ + ": " + str(error)[:100]
    else:
        tried[count] = "fits"
    return tried[count] == "fits"
