"""Peak throughput of GPUs, from NVIDIA's data sheets."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.vocabulary import Precision


@dataclass(frozen=True)
class Card:
    """Dense TFLOP/s (bf16 with fp32 accumulation), bandwidths in GB/s, multiprocessors."""

    fp32: float
    tf32: float
    bf16: float
    bandwidth: float  # of its memory
    processors: int
    # Of copies between pinned CPU memory and the GPU, each way at the same time, as measured in
    # practice: PCIe 3 x16 or 4 x8 about 12, PCIe 4 x16 about 25, PCIe 5 x16 about 50.
    host: float = 25

    def tflops(self, precision: Precision) -> float:
        """Peak of convolutions and matmuls."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[precision]

    def attention_tflops(self, precision: Precision) -> float:
        """Peak of attention, which splits every fp32 product into three TF32 ones."""
        return self.bf16 if precision == "bf16" else self.tf32 / 3

    def busy(self, blocks: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of the processors that kernels with these numbers of blocks use, one block each."""
        waves = blocks / self.processors
        return waves / np.ceil(waves)


CARDS = {
    "RTX 3090": Card(35.6, 35.6, 71.0, 936, 82),
    "RTX 4090": Card(82.6, 82.6, 165.2, 1008, 128),
    "A100": Card(19.5, 156.0, 312.0, 1555, 108),  # of 40 GB; that of 80 GB has 2039 GB/s
    "H100": Card(66.9, 494.7, 989.4, 3350, 132, 50),  # SXM; PCIe and NVL are others
    "H200": Card(66.9, 494.7, 989.4, 4800, 132, 50),
}
# CUDA's full device names: a `4090 D`, a `Laptop GPU` or a `3090 Ti` is another card.
_DEVICES = {
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}
_BANDWIDTH = {"NVIDIA A100-SXM4-80GB": 2039}  # where it differs from CARDS


def known_as(name: str) -> str | None:
    """The name in CARDS of a device such as `NVIDIA GeForce RTX 4090`; None if not in CARDS."""
    return _DEVICES.get(name)


def card_named(name: str) -> Card | None:
    """The card with this device name; None if its peak is not known."""
    known = known_as(name)
    if known is None:
        return None
    return replace(CARDS[known], bandwidth=_BANDWIDTH.get(name, CARDS[known].bandwidth))
