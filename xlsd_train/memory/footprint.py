"""What a training step allocates, computes and moves, as a log of events.

Two runs with different batches log the same events, and each size is affine in the batch. So the
peak of any batch follows without another run.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

ROUND = 512  # CUDA's caching allocator rounds up to a multiple
# Bytes of cuBLAS workspace with CUBLAS_WORKSPACE_CONFIG=:4096:8, of two handles: autograd's thread
# has its own.
CUBLAS = 2 * 32 * 2**20
WEIGHTS, FROZEN, STATE, GRADIENTS = "weights", "frozen weights", "optimizer", "gradients"
WORKSPACE, ACTIVATIONS = "workspaces", "activations"


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
