"""Device and precision as decisions that are made once, and printed with their reason."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Precision

ENGINES = "cudnn_engines.json"  # which of cuDNN's are left out


def device_of(name: str) -> torch.device:
    """The device called auto, cuda or cpu; of several cards the one that a launcher gave us.

    Raises UserError for a card that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA card; leave it out or use cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _configure_allocator()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _configure_allocator() -> None:
    """Have torch grow its pieces of a card's memory where that is known, unless the user has a say.

    Buckets have many shapes; in pieces of fixed sizes the memory of one is of little use to the
    next, so it is given back and asked for again, for which the card waits. Read when CUDA starts.
    """
    known = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in known):
        os.environ[known[0]] = "expandable_segments:True"


def _leave_out_engines() -> None:
    """Have cuDNN pass over the engines that want gigabytes, unless the user has a list of his own.

    Where a workspace finds no room PyTorch takes cuDNN's next engine, in silence, and that one
    rounds otherwise: on an H200 a first step under 24 and under 100 GiB gave other momentum. Of
    SD1.5's convolutions at 512x512, 16 images, these three wanted 52, 7.0 and 6.5 GiB. The file is
    of PyTorch's own form, and is read at the first convolution.
    """
    os.environ.setdefault("CUDNN_ERRATA_JSON_FILE", str(Path(__file__).parent / ENGINES))


def set_precision(precision: Precision) -> str:
    """Set every fp32 switch that torch has, and return the line that says so.

    PyTorch leaves cuDNN's convolutions at TF32 by default, which rounds inputs to 10 bits of
    mantissa in more than half of a UNet's FLOPs. `fp32` turns TF32 off for every kind of kernel;
    `tf32` turns it on for all; `bf16` computes under autocast and keeps what is left in fp32.
    Only the `fp32_precision` switches are touched: torch refuses to mix them with `allow_tf32`.
    """
    _leave_out_engines()
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
