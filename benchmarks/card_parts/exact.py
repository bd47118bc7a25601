"""Whether fp32 is IEEE fp32 on a GPU, and whether runs and resumed runs are bit-equal."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.card_parts.bench import Bench, Results
from xlsd_cache.runtime.device import deterministic, set_precision
from xlsd_cache.vocabulary import Precision
from xlsd_train.step.attention import exact_attention
from xlsd_train.step.backend import MemoryPlan

STRICT = 1e-5  # relative; TF32 is off by about 1e-3
State = list[tuple[Tensor, Tensor]]  # each weight and its momentum


def strict(bench: Bench) -> Results:
    """Relative errors of outputs and gradients against float64 on the same device."""
    results: Results = {}
    modes: tuple[Precision, ...] = ("fp32",) if bench.tiny else ("fp32", "tf32")
    for mode in modes:
        set_precision(mode)
        results[mode] = {name: errors(f, inputs) for name, f, inputs in kernels(bench)}
    set_precision("fp32")
    worst = max(max(each.values()) for each in results["fp32"].values())
    return {**results, "strict": worst < STRICT}


def kernels(bench: Bench) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """SD1.5's kinds of operations, at its shapes."""
    wide, side, n = (32, 8, 1) if bench.tiny else (320, 64, 4)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=bench.device)

    torch.manual_seed(0)
    weight = drawn(wide, wide, 3, 3, scale=(9 * wide) ** -0.5)
    yield "convolution", _convolution, [drawn(n, wide, side, side), weight]
    yield "matmul", torch.matmul, [drawn(512, 4 * wide), drawn(4 * wide, 512)]
    for tokens, keys, head in ((side**2, side**2, 40), (side**2 // 4, 77, 80), (64, 64, 160)):
        q, k, v = (drawn(2, 8, count, head) for count in (tokens, keys, keys))
        yield f"attention {tokens}x{keys}", F.scaled_dot_product_attention, [q, k, v]
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        yield f"exact attention {tokens}x{keys}", partial(exact_attention, heads=8), [q, k, v]


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def errors(kernel: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Relative errors of the output and of the worst gradient."""
    single = [x.clone().requires_grad_() for x in inputs]
    double = [x.double().requires_grad_() for x in inputs]
    ours, exact = kernel(*single), kernel(*double)
    ones = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, single, ones),
        torch.autograd.grad(exact, double, ones.double()),
        strict=True,
    )
    return {"output": _far(ours, exact), "gradients": max(_far(a, b) for a, b in pairs)}


def _far(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


def room(bench: Bench) -> Results:
    """Whether the bits of the first step depend on free memory, in fresh processes."""
    bench.free()
    results: Results = {}
    for name, vram in ((f"{bench.vram:g} GB", bench.vram), ("the whole card", None)):
        command = [sys.executable, str(Path(__file__).parent / "room.py")]
        command += ["--tiny"] if bench.tiny else []
        command += ["--vram", str(vram)] if vram else []
        took = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        results[name] = json.loads(took.stdout)
    one, other = results.values()
    return {**results, "same": one["momentum"] == other["momentum"]}


def determinism(bench: Bench) -> Results:
    """Two steps, run twice, and resumed after the first with other blocks in the allocator."""
    deterministic(True)
    step, results = bench.step, {}
    start = _state(step)
    for plan in (MemoryPlan("plain", 2), MemoryPlan("sliced", 2), MemoryPlan("cheap", 4))[
        : 2 if bench.tiny else 3
    ]:
        step.plan = plan
        losses, full = _steps(bench, start, 0, 2)
        again, repeated = _steps(bench, start, 0, 2)
        _, half = _steps(bench, start, 0, 1)
        held = [torch.empty(int(n), device=bench.device) for n in (3e6, 5e5, 9e6)]
        _, resumed = _steps(bench, half, 1, 2)
        del held
        results[str(plan)] = {
            "twice": losses == again and _same(full, repeated),
            "resumed": _same(full, resumed),
        }
    _put(step, start)
    return results


def _steps(bench: Bench, state: State, first: int, last: int) -> tuple[list[float], State]:
    """Run these steps from a state. Returns their losses and the new state."""
    bench.free()
    _put(bench.step, state)
    batch, losses = bench.drawn(4), []
    for number in range(first, last):
        loss, _ = bench.step([replace(batch, noise=batch.noise + number)], 1e-5)
        losses.append(loss.item())
    return losses, _state(bench.step)


def _state(step: Any) -> State:
    state = step.optimizer.state
    return [(p.detach().cpu().clone(), state[p]["exp_avg"].cpu().clone()) for p in step.parameters]


def _put(step: Any, state: State) -> None:
    with torch.no_grad():
        for parameter, (weight, momentum) in zip(step.parameters, state, strict=True):
            parameter.copy_(weight)
            step.optimizer.state[parameter]["exp_avg"].copy_(momentum)


def _same(one: State, other: State) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
