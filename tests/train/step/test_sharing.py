"""Gradients that two processes share during the backward pass, and those shared after it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from torch.nn import Parameter

from benchmarks.demo.pipeline import make_networks
from tests.support import together
from tests.support.sessions import bare_step
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.step import sharing
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.sharing import Sharing, messages
from xlsd_train.step.step import Step

PLANS = {
    "plain": MemoryPlan("plain", 2), "cheap": MemoryPlan("cheap", 1),
    "feed-forward": MemoryPlan("feed-forward", 2), "sliced": MemoryPlan("sliced", 1),
}  # fmt: skip
# Images of each batch of a step, dealt to two processes: the second may have fewer, or none.
BATCHES = [(3,), (1,), (3, 1)]


class OneAfterAnother(Sharing):
    """After the backward pass each gradient by itself, and each is waited for."""

    def wait(self, parameters: Sequence[Parameter]) -> None:
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()
            distributed.all_reduce(parameter.grad)


class Watched(Sharing):
    """Notes how much was sent when a backward pass ended, and what was sent before each wait."""

    def __init__(self, send: Any) -> None:
        super().__init__(send)
        self.in_backward = 0
        self.meanwhile: list[int] = []

    def backward(self, loss: Tensor, parameters: Sequence[Parameter], last: bool) -> None:
        super().backward(loss, parameters, last)
        self.in_backward = len(self._sent)
        assert last or not self._sent

    def wait(self, parameters: Sequence[Parameter]) -> None:
        self.meanwhile.append(len(self._sent.keys() - set(parameters)))
        super().wait(parameters)


class Patient(DeviceBackend):
    """Repeats what ran out of memory with the same plan, so that the bits are the same."""

    def tighten(self, error: RuntimeError) -> None:
        assert isinstance(error, torch.OutOfMemoryError)


def drawn(accelerator: Accelerator, images: Sequence[int]) -> list[Batch]:
    """This process's parts of batches of so many images."""
    parts = []
    for number, count in enumerate(images):
        generator = torch.Generator().manual_seed(number)
        latents, noise = torch.randn((2, count, 4, 8, 8), generator=generator)
        timesteps = torch.randint(0, 1000, (count,), generator=generator)
        ids = torch.randint(0, 600, (count, 77), generator=generator)
        whole = Batch(number, "", 0.0, 0, count, latents, noise, timesteps, ids)
        half, rank = (count + 1) // 2, accelerator.process_index
        parts.append(whole.part(half * rank, half * rank + half))
    return parts


class World:
    """A step of the smallest networks in this process of two, put back before each try."""

    def __init__(self, optimizer: Any) -> None:
        sharing.MESSAGE = 3000  # elements: many messages
        self.accelerator = Accelerator(cpu=True)
        torch.set_num_threads(1)  # accelerate sets its own number
        config = TrainConfig(phase="both", optimizer=optimizer).resolved()
        self.step = bare_step(config, PLANS["plain"], *make_networks("nano", 600))
        self._start = [p.detach().clone() for p in self.step.parameters]
        self._optimizer = optimizer

    def take(
        self, plan: MemoryPlan, images: Sequence[int], way: Sharing | None = None,
        backend: type[DeviceBackend] = DeviceBackend,
    ) -> list[Tensor]:  # fmt: skip
        """All weights, with loss and norm of each of two steps; the same in both processes."""
        step = self.step
        step.backend = made = backend(self.accelerator, plan)
        made.sharing = way or made.sharing
        with torch.no_grad():
            for parameter, value in zip(step.parameters, self._start, strict=True):
                parameter.copy_(value)
                for state in step.optimizer.state[parameter].values():
                    state.zero_()
        group = step.optimizer.param_groups[0]
        group.update({"d": 1e-6, "k": 0, "numerator_weighted": 0.0} if "d" in group else {})
        found = [x.clone() for _ in range(2) for x in step(drawn(self.accelerator, images), 1e-3)]
        assert not made.sharing._sent
        assert all(p.grad is None for p in step.parameters)
        for value in (*found, *step.parameters):
            others = value.detach().clone()
            distributed.broadcast(others, 0)
            assert torch.equal(others, value)
        return [*found, *(p.detach().clone() for p in step.parameters)]


def compare(way: str, optimizer: str) -> None:
    """In one of two processes: shared during the backward pass and after it."""
    world, plan = World(optimizer), PLANS[way]
    every = len(world.step.parameters)
    for images in BATCHES:
        expected = world.take(plan, images, OneAfterAnother())
        watched = Watched(DeviceBackend(world.accelerator, plan).sharing._send)
        got = world.take(plan, images, watched)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), images
        if way == "sliced":  # while a layer is waited for, the next one's are on their way
            layers = [len(layer.trained) for layer in world.step.layers[::-1] if layer.trained]
            assert watched.meanwhile == 2 * [*layers[1:], 0]
        else:
            assert watched.meanwhile == [0, 0]
            has_samples = any(len(part.timesteps) for part in drawn(world.accelerator, images))
            assert watched.in_backward > 0.9 * every if has_samples else not watched.in_backward


def of_two(target: Any, *args: object, log: Path) -> None:
    for number, process in enumerate(together(2, target, *args, log=log)):
        process.join()
        assert process.exitcode == 0, log.with_suffix(f".{number}").read_text()


@pytest.mark.parametrize(
    "way",
    [
        "cheap",
        "sliced",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "feed-forward")),
    ],
)
def test_sharing_during_the_backward_pass_changes_no_bit(way: str, tmp_path: Path) -> None:
    of_two(compare, way, "lion", log=tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cheap", "sliced"])
def test_with_d_lion_too(way: str, tmp_path: Path) -> None:
    of_two(compare, way, "dlion", log=tmp_path / "log")


class Full(Sharing):
    """Out of memory once, in the second process, when half of the gradients are sent."""

    held = 0  # gradients that were sent when it was full

    def _start(self, message: list[Parameter]) -> None:
        if distributed.get_rank() and not self.held and len(self._sent) > 200:
            self.held = len(self._sent)
            raise torch.OutOfMemoryError("CUDA out of memory")
        super()._start(message)

    def backward(self, loss: Tensor, parameters: Sequence[Parameter], last: bool) -> None:
        assert all(p.grad is None for p in self._sent)  # sums and gradients are not both there
        super().backward(loss, parameters, last)


def run_out(way: str) -> None:
    """What was sent is neither added nor sent again: else the other process would wait for ever."""
    world, plan = World("lion"), PLANS[way]
    images, rank = (4, 3), world.accelerator.process_index
    expected = world.take(plan, images)
    for backend in (Patient, DeviceBackend):
        full = Full(DeviceBackend(world.accelerator, plan).sharing._send)
        got = world.take(plan, images, full, backend)
        assert bool(full.held) == bool(rank)
        if backend is Patient:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        else:
            assert world.step.plan == (plan.tighter() if rank else plan)
            for ours, theirs in zip(got[:2], expected[:2], strict=True):  # loss and norm
                assert torch.allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("way", ["plain", pytest.param("feed-forward", marks=pytest.mark.slow)])
def test_a_pass_that_ran_out_of_memory_is_repeated_and_not_sent_again(
    way: str, tmp_path: Path
) -> None:
    of_two(run_out, way, log=tmp_path / "log")


def test_messages_have_every_parameter_once_and_a_large_one_by_itself() -> None:
    shapes = [(3,), (2**23,), (2**22,), (2**22 - 1,), (1,), (2,)]
    parameters = [Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    found = [[p.numel() for p in part] for part in messages(parameters)]
    assert found == [[3], [2**23], [2**22, 2**22 - 1, 1], [2]]


def test_the_order_of_messages_is_that_of_the_backward_pass() -> None:
    """And it has every trained parameter, whatever is trained."""
    for phase in ("unet", "te", "both"):
        config: Any = TrainConfig(phase=phase).resolved()
        step: Step = bare_step(config, PLANS["plain"], *make_networks("nano", 600))
        assert len(step._last_first) == len(step.parameters)
        assert {*step._last_first} == {*step.parameters}


def layouts() -> None:
    """Gradients keep their parameters' layouts, also in a process that has none."""
    rank = Accelerator(cpu=True).process_index
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    given = {name: Parameter(weight.clone()) for name in ("one", "other", "none")}
    one, other, none = given.values()
    shared = Sharing(lambda flat: distributed.all_reduce(flat, async_op=True))
    for size in (1, 10**6):  # alone and in one message
        sharing.MESSAGE = size
        one.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(rank))
        other.grad = one.grad.to(memory_format=torch.channels_last) if rank else None
        none.grad = None
        expected = [torch.zeros(8, 4, 3, 3) for _ in given]
        for parameter, value in zip(given.values(), expected, strict=True):
            value += 0 if parameter.grad is None else parameter.grad
            distributed.all_reduce(value)
        assert shared.start([one, other, none])
        shared.wait([one, other, none])
        for parameter, value in zip(given.values(), expected, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, value)
            assert parameter.grad.stride() == parameter.stride()


def test_gradients_keep_the_layout_of_their_parameters(tmp_path: Path) -> None:
    of_two(layouts, log=tmp_path / "log")
