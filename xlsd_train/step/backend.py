"""What a training step runs on: a device and its memory plan.

`Step` and `SlicedPass` use the protocol `StepBackend`. `DeviceBackend` runs on a CPU or a GPU;
`memory/meta_step.py` has the one for meta tensors, which the memory planner runs.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.optim.factory import finish
from xlsd_train.step.blocks import Attention, Mode, Recompute
from xlsd_train.step.layers import Layer
from xlsd_train.step.sharing import Sharing

log = logging.getLogger("xlsd.train.step")

Way = Literal["plain", "cheap", "feed-forward", "sliced"]
Momentum = Literal["resident", "streamed"]
Work = Callable[[int, int], None]  # on the samples a:b of a batch


class PartlyDone(torch.OutOfMemoryError):
    """Memory ran out when some gradients were added or sent: that cannot be repeated."""


class MemoryPlan(NamedTuple):
    """How a batch passes: what is recomputed, and how many samples pass at once.

    Also which kernels compute attention, and where the optimizer's state is kept. Gradients are
    equal up to the order of sums, and for either `momentum` bit for bit.
    """

    way: Way
    micro_batch: int  # samples at once; if sliced, in the widest layers, and more in the others
    attention: Attention = "sdpa"
    momentum: Momentum = "resident"

    @property
    def recompute(self) -> Recompute:
        """What the layers recompute. Nothing if sliced: a slice's activations are short-lived."""
        return "nothing" if self.way in {"plain", "sliced"} else self.way  # type: ignore[return-value]

    @property
    def mode(self) -> Mode:
        """How the layers run."""
        return Mode(self.recompute, self.attention)

    def __str__(self) -> str:
        attention = ", exact attention" if self.attention == "exact" else ""
        momentum = ", streamed momentum" if self.momentum == "streamed" else ""
        return f"{self.way} by {self.micro_batch}{attention}{momentum}"

    def flags(self) -> str:
        """The options that ask for this plan."""
        return (
            f"--memory {self.way} --micro-batch {self.micro_batch} --attention {self.attention} "
            f"--momentum {self.momentum}"
        )

    def tighter(self) -> "MemoryPlan | None":
        """The next plan that needs less memory; None when there is none."""
        if self.micro_batch > 1:
            return self._replace(micro_batch=self.micro_batch // 2)
        return None if self.way == "sliced" else self._replace(way="sliced", micro_batch=1)


class StepBackend(Protocol):
    """What a step needs of where it runs."""

    plan: MemoryPlan  # in use; `tighten` changes it
    sharing: Sharing  # sums gradients over the processes

    @property
    def device(self) -> torch.device:
        """Of the weights and batches."""

    def autocast(self) -> AbstractContextManager[None]:
        """Within the block convolutions and matmuls compute in bf16, with --precision bf16."""

    def slices(self, layer: Layer, count: int, work: Work) -> None:
        """Call `work(a, b)` for slices a:b that cover `count` samples, as large as the plan says.

        A slice that runs out of memory is repeated in smaller ones.
        """

    def tighten(self, error: RuntimeError) -> None:
        """Change to the next plan that needs less memory.

        Raises the error if there is none, if it is not about memory, or if it comes too late.
        """

    def apply(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter]
    ) -> Sequence[Tensor]:
        """Step parameters whose gradients are complete, free the gradients, return their norms."""

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """End the training step, after all parameters were applied."""

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of the processes' values."""


@dataclass
class DeviceBackend:
    """A CPU or a GPU, with the run's other processes."""

    accelerator: Accelerator
    plan: MemoryPlan
    sharing: Sharing = field(init=False)

    def __post_init__(self) -> None:
        self.sharing = Sharing(_send if self._distributed else None)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def _distributed(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

    def autocast(self) -> AbstractContextManager[None]:
        """As the accelerator was set up."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def slices(self, layer: Layer, count: int, work: Work) -> None:
        """Slices of the plan's size, which a layer with small activations multiplies."""
        a = 0
        while a < count:
            b = min(count, a + self.plan.micro_batch * layer.room)
            try:
                work(a, b)
            except RuntimeError as error:
                self.tighten(error)
                b = a
            if b == a:  # nothing was done
                give_back(self.device)
            a = b

    def tighten(self, error: RuntimeError) -> None:
        """Change the plan, and log it."""
        if isinstance(error, PartlyDone) or not is_full(error):
            raise error
        plan = self.plan.tighter()
        # Between processes the other way would sum gradients in other messages.
        if plan is None or (plan.way != self.plan.way and self._distributed):
            raise error
        log.info(
            f"out of memory with memory plan {self.plan}; repeating with {plan} on the same data "
            f"and noise, and using it from now on"
        )
        self.plan = plan

    def apply(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter]
    ) -> Sequence[Tensor]:
        """Wait for the gradients' sums over the processes first."""
        self.sharing.start(parameters)
        self.sharing.wait(parameters)
        return step_parameters(optimizer, parameters)

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """For D-Lion the one wait for the device in a step."""
        finish(optimizer)

    def reduce(self, value: Tensor) -> Tensor:
        """In place."""
        if self._distributed:
            torch.distributed.all_reduce(value)
        return value


def step_parameters(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter]
) -> Sequence[Tensor]:
    """Step, free the gradients, and return the norms that they had, on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms: list[Tensor] = list(torch._foreach_norm(gradients))  # noqa: SLF001 (no public name)
    del gradients
    optimizer.step()
    drop_gradients(parameters)
    return norms


def drop_gradients(parameters: Sequence[Parameter]) -> None:
    """Free them."""
    for parameter in parameters:
        parameter.grad = None


def _send(flat: Tensor) -> torch.distributed.Work:
    """Start to sum gradients, each of which is already divided by all images."""
    try:
        work: torch.distributed.Work = torch.distributed.all_reduce(flat, async_op=True)
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise PartlyDone(str(error)) from error  # the other processes may have got it
    return work
