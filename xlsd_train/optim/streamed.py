"""The state of Lion and D-Lion in CPU memory, copied to the GPU around each use.

Weights are updated chunk by chunk. A chunk's state is fetched into one of three buffers on the GPU
ahead of its use, as chunks followed each other before, and copied back after the update. Both
copies run during the kernels of the step; PCIe carries the two ways at once.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xlsd_train.optim.pinned import pinned

BUFFERS = 3  # one being filled, one in use, one being copied back
# Elements. CUDA's allocator starts tensors at multiples of 512 bytes, and the order in which its
# kernels sum depends on where a tensor starts.
ALIGNED = 128
State = dict[str, Tensor]


class Streams:
    """The order of a device's work. On a CPU all of it is done when a call returns.

    Kernels run one after another, and so do the copies each way. Events order the three.
    """

    def mark(self) -> Any:
        """An event: all kernels so far are done."""

    def copy(
        self,
        way: str,  # noqa: ARG002 (a CPU's work is in order)
        pairs: Sequence[tuple[Tensor, Tensor]],
        after: Iterable[Any],  # noqa: ARG002
    ) -> Any:
        """Copy to each first tensor from the second, `way` "in" or "out", after some events.

        Returns the event that it is done.
        """
        for target, source in pairs:
            target.copy_(source)

    def hold(self, event: Any) -> None:
        """Kernels from now on run after the event."""

    def finish(self) -> None:
        """Wait until all copies are done."""


class CudaStreams(Streams):
    """Of a GPU. The host waits only in `finish`."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._device, self._ways = device, {way: cuda.Stream(device) for way in ("in", "out")}

    def mark(self) -> Any:
        """Recorded in the stream of the step."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, way: str, pairs: Sequence[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
        """In the way's own stream."""
        stream = self._ways[way]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def hold(self, event: Any) -> None:
        """The stream of the step waits."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """A device sync, where a checkpoint is written or read."""
        for stream in self._ways.values():
            stream.synchronize()


@dataclass
class _Buffer:
    memory: Tensor  # f32, flat
    free: Any  # event: what it held was copied back
    filled: Any = None  # event: it holds a chunk's state
    states: dict[Tensor, State] = field(default_factory=dict)  # views, by parameter


class Streamed:
    """Owns the state: `host` has each parameter's tensors, to be read or written after `settle`."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        elements: int,
        streams: Streams | None = None,
    ) -> None:
        """State of these names, zeros. A buffer has room for chunks of up to `elements` of it."""
        device, gpu = parameters[0].device, parameters[0].is_cuda
        self._streams = streams or (CudaStreams(device) if gpu else Streams())
        keys = [(p, name, f"{i}/{name}") for i, p in enumerate(parameters) for name in names]
        memory = pinned({key: p for p, _, key in keys}, pin=gpu)
        self.host: dict[Tensor, State] = {p: {} for p in parameters}
        for p, name, key in keys:
            self.host[p][name] = memory[key].zero_()
        self.buffers = torch.empty(BUFFERS, elements, device=device)
        now = self._streams.mark()  # kernels may still use what was at these addresses before
        self._free = deque(_Buffer(buffer, now) for buffer in self.buffers)
        self._ahead: dict[frozenset[Tensor], _Buffer] = {}  # filled and not used yet
        self._stored: dict[Tensor, Any] = {}  # parameter -> event: its state is on the host
        self._next: dict[frozenset[Tensor], Sequence[Tensor]] = {}  # chunk -> the one used after it
        self._last: frozenset[Tensor] = frozenset()

    @contextmanager
    def of(self, chunk: Sequence[Tensor]) -> Iterator[list[State]]:
        """The states of a chunk's parameters on the device, to update within the block."""
        key = frozenset(chunk)
        self._drop([x for x in self._ahead if x != key and x & key])  # they will be out of date
        buffer = self._ahead.pop(key, None) or self._fetch(chunk)
        self._streams.hold(buffer.filled)
        try:
            yield [buffer.states[p] for p in chunk]
        finally:
            self._store(buffer)
            self._next[self._last], self._last = chunk, key
            self._fetch_ahead()

    def settle(self) -> None:
        """Wait until `host` has all updates, and forget what was fetched ahead."""
        self._streams.finish()
        self._drop(list(self._ahead))

    def _fetch(self, chunk: Sequence[Tensor]) -> _Buffer:
        if not self._free:  # the chunks come in another order than before
            self._drop(list(self._ahead))
        buffer, start = self._free.popleft(), 0
        buffer.states = {p: {} for p in chunk}
        for p in chunk:
            for name, value in self.host[p].items():
                view = buffer.memory[start:].as_strided(value.shape, value.stride())
                buffer.states[p][name] = view
                start += aligned(value.numel())
        after = dict.fromkeys([buffer.free, *(self._stored[p] for p in chunk if p in self._stored)])
        pairs = [(view, host) for host, view in self._pairs(buffer)]
        buffer.filled = self._streams.copy("in", pairs, after)
        return buffer

    def _store(self, buffer: _Buffer) -> None:
        buffer.free = self._streams.copy("out", self._pairs(buffer), [self._streams.mark()])
        self._stored.update(dict.fromkeys(buffer.states, buffer.free))
        self._free.append(buffer)

    def _fetch_ahead(self) -> None:
        """Fill the free buffers with the chunks that were used next before."""
        key = self._last
        for _ in range(BUFFERS):
            if not self._free or key not in self._next:
                return
            chunk = self._next[key]
            key = frozenset(chunk)
            if key not in self._ahead:
                self._ahead[key] = self._fetch(chunk)

    def _pairs(self, buffer: _Buffer) -> list[tuple[Tensor, Tensor]]:
        """(on the host, on the device) of all that a buffer holds."""
        held = buffer.states.items()
        return [(self.host[p][name], view) for p, state in held for name, view in state.items()]

    def _drop(self, keys: Sequence[frozenset[Tensor]]) -> None:
        self._free.extend(self._ahead.pop(key) for key in keys)


def aligned(elements: int) -> int:
    """Rounded up to where a tensor may start."""
    return -(-elements // ALIGNED) * ALIGNED
