"""Device and precision as decisions that are made once, and printed with their reason."""

import os
from typing import Any

import torch

from xlsd_cache import Precision, UserError


def device_of(name: str) -> torch.device:
    """The device called auto, cuda or cpu; of several cards the one that a launcher gave us.

    Raises UserError for a card that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA card; leave it out or use cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def set_precision(precision: Precision) -> str:
    """Set every fp32 switch that torch has, and return the line that says so.

    PyTorch leaves cuDNN's convolutions at TF32 by default, which rounds inputs to 10 bits of
    mantissa in more than half of a UNet's FLOPs. `fp32` turns TF32 off for every kind of kernel;
    `tf32` turns it on for all; `bf16` computes under autocast and keeps what is left in fp32.
    Only the `fp32_precision` switches are touched: torch refuses to mix them with `allow_tf32`.
    """
    mode = "tf32" if precision == "tf32" else "ieee"
    backends: Any = torch.backends  # its type stubs do not know the new switches
    for backend in (
        backends,
        backends.cuda.matmul,
        backends.cudnn,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.rnn,
    ):
        backend.fp32_precision = mode
    return {
        "fp32": "fp32: IEEE single precision in every convolution and matmul, no TF32 anywhere"
        " (CUDA's fp32 memory-efficient attention splits each product into three TF32 ones)",
        "tf32": "tf32: convolutions and matmuls round their inputs to 10 bits of mantissa; on a"
        " 4090 no faster in theory than fp32, on data-centre cards 7-8 times",
        "bf16": "bf16: convolutions and matmuls compute in bfloat16 (8 bits of mantissa) under"
        " autocast; weights, optimizer and sums stay fp32 without TF32",
    }[precision]
