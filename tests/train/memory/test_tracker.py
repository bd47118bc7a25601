from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import xlsd_train.optim.lion
from benchmarks.demo.pipeline import make_networks
from benchmarks.lib.allocations import peak_of
from benchmarks.lib.flops import FlopCounter
from tests.support.sessions import bare_step
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.planner import Planner
from xlsd_train.memory.tracker import Tracker
from xlsd_train.step import attention
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.blocks import Attention
from xlsd_train.step.step import Step

SIZE = (32, 24)
KINDS: tuple[Attention, ...] = ("exact", "sdpa")


def real_step(config: TrainConfig, plan: MemoryPlan) -> Step:
    """A step of the small model with real weights, on the CPU."""
    return bare_step(config, plan, *make_networks("nano", 600))


def real_batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, count, 4, *SIZE), generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    ids = torch.randint(0, 600, (count, 77), generator=generator)
    return Batch(0, "", 0.0, 0, count, latents, noise, timesteps, ids)


@pytest.mark.parametrize(
    ("phase", "optimizer", "plan"),
    [
        pytest.param("unet", "lion", MemoryPlan("plain", 6), marks=pytest.mark.slow),
        ("unet", "lion", MemoryPlan("plain", 3)),
        pytest.param("unet", "dlion", MemoryPlan("cheap", 6), marks=pytest.mark.slow),
        pytest.param("unet", "lion", MemoryPlan("cheap", 2), marks=pytest.mark.slow),
        ("unet", "adamw", MemoryPlan("feed-forward", 3)),
        pytest.param("unet", "lion", MemoryPlan("sliced", 1), marks=pytest.mark.slow),
        pytest.param("unet", "dlion", MemoryPlan("sliced", 2), marks=pytest.mark.slow),
        pytest.param("te", "lion", MemoryPlan("plain", 6), marks=pytest.mark.slow),
        pytest.param("te", "lion", MemoryPlan("cheap", 3), marks=pytest.mark.slow),
        ("te", "lion", MemoryPlan("sliced", 2)),
        ("both", "lion", MemoryPlan("cheap", 3)),
        pytest.param("unet", "lion", MemoryPlan("plain", 3, "exact"), marks=pytest.mark.slow),
        pytest.param("te", "lion", MemoryPlan("sliced", 2, "exact"), marks=pytest.mark.slow),
        ("both", "lion", MemoryPlan("feed-forward", 3, "exact")),
        ("both", "adamw", MemoryPlan("sliced", 1)),
        ("unet", "lion", MemoryPlan("cheap", 3, momentum="streamed")),
        pytest.param(
            "both", "dlion", MemoryPlan("sliced", 2, momentum="streamed"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_predicted_peak_is_the_allocators_within_three_percent(
    phase: Any, optimizer: Any, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 30_000)  # buffers are less than the state
    config = TrainConfig(phase=phase, optimizer=optimizer).resolved()
    step = real_step(config, plan)
    unet, text_encoder = step.model.unet.config, step.model.text_encoder.config.to_dict()
    found = Planner(config, unet, text_encoder, workspaces=False).predict(plan, 6, SIZE)
    predicted = found.peak - found.items["batch"]  # that was there before the profiler began
    if plan.momentum == "streamed":  # on a CPU all memory is the same
        state = sum(held.nbytes for x in step.optimizer.state.values() for held in x.values())
        assert found.items["optimizer"] < state / 2
        assert state <= found.host <= 2 * state
        predicted += state
    assert predicted == pytest.approx(peak_of(step, [real_batch(6)]), rel=0.03)


def test_the_tracker_sees_what_lives_at_the_worst_moment() -> None:
    with torch.device("meta"):
        weight = torch.empty(1000)
        tracker = Tracker()
        tracker.hold(weight, "weights")
        with tracker:
            a = weight * 2
            b = a + 1
            del a
            view = b.view(10, 100).t()
            c = view.contiguous()
            del b, view
            c.mul_(2)
    peak = tracker.footprint().peak()
    assert peak == {"weights": 4096, "activations": 2 * 4096}  # 4,000 bytes in units of 512
    moved = [int(x) for x in tracker.footprint().moved]
    assert moved == [8000, 8000, 8000, 8000]  # the views move nothing, in place reads and writes


def test_workspaces_are_counted_at_convolutions_where_asked() -> None:
    with torch.device("meta"):
        x, w = torch.empty(1, 8, 16, 16), torch.empty(8, 8, 3, 3)
        peaks = []
        for workspaces in (False, True):
            tracker = Tracker(workspaces)
            tracker.hold([x, w], "given")
            with tracker:
                torch.nn.functional.conv2d(x, w, padding=1)
            peaks.append(sum(tracker.footprint().peak().values()))
    needed = sum(-4 * t.numel() // 512 * -512 for t in (x, x, w))
    assert peaks[0] == needed
    assert needed < peaks[1] <= 2 * needed


def test_kernels_have_the_flops_that_the_counter_counts() -> None:
    step = real_step(TrainConfig(phase="both").resolved(), MemoryPlan("cheap", 2))
    with FlopCounter() as counter:
        step([real_batch(2)], 0.0)
    tracker = Tracker()
    with tracker:
        step([real_batch(2)], 0.0)
    assert tracker.footprint().tflop == pytest.approx(counter.total / 1e12)


@pytest.mark.parametrize("way", [pytest.param("cheap", marks=pytest.mark.slow), "sliced"])
def test_one_block_stands_for_all_blocks_of_exact_attention(
    way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FLOPs of all blocks are counted, and they are those of torch's kernel."""
    monkeypatch.setattr(attention, "BLOCK", 2**18)  # several blocks a sample
    plan, config = MemoryPlan(way, 2, "exact"), TrainConfig(phase="both").resolved()
    step = real_step(config, plan)
    with FlopCounter() as counter:
        step([real_batch(2)], 0.0)
    planner = Planner(config, step.model.unet.config, step.model.text_encoder.config.to_dict())
    for batch in (2, 9):
        exact, usual = (planner.predict(plan._replace(attention=x), batch, SIZE) for x in KINDS)
        assert exact.tflop == pytest.approx(counter.total / 1e12 * batch / 2, rel=1e-6)
        assert exact.tflop == pytest.approx(usual.tflop)


def test_attention_is_counted_on_the_cpu_too() -> None:
    """Two matrix products forward and five backward, one of them forward's again (Dao 2022)."""
    q, k, v = (torch.randn(1, 3, tokens, 8, requires_grad=True) for tokens in (64, 16, 16))
    with FlopCounter() as counter:
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.autograd.backward(out.sum())
    assert counter.total == (2 + 5) * 2 * 3 * 64 * 16 * 8


def test_footprints_of_different_runs_are_not_mixed() -> None:
    prints = []
    for count in (1, 2):
        tracker = Tracker()
        with tracker:
            for _ in range(count):
                torch.ones(4) + 1
        prints.append(tracker.footprint())
    with pytest.raises(ValueError, match="runs with different events"):
        prints[0].at(3, 1, prints[1], 2)
    doubled = prints[0].at(3, 1, prints[0], 2)
    assert np.array_equal(doubled.nbytes, prints[0].nbytes)


def test_flops_of_a_sliced_step_are_counted() -> None:
    """It calls `autograd.grad`, at which the hooks of torch's own counter fail."""
    step = real_step(TrainConfig(phase="both").resolved(), MemoryPlan("sliced", 1))
    totals = []
    for plan in (MemoryPlan("plain", 2), MemoryPlan("sliced", 1)):
        step.plan = plan
        with FlopCounter() as counter:
            step([real_batch(2)], 0.0)
        totals.append(counter.total)
    assert 1.2 < totals[1] / totals[0] < 1.4
    with FlopCounterMode(display=False) as known:
        q = torch.ones(2, 3, requires_grad=True)
        (q @ torch.ones(3, 4)).sum().backward()  # type: ignore[no-untyped-call]
    with FlopCounter() as ours:
        q = torch.ones(2, 3, requires_grad=True)
        (q @ torch.ones(3, 4)).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.total == known.get_total_flops()


def test_a_workspace_and_an_arriving_gradient_are_there_together() -> None:
    """In a later micro-batch, whose gradient is added to one that exists."""
    with torch.device("meta"):
        x, w = torch.empty(1, 8, 4, 4), torch.empty(512, 8, 3, 3, requires_grad=True)
        tracker = Tracker(workspaces=True)
        tracker.hold([x, w], "given")
        with tracker:
            torch.autograd.backward(torch.nn.functional.conv2d(x, w, padding=1).sum())
            tracker.hold(w.grad, "gradients")
    peak = tracker.footprint().peak(again=True)
    assert peak["gradients"] == 2 * 4 * w.numel()
    assert peak["workspaces"] >= 4 * 2 * 2 * w.numel()  # of the weight, and of its gradient
