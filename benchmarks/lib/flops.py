"""Counts the FLOPs of a block of code."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from xlsd_train.memory.tracker import flop_of


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Counts the FLOPs of all kernels within the block.

    Torch's FlopCounterMode also hooks modules, which does not work with `autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flop_of(func.overloadpacket, args, kwargs, out)
        return out
