"""Peak throughput of GPUs, from NVIDIA's data sheets."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from xlsd_cache.vocabulary import Precision

CACHE_MB = 34  # an L2 cache from this size on holds the scores of exact attention
# Rate of attention's backward kernel with a block on each processor, of that with several. On an
# H200 of 132, 32, 48, 88, 128 and 256 blocks took 62, 60, 61, 60 and 76 ms, with any order of sums
# 10, 15, 27, 39 and 77 ms. Assumed of other cards.
ALONE = 0.646
CACHED = 1 / 4  # time of traffic with it against that with memory: on a 4090 3 to 4 TB/s against 1


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

    cache: float = 0  # L2 in MB; 0 if not known
    # Shares of its peak that torch's fp32 attention reaches, forward and backward: an RTX 5060 Ti's
    attention: tuple[float, float] = (0.70, 0.44)

    def tflops(self, precision: Precision) -> float:
        """Peak of convolutions and matmuls."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[precision]

    def attention_tflops(self, precision: Precision) -> tuple[float, float]:
        """Of torch's attention, forward and backward: the peak in bf16, and what fp32 reaches.

        Its fp32 kernel splits every product into three TF32 ones.
        """
        if precision == "bf16":
            return self.bf16, self.bf16
        forward, backward = self.attention
        return forward * self.tf32 / 3, backward * self.tf32 / 3

    def moving(
        self, moved: NDArray[np.float64], cached: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Seconds of kernels that move these bytes, those of exact attention in the L2 cache."""
        share = CACHED if self.cache >= CACHE_MB else 1.0
        return moved * np.where(cached, share, 1.0) / (1e9 * self.bandwidth)

    def busy(self, blocks: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of their peak that kernels with these numbers of blocks reach."""
        return np.minimum(1.0, ALONE * blocks / self.processors)


_HOPPER = (0.15, 0.13)  # measured on an H200 with any order of sums
# Not AMD's MI300X: its TF32 rate was not found, and attention and blocks above are CUDA's.
CARDS = {
    "RTX 3060": Card(12.7, 12.7, 25.5, 360, 28, cache=3),  # 12 GB: 3584 cores at 1.777 GHz
    "RTX 3090": Card(35.6, 35.6, 71.0, 936, 82, cache=6),
    "RTX 4070 Ti SUPER": Card(44.1, 44.1, 88.2, 672, 66, cache=48),  # 8448 cores at 2.61 GHz
    "RTX 4080": Card(48.7, 48.7, 97.5, 717, 76, cache=64),  # Ada white paper
    "RTX 4090": Card(82.6, 82.6, 165.2, 1008, 128, cache=72),
    "RTX 5080": Card(56.3, 56.3, 112.6, 960, 84, 50, 64),  # RTX Blackwell white paper
    "RTX 5090": Card(104.8, 104.8, 209.5, 1792, 170, 50, 96),  # RTX Blackwell white paper
    "RTX 6000 Ada": Card(91.1, 182.0, 364.0, 960, 142, cache=96),  # data sheet
    "L40S": Card(
        91.6, 183.0, 362.0, 864, 142, cache=48
    ),  # data sheet; its cache is also given as 96
    "A100": Card(19.5, 156.0, 312.0, 1555, 108, cache=40),  # of 40 GB; with 80 GB 2039 GB/s
    "H100": Card(66.9, 494.7, 989.4, 3350, 132, 50, 50, _HOPPER),  # SXM; PCIe and NVL are others
    "H200": Card(66.9, 494.7, 989.4, 4800, 132, 50, 50, _HOPPER),
}
# CUDA's full device names: a `4090 D`, a `Laptop GPU` or a `3090 Ti` is another card.
_DEVICES = {
    "NVIDIA GeForce RTX 3060": "RTX 3060",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX 4070 Ti SUPER",
    "NVIDIA GeForce RTX 4080": "RTX 4080",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5080": "RTX 5080",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA L40S": "L40S",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}
_BANDWIDTH = {"NVIDIA A100-SXM4-80GB": 2039}  # where it differs from CARDS
_SHOWN = ("RTX 3090", "RTX 4090", "RTX 5090", "H100")


def shown_cards() -> list[str]:
    """The names in CARDS that tables show: four, and this machine's GPU."""
    here = known_as(device_name()) if torch.cuda.is_available() else None
    return [name for name in CARDS if name in {*_SHOWN, here}]


def device_name(device: torch.device | None = None) -> str:
    """The full name of a GPU. An RTX 3060 with 8 GB, whose memory is slower, gets them added."""
    name = torch.cuda.get_device_name(device)
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{name} 8GB" if name.endswith("RTX 3060") and gib < 10 else name


def known_as(name: str) -> str | None:
    """The name in CARDS of a device such as `NVIDIA GeForce RTX 4090`; None if not in CARDS."""
    return _DEVICES.get(name)


def card_named(name: str) -> Card | None:
    """The card with this device name; None if its peak is not known."""
    known = known_as(name)
    if known is None:
        return None
    return replace(CARDS[known], bandwidth=_BANDWIDTH.get(name, CARDS[known].bandwidth))
