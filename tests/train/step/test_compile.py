"""`--compile`: gradients to rounding, graphs counted, nothing compiled after the warm-up."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import GroupNorm

from benchmarks.demo.pipeline import make_networks
from benchmarks.lib.allocations import peak_of
from tests.support import train
from tests.support.gradients import difference, gradients_of
from tests.support.sessions import bare_step
from xlsd_cache.errors import UserError
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.planner import Planner
from xlsd_train.runs.layout import checkpoints
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.compile import Compiled, check_compiler, warm_up
from xlsd_train.step.step import Step

# The compiler's own, which it means to hide from users.
pytestmark = pytest.mark.filterwarnings("ignore:::torch")

WAYS = [
    MemoryPlan("plain", 2), MemoryPlan("cheap", 4), MemoryPlan("feed-forward", 2),
    MemoryPlan("sliced", 2),
]  # fmt: skip
SIZE = (16, 24)  # of the latents in the largest bucket


class Steps(NamedTuple):
    """Two steps on the same weights."""

    eager: Step
    compiled: Step
    bound: Compiled
    graphs: int


def make(phase: Any = "unet") -> Steps:
    config = TrainConfig(phase, batch=4).resolved()
    eager = bare_step(config, WAYS[0], *make_networks("nano", 600))
    bound = Compiled()
    compiled = Step(
        eager.model, eager.parameters, eager.optimizer, eager.objective, eager.backend, bound
    )
    before = counters["stats"]["unique_graphs"]
    warm_up(compiled, bound, 4, SIZE)
    return Steps(eager, compiled, bound, counters["stats"]["unique_graphs"] - before)


@pytest.fixture(scope="module")
def steps() -> Steps:
    torch.set_num_threads(1)
    return make()


def drawn(count: int, height: int, width: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, count, 4, height, width), generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    ids = torch.randint(0, 600, (count, 77), generator=generator)
    return Batch(0, "drawn", 0.0, 0, count, latents, noise, timesteps, ids)


@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_gradients_are_the_eager_steps_and_all_is_compiled(steps: Steps, plan: MemoryPlan) -> None:
    steps.bound.stance = "fail_on_recompile"  # also instead of running eagerly
    for size in (SIZE, (24, 16), (32, 32)):
        batch = drawn(4, *size)
        got, expected = (gradients_of(x, batch, plan) for x in (steps.compiled, steps.eager))
        assert 0 < difference(got, expected) < 1e-5


def test_what_no_graph_accepts_runs_eagerly(steps: Steps) -> None:
    """A batch of one, and latents of which one column is left in the middle of the UNet."""
    steps.bound.stance = "eager_on_recompile"
    before = counters["stats"]["unique_graphs"]
    for count, size in ((1, SIZE), (3, (9, 7))):
        batch = drawn(count, *size)
        for plan in WAYS:
            got, expected = (gradients_of(x, batch, plan) for x in (steps.compiled, steps.eager))
            assert difference(got, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == before


def test_there_is_a_graph_per_number_of_channels_and_none_per_layer(steps: Steps) -> None:
    unet = steps.eager.model.unet
    resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    norms = [n for m in resnets for n in (m.norm1, m.norm2)]
    norm_silu = {n.num_channels for n in [*norms, unet.conv_norm_out]}
    add = {m.conv2.out_channels for m in resnets}
    geglu = {m.proj.out_features for m in unet.modules() if type(m).__name__ == "GEGLU"}
    assert steps.graphs == len(norm_silu) + len(add) + len(geglu)
    assert steps.graphs < len(resnets) < len([m for m in unet.modules() if type(m) is GroupNorm])


def test_a_bucket_has_the_same_bits_whatever_came_before(steps: Steps) -> None:
    steps.bound.stance = "eager_on_recompile"
    first = gradients_of(steps.compiled, drawn(4, *SIZE), WAYS[1])
    for size in ((24, 16), (9, 7), (32, 32)):
        gradients_of(steps.compiled, drawn(3, *size), WAYS[0])
    again = gradients_of(steps.compiled, drawn(4, *SIZE), WAYS[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "plan", [WAYS[0], *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])], ids=str
)
def test_it_needs_no_more_memory_than_planned(steps: Steps, plan: MemoryPlan) -> None:
    steps.bound.stance = "fail_on_recompile"
    unet, text_encoder = steps.eager.model.unet, steps.eager.model.text_encoder
    config = TrainConfig("unet", batch=4).resolved()
    planner = Planner(config, unet.config, text_encoder.config.to_dict(), workspaces=False)
    planned = planner.predict(plan, 4, (32, 32))
    steps.compiled.plan = plan
    peak = peak_of(steps.compiled, [drawn(4, 32, 32)])
    assert peak <= planned.peak - planned.items["batch"]  # that was there before the measurement


def test_without_a_compiler_it_is_refused() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler .* leave it out"),
    ):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["te", "both"])
def test_other_phases_compile_what_they_need(phase: str) -> None:
    steps = make(phase)
    steps.bound.stance = "fail_on_recompile"
    for plan in WAYS:
        batch = drawn(4, *SIZE)
        got, expected = (gradients_of(x, batch, plan) for x in (steps.compiled, steps.eager))
        assert difference(got, expected) < 1e-5


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(
    arguments: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each run compiles by itself, and a resumed one meets another bucket first."""
    eager, whole, parts = (tmp_path / name for name in ("eager", "whole", "parts"))
    assert train(*arguments, "--out", eager) == 0
    assert train(*arguments, "--compile", "--out", whole) == 0
    for stop in (3, 6):
        given = (*arguments, "--compile", "--out", parts, "--stop-after", stop)
        assert train(*given) == 0
    assert "compiled 8 kinds" in capfd.readouterr().err
    last = [checkpoints(folder)[-1] for folder in (whole, parts, eager)]
    for name in ("unet.safetensors", "optimizer.safetensors"):
        one, other, without = ((folder / name).read_bytes() for folder in last)
        assert one == other != without
    assert train(*arguments, "--out", parts) == 1
    assert "--compile" in capfd.readouterr().err
