"""The processes of one run: agreeing on flags, and sharing out work.

They communicate on the CPU (gloo): no GPU is waited for, and a lost process is noticed at once.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from xlsd_cache.errors import UserError

# One process writes a checkpoint while the others wait. A run ends after this long if a machine is
# missing at its start, or vanishes without a word.
TIMEOUT = timedelta(hours=1)
# Launchers tell a process by these which it is, and how many there are.
_LAUNCHED = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
}  # fmt: skip
LOST_WORDS = ("onnection closed", "onnection reset", "roken pipe", "ead peer", "NCCL", "gloo")
Item = TypeVar("Item")


class Progress(Protocol):
    """Takes the number, from 1, of the item that is begun, of how many, and its part at work."""

    def __call__(self, number: int, of: int, part: str = "") -> None:
        """Tell it."""


def environment_alone() -> dict[str, str]:
    """The environment for a process that takes no part in the training."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHED}


def silent(number: int, of: int, part: str = "") -> None:
    """Progress that nobody is told."""


class Lost(UserError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process and the others of its run; by default it is alone."""

    rank: int = 0
    count: int = 1
    group: Any = None  # of torch.distributed

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        """Those that a launcher started together."""
        if accelerator.num_processes == 1:
            return cls()
        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return cls(accelerator.process_index, accelerator.num_processes, group)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process. Waits for all of them."""
        if self.count == 1:
            return list(flags)
        maxima = torch.tensor(flags, dtype=torch.int32)
        with self._lost_raised():
            distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in maxima.tolist()]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)

    def deal(
        self, count: int, work: Callable[[int], Item], stopped: Callable[[], bool]
    ) -> list[Item] | None:
        """Call `work(i)` for each i below `count`, in one process each, in turn.

        The first process gets all results in order, the others an empty list. All get None if any
        was `stopped` before the end.
        """
        mine = {}
        for first in range(0, count, self.count):
            if self.any(stopped())[0]:
                return None
            if (number := first + self.rank) < count:
                mine[number] = work(number)
        results = self._gather(mine)
        return [results[number] for number in sorted(results)]

    def _gather(self, mine: dict[int, Item]) -> dict[int, Item]:
        if self.count == 1:
            return mine
        every: list[Any] | None = [None] * self.count if self.rank == 0 else None
        with self._lost_raised():
            distributed.gather_object(mine, every, group=self.group)
        return {number: item for each in every or [] for number, item in each.items()}

    @contextmanager
    def together(
        self, tensors: Sequence[Tensor], context: AbstractContextManager[Any]
    ) -> Iterator[None]:
        """Within the block all processes have the values that `context` sets in the first one."""
        if self.count == 1:
            with context:
                yield
            return
        own = [] if self.rank == 0 else [tensor.detach().cpu().clone() for tensor in tensors]
        with context, torch.no_grad():
            try:
                for tensor in tensors:
                    distributed.broadcast(tensor, 0)
                yield
            finally:
                for tensor, value in zip(tensors, own, strict=False):
                    tensor.copy_(value)

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """Raise UserError, in all processes, if any has other facts than the first one."""
        if self.count == 1:
            return
        every: list[Any] = [None] * self.count
        with self._lost_raised():
            distributed.all_gather_object(every, (platform.node(), facts), group=self.group)
        host, first = every[0]
        for rank, (other, its) in enumerate(every):
            for name in first:
                if its[name] != first[name]:
                    raise UserError(
                        f"process {rank} on {other} has {name} {its[name]}, and process 0 on "
                        f"{host} has {name} {first[name]}; {remedy}"
                    )

    def names(self, names: list[str]) -> list[str]:
        """The first process's names."""
        shared: list[Any] = [names]
        if self.count > 1:
            with self._lost_raised():
                distributed.broadcast_object_list(shared, 0, group=self.group)
        return list(shared[0])

    @contextmanager
    def _lost_raised(self) -> Iterator[None]:
        """Raises Lost if another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise Lost(str(error)) from error

    def lost(self, error: Exception) -> bool:
        """Whether an error, also one of summing gradients, means that another process is gone."""
        return isinstance(error, Lost) or (
            self.count > 1 and any(word in str(error) for word in LOST_WORDS)
        )

    def close(self) -> None:
        """Leave the group; afterwards this process is not part of the run."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


ALONE = Processes()
