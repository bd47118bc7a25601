"""What graphics cards can do at most, by NVIDIA's data sheets."""

from dataclasses import dataclass

from xlsd_cache import Precision


@dataclass(frozen=True)
class Card:
    """Dense TFLOP/s (bf16 with fp32 accumulation) and memory bandwidth in GB/s."""

    fp32: float
    tf32: float
    bf16: float
    bandwidth: float

    def tflops(self, precision: Precision) -> float:
        """The peak of convolutions and matmuls."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[precision]

    def attention_tflops(self, precision: Precision) -> float:
        """The peak of attention, which splits every fp32 product into three TF32 ones."""
        return self.bf16 if precision == "bf16" else self.tf32 / 3


CARDS = {
    "RTX 3090": Card(35.6, 35.6, 71.0, 936),
    "RTX 4090": Card(82.6, 82.6, 165.2, 1008),
    "A100": Card(19.5, 156.0, 312.0, 1555),  # of 40 GB; that of 80 GB has 2039 GB/s
    "H100": Card(66.9, 494.7, 989.4, 3350),
    "H200": Card(66.9, 494.7, 989.4, 4800),
}


def card_named(name: str) -> Card | None:
    """The card in a device's name as CUDA gives it, say `NVIDIA GeForce RTX 4090`."""
    return next((card for known, card in CARDS.items() if known in name), None)
