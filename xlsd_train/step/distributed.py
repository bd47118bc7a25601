"""The processes of one run: what they agree on, and work that is dealt out among them.

They talk on the CPU (gloo): no card is waited for, and one that is gone is noticed at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from xlsd_cache.errors import UserError

PATIENCE = timedelta(days=1)  # for a process that writes a checkpoint while the others wait
GONE = ("onnection closed", "onnection reset", "roken pipe", "ead peer", "NCCL", "gloo")
Item = TypeVar("Item")


class Lost(UserError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; alone it agrees with itself at once."""

    rank: int = 0
    count: int = 1
    group: Any = None  # of torch.distributed

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        """Those that a launcher began together."""
        if accelerator.num_processes == 1:
            return cls()
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(accelerator.process_index, accelerator.num_processes, group)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether any process has it set. Waits for all of them."""
        if self.count == 1:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.int32)
        with self._heard():
            distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in told.tolist()]

    def wait(self) -> None:
        """Until all processes have come here."""
        self.any(False)

    def deal(
        self, count: int, work: Callable[[int], Item], stopped: Callable[[], bool]
    ) -> list[Item] | None:
        """`work(i)` for each i below `count`, each done by one process, in turn.

        The first process gets all results in order, the others nothing; None for all of them, where
        any was `stopped` before the end.
        """
        mine = {}
        for first in range(0, count, self.count):
            if self.any(stopped())[0]:
                return None
            if (number := first + self.rank) < count:
                mine[number] = work(number)
        found = self._gather(mine)
        return [found[number] for number in sorted(found)]

    def _gather(self, mine: dict[int, Item]) -> dict[int, Item]:
        if self.count == 1:
            return mine
        every: list[Any] | None = [None] * self.count if self.rank == 0 else None
        with self._heard():
            distributed.gather_object(mine, every, group=self.group)
        return {number: item for each in every or [] for number, item in each.items()}

    @contextmanager
    def together(
        self, tensors: Sequence[Tensor], context: AbstractContextManager[Any]
    ) -> Iterator[None]:
        """Within the block all processes have the tensors as `context` sets them in the first."""
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

    def names(self, names: list[str]) -> list[str]:
        """The first process's names."""
        told: list[Any] = [names]
        if self.count > 1:
            with self._heard():
                distributed.broadcast_object_list(told, 0, group=self.group)
        return list(told[0])

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Raises Lost where another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise Lost(str(error)) from error

    def lost(self, error: Exception) -> bool:
        """Whether an error, of sums of gradients also, says that another process is gone."""
        return isinstance(error, Lost) or (
            self.count > 1 and any(word in str(error) for word in GONE)
        )

    def close(self) -> None:
        """Leave the others; afterwards this process is no part of the run."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


ALONE = Processes()
