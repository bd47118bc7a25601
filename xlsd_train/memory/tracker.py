"""Track what a training step on meta tensors would allocate, compute and move.

Meta tensors have shapes and no data. The real training step runs on them, and the tracker logs what
PyTorch would allocate and free, and the FLOPs and bytes of each kernel. Attention is the CPU's
kernel, which stores what CUDA's memory-efficient one stores.

Two runs with different batches log the same events, and each size is affine in the batch. So the
peak of any batch follows without another run.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

ROUND = 512  # CUDA's caching allocator rounds up to a multiple
# Bytes of cuBLAS workspace with CUBLAS_WORKSPACE_CONFIG=:4096:8, of two handles: autograd's thread
# has its own.
CUBLAS = 2 * 32 * 2**20
WEIGHTS, FROZEN, STATE, GRADIENTS = "weights", "frozen weights", "optimizer", "gradients"
WORKSPACE, ACTIVATIONS = "workspaces", "activations"
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


@dataclass(frozen=True)
class Footprint:
    """The log of one run. Sizes are floats, since those of other batches are interpolated."""

    sign: NDArray[np.int64]  # of each event: storage allocated (1) or freed (-1)
    number: NDArray[np.int64]  # of each event: which storage
    nbytes: NDArray[np.float64]  # of each storage
    labels: tuple[str, ...]  # of each storage
    # Of each kernel: 0 moves memory, 1 multiplies, 2 is torch's attention, 3 its backward pass.
    kind: NDArray[np.int64]
    flop: NDArray[np.float64]
    moved: NDArray[np.float64]  # bytes
    times: NDArray[np.float64]  # how many kernels each stands for
    blocks: NDArray[np.float64]  # of attention's backward kernel with a fixed order; else 0
    cached: NDArray[np.float64]  # 1 if what it moves stays in a large L2 cache; else 0
    update: int  # the first kernel of the optimizer's step
    # Messages to other processes: (kernel, number, bytes) when one is sent; no bytes: when the
    # kernel needs its sums.
    messages: tuple[tuple[int, int, int], ...] = ()

    @property
    def tflop(self) -> float:
        """FLOPs of all kernels, in units of 1e12."""
        return float(np.dot(self.flop, self.times)) / 1e12

    def at(self, batch: float, own: float, other: "Footprint", others: float) -> "Footprint":
        """Interpolate to `batch` samples, from this run of `own` and another run of `others`.

        Raises ValueError if the two runs did not log the same events.
        """
        if not (
            np.array_equal(self.sign, other.sign) and np.array_equal(self.number, other.number)
        ):
            raise ValueError("the footprints are of runs with different events")
        share = (batch - own) / (others - own)

        def line(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
            return mine + share * (theirs - mine)

        return replace(
            self,
            nbytes=line(self.nbytes, other.nbytes),
            flop=line(self.flop, other.flop),
            moved=line(self.moved, other.moved),
            times=line(self.times, other.times),
            blocks=np.rint(line(self.blocks, other.blocks)),
        )

    def peak(self, again: bool = False, unit: int = ROUND) -> dict[str, int]:
        """Bytes by label at the moment of the highest sum, every storage rounded up to `unit`.

        `again`: for a micro-batch after the first, which adds to gradients that exist already.
        """
        sizes = (np.ceil(self.nbytes / unit) * unit).astype(np.int64)
        labels = np.array(self.labels)[self.number]
        change = self.sign * sizes[self.number]
        items = {name: np.cumsum(np.where(labels == name, change, 0)) for name in sorted({*labels})}
        if again and GRADIENTS in items:
            arriving = np.where((labels == GRADIENTS) & (self.sign > 0), change, 0)
            items[GRADIENTS] = arriving.sum() + arriving  # until it is added
        at = int(np.argmax(sum(items.values())))
        return {str(name): int(curve[at]) for name, curve in items.items() if curve[at]}


_OUTPUTS: dict[Any, Any] = {}  # cache of `run`: kernel and input shapes -> output shapes


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Any]) -> Any:
    """A kernel's output. On meta tensors shapes are cached, as torch infers them slowly."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    schema = func._schema
    if not tensors or any(not x.is_meta for x in tensors):
        return func(*args, **kwargs)
    if schema.is_mutable and not schema.returns:
        return None
    if schema.is_mutable or any(x.alias_info is not None for x in schema.returns):
        return func(*args, **kwargs)
    key = func, *kwargs, *map(_shape_of, inputs)
    cached = _OUTPUTS.get(key)
    if cached is not None:
        return tree_map(_empty, cached, is_leaf=lambda x: isinstance(x, _Shape))
    out = func(*args, **kwargs)
    storages = {x.untyped_storage()._cdata for x in tensors}
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not any(x.untyped_storage()._cdata in storages for x in outputs):  # no undeclared view
        _OUTPUTS[key] = tree_map(_shape_of, out)
    return out


class _Shape(NamedTuple):
    """What a meta tensor consists of."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _shape_of(x: Any) -> Any:
    return _Shape(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _empty(x: Any) -> Any:
    return torch.empty_strided(*x[:2], dtype=x.dtype, device="meta") if type(x) is _Shape else x


def _read(args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    """The tensors that a kernel reads: neither `out`, nor what a matmul with beta 0 replaces."""
    given = {name: x for name, x in (kwargs or {}).items() if name != "out"}
    leaves = tree_leaves((args[given.get("beta") == 0 :], given))
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
        self._numbers: dict[int, int] = {}  # storage's address -> its number, while it lives

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
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = len(self.nbytes)
            self.nbytes.append(storage.nbytes())
            self.events.append((1, number))
            weakref.finalize(storage, self._free, address, number).atexit = False
        return number

    def _free(self, address: int, number: int) -> None:
        self.events.append((-1, number))
        del self._numbers[address]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        out = run(func, args, kwargs or {}, leaves)
        packet = func.overloadpacket
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        new = [x for x in outputs if x.untyped_storage()._cdata not in storages]
        for tensor in new:
            self._see(tensor)
        written = new if not func._schema.is_mutable else outputs
        if written and packet.__name__ not in _FREE:  # the rest are views
            moved = sum(x.numel() * x.element_size() for x in (*_read(args, kwargs), *written))
            flop = flop_of(packet, args, kwargs, out)
            kind = _KINDS.get(packet, 1) if flop else 0
            # With a fixed order of sums torch's kernel gives one block to each head of an image.
            blocks = args[0].shape[0] * args[0].shape[1] if packet is _ATTENTION_BACKWARD else 0
            self.kernels.append((kind, flop, moved, self.times, blocks, self.cached))
            if self._workspaces and packet in _CONVOLUTIONS:
                self._workspace(moved * _CONVOLUTIONS[packet])
        return out

    def _workspace(self, nbytes: int) -> None:
        """Log a workspace, allocated and freed within a kernel."""
        number = len(self.nbytes)
        self.nbytes.append(nbytes)
        self.label[number] = WORKSPACE
        self.events += [(1, number), (-1, number)]

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
