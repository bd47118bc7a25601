"""Track what a training step on meta tensors would allocate, compute and move.

Meta tensors have shapes and no data. The real training step runs on them, and the tracker logs what
PyTorch would allocate and free, and the FLOPs and bytes of each kernel. Attention is the CPU's
kernel, which stores what CUDA's memory-efficient one stores.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from xlsd_train.memory.footprint import ACTIVATIONS, WORKSPACE, Footprint

_aten = torch.ops.aten
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _ATTENTION_BACKWARD: _aten._scaled_dot_product_flash_attention_backward,
}
_KINDS = {kernel: 3 if kernel is _ATTENTION_BACKWARD else 2 for kernel in _ATTENTION}
# Workspaces of cuDNN, as a multiple of what a kernel reads and writes. Measured on an H200 for
# SD1.5 at 16 images: forward none; backward by Winograd up to 2.25 of input and output and 4 of the
# weight.
_CONVOLUTIONS = {_aten.convolution: 1, _aten.convolution_backward: 2}
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}

# Torch's formulas for each kernel's FLOPs, and for the CPU's attention, which torch leaves out.
_FLOP = {**flop_registry, **{ours: flop_registry[known] for ours, known in _ATTENTION.items()}}


def flop_of(packet: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """FLOPs of a kernel that ran; 0 for one that does not multiply."""
    count = _FLOP.get(packet)
    return int(count(*args, **(kwargs or {}), out_val=out)) if count else 0


class _Shape(NamedTuple):
    """What a tensor consists of, without data."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Kernel(NamedTuple):
    """What a kernel does with inputs of some shapes."""

    outputs: Any  # shapes; _RUN if it has to run every time
    given: int | None  # which of its arguments it returns, if any
    new: bool  # its outputs have storages of their own
    moved: int  # bytes; 0 if it is no kernel
    flop: int
    kind: int
    blocks: int
    workspace: int  # bytes


_RUN = object()
_KERNELS: dict[Any, _Kernel] = {}  # by function and shapes, since torch infers outputs slowly


def _shape_of(x: Any) -> Any:
    return _Shape(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x


def _empty(x: Any) -> Any:
    if type(x) is not _Shape:
        return x
    return torch.empty_strided(x.size, x.stride, dtype=x.dtype, device=x.device)


def _each(function: Callable[[Any], Any], out: Any) -> Any:
    """Apply a function to each item of what a kernel returns, or to its only item."""
    return type(out)(map(function, out)) if type(out) in {tuple, list} else function(out)


def _leaves(args: Iterable[Any]) -> list[Any]:
    """The arguments; for a list its length and items."""
    leaves: list[Any] = []
    for x in args:
        if isinstance(x, (tuple, list)):
            leaves.append(len(x))
            leaves.extend(x)
        else:
            leaves.append(x)
    return leaves


@cache
def _is_view(func: Any) -> bool:
    """Whether its outputs are parts of its inputs."""
    return not func._schema.is_mutable and any(x.alias_info for x in func._schema.returns)


def _run(func: Any, args: tuple[Any, ...], kwargs: Any, leaves: list[Any]) -> tuple[Any, _Kernel]:
    """Run a kernel. Returns its output, and what it does with all inputs of these shapes."""
    schema, packet, shapes = func._schema, func.overloadpacket, [*map(_shape_of, leaves)]
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    meta = bool(inputs) and all(x.is_meta for x in inputs)
    in_place_only = meta and schema.is_mutable and not schema.returns
    out = None if in_place_only else func(*args, **kwargs)
    storages = {x.untyped_storage()._cdata for x in inputs}
    outputs = [x for x in _leaves([out]) if isinstance(x, Tensor)]
    new = [x for x in outputs if x.untyped_storage()._cdata not in storages]
    cached: Any = _RUN
    if meta and (in_place_only or (new and not schema.is_mutable)):
        cached = _each(_shape_of, out)
    same = (i for i, x in enumerate(leaves) if x is out and _shape_of(x) == shapes[i])
    given = next(same, None) if meta and outputs else None
    written = outputs if schema.is_mutable else new
    moved = flop = 0
    if written and packet.__name__ not in _FREE:
        moved = sum(x.numel() * x.element_size() for x in (*_read(args, kwargs), *written))
        flop = flop_of(packet, args, kwargs, out)
    kind = _KINDS.get(packet, 1) if flop else 0
    # With a fixed order of sums torch's kernel gives one block to each head of an image.
    blocks = args[0].shape[0] * args[0].shape[1] if packet is _ATTENTION_BACKWARD else 0
    workspace = moved * _CONVOLUTIONS.get(packet, 0)
    return out, _Kernel(cached, given, bool(new), moved, flop, kind, blocks, workspace)


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A storage that the tracker has seen, while it lives."""

    __slots__ = ("address", "number")
    address: int
    number: int


def _read(args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    """The tensors that a kernel reads: neither `out`, nor what a matmul with beta 0 replaces."""
    given = {name: x for name, x in (kwargs or {}).items() if name != "out"}
    leaves = _leaves((*args[given.get("beta") == 0 :], *given.values()))
    return [x for x in leaves if isinstance(x, Tensor)]


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Logs storages and kernels within the block; `hold` labels storages that existed before."""

    def __init__(self, workspaces: bool = False) -> None:
        """`workspaces` also counts what CUDA's libraries are known or assumed to allocate."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []  # (+1 or -1, storage number)
        self.nbytes: list[int] = []  # of storages
        self.label: dict[int, str] = {}  # of storages
        # Kind, FLOP, bytes moved, times, blocks, cached.
        self.kernels: list[tuple[int, float, float, float, int, bool]] = []
        self.times = 1.0  # how many kernels each of the next ones stands for
        self.cached = False  # whether the data of the next ones stay in a large L2 cache
        self.update: int | None = None  # the first kernel of the optimizer's step
        self.messages: list[tuple[int, int, int]] = []
        self._workspaces = workspaces
        self._alive: dict[int, _Storage] = {}  # by the storage's address

    def hold(self, tensors: Any, label: str) -> None:
        """Label the storages of these tensors; unseen ones count as allocated now."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.label[self._see(tensor)] = label

    def send(self, nbytes: int) -> "Sent":
        """Log that a message is sent."""
        sent = Sent(self, sum(1 for message in self.messages if message[2]))
        self.messages.append((len(self.kernels), sent.number, nbytes))
        return sent

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        seen = self._alive.get(address)
        if seen is None:
            seen = self._alive[address] = _Storage(storage, self._free)
            seen.address, seen.number = address, len(self.nbytes)
            self.nbytes.append(storage.nbytes())
            self.events.append((1, seen.number))
        return seen.number

    def _free(self, storage: "_Storage") -> None:
        self.events.append((-1, storage.number))
        del self._alive[storage.address]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):
            return func(*args, **kwargs)
        leaves = _leaves((*args, *kwargs.values()))
        key = func, *kwargs, *map(_shape_of, leaves)
        kernel = _KERNELS.get(key)
        if kernel is None:
            out, kernel = _run(func, args, kwargs, leaves)
            _KERNELS[key] = kernel
        elif kernel.given is not None:
            out = leaves[kernel.given]
        elif kernel.outputs is _RUN:
            out = func(*args, **kwargs)
        else:
            out = _each(_empty, kernel.outputs)
        self._allocated(out if kernel.new else (), kernel.workspace if self._workspaces else 0)
        if kernel.moved:
            logged = kernel.kind, kernel.flop, kernel.moved, self.times, kernel.blocks, self.cached
            self.kernels.append(logged)
        return out

    def _allocated(self, out: Any, workspace: int) -> None:
        """Log a kernel's new outputs, and its workspace, which it has together with them."""
        number = len(self.nbytes)
        if workspace:
            self.nbytes.append(workspace)
            self.label[number] = WORKSPACE
            self.events.append((1, number))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if tensor is not None:
                self._see(tensor)
        if workspace:
            self.events.append((-1, number))

    def footprint(self) -> Footprint:
        """The log so far."""
        sign, number = np.array(self.events).T
        kind, flop, moved, times, blocks, cached = np.array(self.kernels).T
        labels = tuple(self.label.get(i, ACTIVATIONS) for i in range(len(self.nbytes)))
        return Footprint(
            sign, number, np.array(self.nbytes, np.float64), labels, kind.astype(np.int64), flop,
            moved, times, blocks, cached, len(self.kernels) if self.update is None else self.update,
            tuple(self.messages),
        )  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A message that was logged."""

    tracker: Tracker
    number: int

    def wait(self) -> None:
        """Log that its sums are needed."""
        self.tracker.messages.append((len(self.tracker.kernels), self.number, 0))
