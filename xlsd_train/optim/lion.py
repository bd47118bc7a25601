"""Lion and D-Lion that can step any parameters at a time.

Equal bit for bit to lion-pytorch 0.2.5 and dadaptation 3.2: the same float operations in the same
order. These are used because they step in parts (the sliced memory plan frees each layer's
gradients in the backward pass), launch one kernel for many tensors (foreach, in chunks, so that
temporaries stay small), and do not sync with the device within a step.
`benchmarks/train/lion.py` measures that.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xlsd_train.optim.pinned import pinned_nbytes
from xlsd_train.optim.streamed import ALIGNED, BUFFERS, State, Streamed, Streams, aligned

D0 = 1e-6  # D-Lion's first d
CHUNK = 2**24  # elements updated at once, 64 MiB in f32; a larger tensor is a chunk by itself


class StreamedNbytes(NamedTuple):
    """Bytes that streamed state takes."""

    device: int  # buffers
    host: int  # pinned memory
    transfer: int  # copied each way in a training step


class _Chunked(torch.optim.Optimizer):
    """Updates parameters chunk by chunk. Their state is on their device, or streamed to it."""

    names: ClassVar[tuple[str, ...]]  # of each parameter's state, like the parameter
    streamed: Streamed | None = None  # what owns the state, if it is in CPU memory

    def stream(self, streams: Streams | None = None) -> None:
        """Keep the state, which is zeros from here on, in CPU memory. For one group."""
        (group,) = self.param_groups
        elements = _buffer_elements(group["params"]) * len(self.names)
        self.streamed = Streamed(group["params"], self.names, elements, streams)
        self.state.update(self.streamed.host)

    def allocate(self, parameter: Tensor) -> State:
        """A parameter's state; zeros if it has none yet."""
        state = self.state[parameter]
        for name in self.names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Wait until `state` may be read and written."""
        if self.streamed:
            self.streamed.settle()

    @classmethod
    def streamed_nbytes(cls, parameters: Sequence[Tensor]) -> StreamedNbytes:
        """Of an optimizer of these parameters."""
        sizes = {f"{i} {x}": p.numel() for i, p in enumerate(parameters) for x in cls.names}
        device = 4 * BUFFERS * len(cls.names) * _buffer_elements(parameters)
        return StreamedNbytes(device, pinned_nbytes(sizes), 4 * sum(sizes.values()))

    def _state_of(self, chunk: list[Tensor]) -> AbstractContextManager[list[State]]:
        """The states of a chunk, to update within the block."""
        if self.streamed:
            return self.streamed.of(chunk)
        return nullcontext([self.allocate(p) for p in chunk])


class Lion(_Chunked):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with decoupled weight decay.

    State of each parameter: `exp_avg`, like it.
    """

    names = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for chunk in chunks(group["params"]):
                gradients = [p.grad for p in chunk]
                with self._state_of(chunk) as states:
                    averages = [x["exp_avg"] for x in states]
                    _decay(chunk, lr * group["weight_decay"])
                    signs = _signs(averages, gradients, beta1)
                    torch._foreach_add_(chunk, signs, alpha=-lr)
                    del signs
                    torch._foreach_mul_(averages, beta2)
                    torch._foreach_add_(averages, gradients, alpha=1 - beta2)


class DLion(_Chunked):
    """Lion that finds its learning rate: D-Adaptation (Defazio and Mishchenko, arXiv 2301.07733).

    The algorithm is that of dadaptation 3.2's DAdaptLion, which no paper describes. `lr * d` is
    Lion's learning rate. d never falls, and is estimated after each training step from the signs
    and their weighted sum s. A training step is any number of `step()` and then `finish()`; it may
    update each parameter once, in any order. State of each parameter: `exp_avg` and `s`, shaped
    like it. State in the one group: `d`, `k`, `numerator_weighted`, and `used_d`, the d of the
    current or last training step.
    """

    names = ("exp_avg", "s")

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        d0: float = D0,
        d_max: float = math.inf,
        d_growth: float = math.inf,
    ) -> None:
        """`d0` is the first d, `d_max` the largest, `d_growth` its largest growth in a step."""
        own = {"d": d0, "k": 0, "numerator_weighted": 0.0, "used_d": d0}
        given = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, given | own)
        self.d_max, self.d_growth = d_max, d_growth
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}  # sign * s, |s|: on the device

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient, with the d of the last finish().

        Raises RuntimeError for a parameter that this training step has updated already.
        """
        (group,) = self.param_groups
        group["used_d"] = group["d"]
        rate, (beta1, beta2) = group["d"] * group["lr"], group["betas"]
        root = beta2**0.5
        for chunk in chunks(group["params"]):
            if not self._sums.keys().isdisjoint(chunk):
                raise RuntimeError("a parameter was stepped twice; call finish() between steps")
            gradients = [p.grad for p in chunk]
            with self._state_of(chunk) as states:
                averages, s = [x["exp_avg"] for x in states], [x["s"] for x in states]
                _decay(chunk, rate * group["weight_decay"])
                signs = _signs(averages, gradients, beta1)
                torch._foreach_add_(chunk, signs, alpha=-rate)
                torch._foreach_mul_(averages, beta2)
                torch._foreach_add_(averages, gradients, alpha=(1 - beta2) * rate)
                pairs = zip(signs, s, strict=True)
                products = [torch.dot(x.flatten(), y.flatten()) for x, y in pairs]
                torch._foreach_mul_(s, root)
                torch._foreach_add_(s, signs, alpha=(1 - root) * rate)
                del signs
                norms = [x.abs().sum() for x in s]
            self._sums.update(zip(chunk, zip(products, norms, strict=True), strict=True))

    def finish(self) -> None:
        """End the training step: compute the next d, from sums in the parameters' order."""
        (group,) = self.param_groups
        taken = [self._sums[p] for p in group["params"] if p in self._sums]
        self._sums.clear()
        if not taken:
            return
        # The only device sync in a training step, and one transfer.
        products, norms = torch.stack([x for pair in taken for x in pair]).view(-1, 2).T.tolist()
        rate, root = group["d"] * group["lr"], group["betas"][1] ** 0.5
        numerator = norm = 0.0
        for product, part in zip(products, norms, strict=True):  # sum() rounds otherwise
            numerator += rate * product
            norm += part
        if norm == 0:  # no gradient yet
            return
        weighted = root * group["numerator_weighted"] + (1 - root) * numerator
        d = group["d"]
        if group["lr"] > 0:
            estimate = max(d, weighted / ((1 - root) * norm))
            d = min(estimate, d * self.d_growth, self.d_max)
        group.update(d=d, k=group["k"] + 1, numerator_weighted=weighted)

    def forget(self) -> None:
        """End a training step on meta tensors, whose sums have no values."""
        self._sums.clear()


def chunks(parameters: Iterable[Tensor]) -> Iterator[list[Any]]:
    """Parameters with a gradient, in order, in lists of up to CHUNK elements or one larger."""
    return grouped((p for p in parameters if p.grad is not None), CHUNK)


def grouped(parameters: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Parameters in order, in lists of up to `most` elements or one larger."""
    group: list[Any] = []
    elements = 0
    for parameter in parameters:
        if group and elements + parameter.numel() > most:
            yield group
            group, elements = [], 0
        group.append(parameter)
        elements += parameter.numel()
    if group:
        yield group


def _buffer_elements(parameters: Sequence[Tensor]) -> int:
    """Room for one state of any chunk of these parameters, each of them aligned."""
    sizes = [aligned(p.numel()) for p in parameters]
    return min(sum(sizes), max(CHUNK, *sizes) + ALIGNED * len(sizes))


def _decay(parameters: list[Tensor], amount: float) -> None:
    if amount:  # times 1 would change no bit
        torch._foreach_mul_(parameters, 1 - amount)


def _signs(averages: list[Tensor], gradients: list[Any], beta1: float) -> list[Tensor]:
    """sign(beta1 m + (1 - beta1) g), new tensors."""
    signs = list(torch._foreach_mul(averages, beta1))  # noqa: SLF001 (it has no public name)
    torch._foreach_add_(signs, gradients, alpha=1 - beta1)
    torch._foreach_sign_(signs)
    return signs
