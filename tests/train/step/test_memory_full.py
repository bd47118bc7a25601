"""Out of memory at any point of a step: the gradients are right, or the run stops."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.demo.pipeline import make_networks
from tests.support.sessions import bare_step
from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.step.backend import DeviceBackend, MemoryPlan, PartlyDone

PLANS = [
    MemoryPlan("plain", 4),
    MemoryPlan("cheap", 4),
    MemoryPlan("feed-forward", 2),
    MemoryPlan("sliced", 4),
    MemoryPlan("sliced", 2),
    MemoryPlan("sliced", 1),
]
PHASES = ["unet", "te", "both"]
SAMPLED = 4  # moments of each plan, in the tests that always run
# As torch's allocator, cuDNN, cuBLAS and CUDA's loader of kernels say it, in turn.
ERRORS: list[Callable[[], RuntimeError]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB."),
    lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    lambda: torch.AcceleratorError("CUDA error: out of memory"),
]


class Refusing(TorchDispatchMode):
    """Counts kernels that take memory, or with `all_` all of them; says once that it is full."""

    def __init__(self, at: int, all_: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.all, self.count, self.refused = at, all_, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        if self.all and func._schema.is_mutable:
            self._count(func)  # it may have to be loaded, which fails before it does anything
        out = func(*args, **(kwargs or {}))
        if any(x.untyped_storage()._cdata not in given for x in tree_leaves(out) if is_tensor(x)):
            self._count(func)
        return out

    def _count(self, func: Any) -> None:
        self.count += 1
        if self.count == self.at:
            self.refused = str(func)
            error = ERRORS[self.at % len(ERRORS)]()
            raise error


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class World:
    """A step of the smallest networks, put back to where it began before each try."""

    def __init__(self, phase: Any, optimizer: Any = "lion") -> None:
        unet, text_encoder = make_networks("nano", 600)
        for parameter in unet.parameters():
            if parameter.dim() > 1:  # the initial ones leave the skips alone
                torch.nn.init.normal_(parameter, std=0.05)
        config = TrainConfig(phase=phase, optimizer=optimizer).resolved()
        self.step = bare_step(config, MemoryPlan("plain", 4), unet, text_encoder)
        self.step.optimizer.register_step_pre_hook(self._look)
        self._start = [p.detach().clone() for p in self.step.parameters]
        self.gradients: dict[Any, Tensor] = {}

    def _look(self, *_: Any) -> None:
        with _disable_current_modes():  # what the test itself takes is always there
            there = {p: p.grad.clone() for p in self.step.parameters if p.grad is not None}
        assert not self.gradients.keys() & there.keys(), "stepped twice"
        self.gradients.update(there)

    def take(self, plan: MemoryPlan, mode: Any, accum: int = 1) -> float | RuntimeError:
        """The loss, or the error with which the run would stop; gradients are left."""
        self.step.plan = plan
        self.gradients.clear()
        with torch.no_grad():
            for parameter, value in zip(self.step.parameters, self._start, strict=True):
                parameter.copy_(value)
                parameter.grad = None
                self.step.optimizer.state[parameter]["exp_avg"].zero_()
        parts = [drawn(n) for n in range(accum)]
        try:
            with mode:
                loss, _ = self.step(parts, 1e-4)
        except RuntimeError as error:
            return error
        return float(loss)


def drawn(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn((2, 4, 4, 8, 8), generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    ids = torch.randint(0, 600, (4, 77), generator=generator)
    return Batch(0, "", 0.0, 0, 4, latents, noise, timesteps, ids)


def far(these: dict[Any, Tensor], those: dict[Any, Tensor]) -> float:
    assert these.keys() == those.keys()
    squares = sum(float((these[p].double() - those[p]).square().sum()) for p in those)
    return math.sqrt(squares / sum(float(g.double().square().sum()) for g in those.values()))


def try_all(
    phase: str, plan: MemoryPlan, most: int | None, *, all_: bool = False, accum: int = 1
) -> int:
    """Be full at every moment of a step, or at so many; how often the step was right all the same.

    What was not right must have stopped.
    """
    world = World(phase)
    counting = Refusing(0, all_)
    loss = world.take(plan, counting, accum)
    expected, right = dict(world.gradients), 0
    every = range(1, counting.count + 1)
    # Odd distances, so that all parts of a layer and all errors are met.
    moments = every if most is None else every[:: (counting.count // most) | 1]
    for at in moments:
        mode = Refusing(at, all_)
        got = world.take(plan, mode, accum)
        assert mode.refused, at
        if isinstance(got, RuntimeError):
            assert is_full(got), (at, mode.refused, got)
            continue
        assert got == pytest.approx(loss, rel=1e-5), (at, mode.refused)
        assert far(world.gradients, expected) < 1e-5, (at, mode.refused)
        right += 1
    return right


@pytest.mark.parametrize(("phase", "plan"), [*zip([*PHASES, *PHASES], PLANS, strict=True)])
def test_memory_that_is_full_at_any_moment_never_gives_wrong_gradients(
    phase: str, plan: MemoryPlan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xlsd")
    right = try_all(phase, plan, SAMPLED)
    assert right or plan == MemoryPlan("sliced", 1)  # for the tightest one nothing else is left
    assert ("repeating with" in caplog.text) == (right > 0)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_at_every_single_moment(phase: str, plan: MemoryPlan) -> None:
    """Also where a kernel that takes no memory cannot be loaded."""
    assert try_all(phase, plan, None, all_=True) or plan == MemoryPlan("sliced", 1)


class Patient(DeviceBackend):
    """Repeats with the same plan, so that the result is the same to the bit."""

    def tighten(self, error: RuntimeError) -> None:
        if isinstance(error, PartlyDone) or not is_full(error):
            raise error


class Often(Refusing):  # type: ignore[no-untyped-call]  # torch's own base
    """Says that it is full at many moments, further apart than a slice has kernels."""

    def _count(self, func: Any) -> None:
        self.count += 1
        if self.count % 1009 == self.at % 1009:
            self.refused = str(func)
            error = ERRORS[self.count % len(ERRORS)]()
            raise error


@pytest.mark.parametrize(
    ("plan", "accum"), [(MemoryPlan("sliced", 1), 1), (MemoryPlan("sliced", 3), 2)]
)
def test_a_slice_that_is_done_again_is_the_same_to_the_bit(plan: MemoryPlan, accum: int) -> None:
    """No slice is added twice, whichever of its tensors found no room."""
    same_to_the_bit(plan, accum, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "accum"), [(MemoryPlan("sliced", 1), 1), (MemoryPlan("sliced", 3), 2)]
)
def test_every_slice_that_is_done_again_is_the_same_to_the_bit(
    plan: MemoryPlan, accum: int
) -> None:
    """Over all distances every moment of a step is met once."""
    same_to_the_bit(plan, accum, 1009)


def same_to_the_bit(plan: MemoryPlan, accum: int, tries: int) -> None:
    world = World("both")
    world.step.backend.__class__ = Patient
    loss = world.take(plan, Refusing(0), accum)
    expected, refused = dict(world.gradients), set()
    for at in range(11, 1009, 1009 // tries):
        mode = Often(at)
        got = world.take(plan, mode, accum)
        refused.add(mode.refused)
        if isinstance(got, RuntimeError):
            assert is_full(got)  # in the update, or between layers
            continue
        assert got == loss
        assert all(torch.equal(world.gradients[p], expected[p]) for p in expected)
    assert len(refused) > 1


@pytest.mark.parametrize("moment", ["empty_like", "clone"])
def test_buffers_are_there_before_anything_is_written(moment: str) -> None:
    """Of a value's gradient for the whole batch, which is larger than all that a slice needs."""
    world = World("both")
    plan = MemoryPlan("sliced", 4 if moment == "clone" else 1)
    world.step.backend.__class__ = Patient
    world.take(plan, Refusing(0))
    expected = dict(world.gradients)

    class Rarer(Refusing):  # type: ignore[no-untyped-call]
        """Full at the first of them, and then ever later, so that each slice passes at last."""

        seen, next = 0, 1

        def _count(self, func: Any) -> None:
            if func.overloadpacket.__name__ == moment:
                self.seen += 1
                if self.seen == self.next:
                    self.next = 2 * self.seen + 1
                    raise torch.OutOfMemoryError("CUDA out of memory")

    mode = Rarer(0)
    got = world.take(plan, mode)
    assert mode.seen > 2
    assert not isinstance(got, RuntimeError), got
    assert all(torch.equal(world.gradients[p], expected[p]) for p in expected)


@pytest.mark.parametrize("optimizer", ["lion", "dlion", "adamw"])
def test_a_card_that_is_full_in_the_update_stops_the_run(optimizer: str) -> None:
    """Some weights are stepped: no other try may step them again."""
    world = World("unet", optimizer)
    full = torch.OutOfMemoryError("CUDA out of memory")
    steps = [0]

    def in_the_update(*_: Any) -> None:
        steps[0] += 1
        if steps[0] == 3:
            raise full

    world.step.optimizer.register_step_pre_hook(in_the_update)
    assert world.take(MemoryPlan("sliced", 2), Refusing(0)) is full
    assert 0 < len(world.gradients) < len(world.step.parameters)


def test_another_error_is_not_taken_for_a_full_card() -> None:
    for told in ("mat1 and mat2 shapes cannot be multiplied", "CUBLAS_STATUS_EXECUTION_FAILED",
                 "CUDA error: an illegal memory access was encountered"):  # fmt: skip
        assert not is_full(RuntimeError(told))
    assert not is_full(ValueError("out of memory"))
    world = World("unet")

    class Broken(Refusing):  # type: ignore[no-untyped-call]
        def _count(self, func: Any) -> None:
            self.count += 1
            if self.count == 500:
                raise RuntimeError("shapes cannot be multiplied")

    for plan in (MemoryPlan("plain", 4), MemoryPlan("sliced", 4)):
        broken = Broken(0)
        got = world.take(plan, broken)
        assert isinstance(got, RuntimeError)
        assert "shapes" in str(got)
        assert world.step.plan == plan


@pytest.mark.parametrize("error", ERRORS)
def test_every_word_for_a_full_card_is_known(error: Callable[[], RuntimeError]) -> None:
    assert is_full(error())
    for told in ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA driver error: out of memory",
                 "HIP out of memory", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"):  # fmt: skip
        assert is_full(RuntimeError(told))


def test_the_failed_try_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the card's memory is given back, the traceback holds no activation any more."""
    world = World("unet")
    live = [0]
    found: list[int] = []

    class Live(Refusing):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = {
                x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)
            }
            out = super().__torch_dispatch__(func, types, args, kwargs)
            for x in tree_leaves(out):
                if is_tensor(x) and x.numel() > 1000 and x.untyped_storage()._cdata not in given:
                    live[0] += 1
                    weakref.finalize(x.untyped_storage(), lambda: live.__setitem__(0, live[0] - 1))
            return out

    def look(_: torch.device) -> None:
        gc.collect()  # as there is done on a card
        found.append(live[0])

    for module in ("step", "backend"):
        monkeypatch.setattr(f"xlsd_train.step.{module}.give_back", look)
    for plan in (MemoryPlan("plain", 4), MemoryPlan("sliced", 4)):
        whole = Refusing(0)
        world.take(plan, whole)
        live[0] = 0
        found.clear()
        assert not isinstance(world.take(plan, Live(whole.count * 2 // 3)), RuntimeError)
        assert len(found) == 1
        if plan.way == "plain":  # of the sliced pass the layers' inputs stay
            assert found[0] < 20
