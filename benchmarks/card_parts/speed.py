"""images/s of each memory plan, host-device synchronisations, and time per kernel."""

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.card_parts.bench import Bench, Results
from benchmarks.lib.plain_loop import PlainLoop
from benchmarks.lib.turns import Contestant, take_turns
from xlsd_cache.runtime.device import deterministic
from xlsd_train.checkpoints.environment import peak_gib
from xlsd_train.step import attention as exact
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.compile import Compiled, warm_up
from xlsd_train.step.step import Step
from xlsd_train.training.meter import Meter

BLOCK = exact.BLOCK  # while others are measured
TIMED = 2  # steps per plan
LR = 1e-9  # so small that no loss diverges
# Parts of the names of kernels that multiply; all others only move memory.
_MULTIPLY = (
    "gemm", "conv", "wgrad", "dgrad", "cutlass", "xmma", "winograd", "fft", "fmha", "attention",
    "mm", "cudnn", "nvjet",
)  # fmt: skip
_ATTENTION = ("fmha", "attention", "flash")


def speed(bench: Bench) -> Results:
    """images/s of each plan and of diffusers' loop, alternating, with deterministic kernels."""
    return _compare(bench, bench.plans[:4], True)


def free(bench: Bench) -> Results:
    """images/s of the plan for 24 GB and of diffusers' loop, with any kernels."""
    return _compare(bench, bench.plans[:3][-1:], False)


def compiled(bench: Bench) -> Results:
    """images/s and peak of the fastest plans with and without --compile, and seconds to compile."""
    step, batch = bench.step, bench.drawn(bench.batch)
    bound, plans = Compiled(), bench.plans[:1] if bench.tiny else bench.plans[:3]
    fused = Step(step.model, step.parameters, step.optimizer, step.objective, step.backend, bound)
    step.plan = plans[0]
    begun = time.perf_counter()
    warm_up(fused, bound, plans[0].micro_batch, bench.size)
    results: Results = {"compile_s": time.perf_counter() - begun}
    for plan in plans:
        for name, one in (("eager", step), ("compiled", fused)):
            one.plan = plan
            bench.free()
            if not bench.tiny:
                torch.cuda.reset_peak_memory_stats()
            seconds = bench.clock(partial(one, [batch], LR), 1 if bench.tiny else TIMED)
            results[f"{plan}, {name}"] = {
                "images_per_s": bench.batch / seconds, "peak_gib": peak_gib(bench.device)
            }  # fmt: skip
    return results


def _compare(bench: Bench, plans: list[MemoryPlan], in_order: bool) -> Results:
    step, batch = bench.step, bench.drawn(bench.batch)

    def take(plan: MemoryPlan) -> Tensor:
        step.plan = plan
        return step([batch], LR)[0]

    latents = batch.latents * bench.bundle.vae.scaling_factor
    plain = PlainLoop(bench.bundle, step.optimizer, False, batch.input_ids, latents)
    entered = {str(plan): Contestant(partial(take, plan), step.optimizer) for plan in plans}
    # It uses our Lion, which is in its favour.
    entered["diffusers, checkpointing"] = Contestant(plain, step.optimizer, checkpointing=True)
    deterministic(in_order)
    timed = take_turns(bench.bundle, entered, 1 if bench.tiny else TIMED, bench.device.type)
    deterministic(True)
    peak = bench.card.tflops(bench.settings.precision) if bench.card else None
    results: Results = {}
    for name, result in timed.items():
        if result.seconds is None:
            results[name] = {"failed": "out of memory"}
            continue
        rate = result.tflop / result.seconds
        results[name] = {
            "images_per_s": bench.batch / result.seconds,
            "tflop": result.tflop,
            "of_peak": rate / peak if peak else None,
            "peak_gib": result.peak_gib,
        }
    return results


def attention(bench: Bench) -> Results:
    """Attention in ms and of the fp32 peak: torch's kernels, and exact by the size of its blocks.

    The deterministic backward pass of torch has a block per head of an image.
    """
    shapes = ((64, 64, 8),) if bench.tiny else ((4096, 4096, 40), (1024, 1024, 80), (4096, 77, 40))
    results: Results = {}
    for n, m, width in shapes:
        for count in (1,) if bench.tiny else (4, 6, 11, 16):
            q, k, v = (torch.randn(count, x, 8 * width, device=bench.device) for x in (n, m, m))
            leaves, product = [x.requires_grad_() for x in (q, k, v)], 2 * 8 * count * n * m * width
            each: Results = {}
            for name, in_order in (("deterministic", True), ("free", False)):
                deterministic(in_order)
                each[name] = _passes(bench, _sdpa, leaves, product)
            deterministic(True)
            for mib in (16, 32, 64):
                exact.BLOCK = mib * 2**20
                each[f"exact {mib} MiB"] = _passes(bench, _exact, leaves, product)
            results[f"{count} of {n}x{m}"] = each
    exact.BLOCK = BLOCK
    return results


def _passes(bench: Bench, attend: Any, leaves: list[Tensor], product: int) -> Results:
    """Forward with two matrix products and backward with five, of `product` FLOPs each."""
    out = attend(*leaves)
    ones = torch.ones_like(out)
    back = partial(torch.autograd.grad, out, leaves, ones, retain_graph=True)
    timed: Results = {}
    for name, work, products in (("forward", partial(attend, *leaves), 2), ("backward", back, 5)):
        seconds = bench.clock(work, 3)
        timed[f"{name}_ms"] = 1000 * seconds
        if bench.card:
            timed[f"{name}_of_peak"] = products * product / seconds / bench.card.fp32 / 1e12
    return timed


def _sdpa(*inputs: Tensor) -> Tensor:
    """As the step calls it, [B, n, 8 * d] each."""
    q, k, v = (x.view(x.shape[0], x.shape[1], 8, -1).transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return exact.exact_attention(q, k, v, 8)


def syncs(bench: Bench) -> Results:
    """Where the host waits for the GPU in a step, and how long the meter waits for the newest."""
    results: Results = {}
    batch = bench.drawn(4)
    for optimizer, way in (("dlion", "cheap"), ("lion", "cheap"), ("lion", "sliced")):
        bench.with_optimizer(optimizer)
        bench.step.plan = MemoryPlan(way, 2)  # type: ignore[arg-type]
        bench.step([batch], LR)
        bench.sync()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            _debug_syncs(bench, "warn")
            bench.step([batch], LR)
            _debug_syncs(bench, "default")
        waits = [x for x in warned if "synchroniz" in str(x.message)]
        places = sorted({f"{Path(x.filename).name}:{x.lineno}" for x in waits})
        results[f"{optimizer}, {way}"] = {"waits": len(waits), "where": places}
    return {**results, "meter": _meter(bench)}


def _debug_syncs(bench: Bench, mode: str) -> None:
    if not bench.tiny:
        torch.cuda.set_sync_debug_mode(mode)


def _meter(bench: Bench) -> Results:
    """Seconds to launch a step and log the one before, and GPU time left after the last launch.

    If the host never waits for the newest step, the time left is about a whole step.
    """
    meter, batch, waits = Meter([0.0, 0.0]), bench.drawn(4), []
    meter.begin()
    for number in range(4):
        begun = time.perf_counter()
        loss, norm = bench.step([batch], LR)
        launched = time.perf_counter()
        meter.add({"step": number}, 4, loss, norm)
        waits.append([launched - begun, time.perf_counter() - launched])
    begun = time.perf_counter()
    bench.sync()
    return {"launch_and_log_s": waits, "then_busy_s": time.perf_counter() - begun}


def kernels(bench: Bench) -> Results:
    """The ten kernels that take most time, and the shares of attention and of memory moves."""
    deterministic(True)
    bench.step.plan, batch = bench.plans[1], bench.drawn(bench.batch)
    bench.step([batch], LR)
    bench.sync()
    activities = [ProfilerActivity.CPU, *([] if bench.tiny else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as profiled:
        bench.step([batch], LR)
        bench.sync()
    times = {}
    for event in profiled.key_averages():
        on_card = str(event.device_type).endswith("CUDA")
        took = event.self_cpu_time_total if bench.tiny else event.self_device_time_total
        if took > 0 and (bench.tiny or on_card):
            times[event.key] = (took, event.count)
    total = sum(took for took, _ in times.values()) or 1.0

    def share(words: tuple[str, ...]) -> float:
        named = [t for key, (t, _) in times.items() if any(x in key.lower() for x in words)]
        return float(sum(named) / total)

    top = sorted(times.items(), key=lambda one: -one[1][0])[:10]
    return {
        "seconds": total / 1e6,
        "attention": share(_ATTENTION),
        "moving_memory": 1 - share(_MULTIPLY),
        "top": [{"name": name[:100], "times": n, "share": took / total} for name, (took, n) in top],
    }
