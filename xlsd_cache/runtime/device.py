"""Chooses the device, and sets torch's fp32 precision everywhere at once."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Precision

ENGINES = "cudnn_engines.json"  # the engines of cuDNN that are left out


def device_of(name: str) -> torch.device:
    """The device for auto, cuda or cpu; with several GPUs, the one that the launcher assigned.

    Raises UserError for cuda without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA GPU; leave it out or use cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _configure_allocator()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _configure_allocator() -> None:
    """Use expandable segments of GPU memory on Linux, unless the user configures the allocator.

    Buckets have many shapes. With segments of fixed size the memory of one shape rarely fits the
    next, and is freed and allocated again, which stalls the GPU. Read when CUDA starts.
    """
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in variables):
        os.environ[variables[0]] = "expandable_segments:True"


def _leave_out_engines() -> None:
    """Exclude cuDNN's engines that need gigabytes of workspace, unless the user has a list.

    If a workspace does not fit, PyTorch silently takes cuDNN's next engine, which rounds
    differently: on an H200, a first step with 24 and with 100 GiB gave different momentum. For
    SD1.5's convolutions at 512x512 with 16 images, these three needed 52, 7.0 and 6.5 GiB. The file
    has PyTorch's own format and is read at the first convolution.
    """
    os.environ.setdefault("CUDNN_ERRATA_JSON_FILE", str(Path(__file__).parent / ENGINES))


def set_precision(precision: Precision) -> str:
    """Set every fp32 switch of torch, and return `describe_precision`.

    By default PyTorch uses TF32 for cuDNN's convolutions, more than half of a UNet's FLOPs, which
    rounds inputs to 10 bits of mantissa. `fp32` turns TF32 off for every kind of kernel, `tf32`
    turns it on for all, `bf16` uses autocast and keeps the rest in fp32. Only the `fp32_precision`
    switches are set: torch refuses to mix them with `allow_tf32`.
    """
    _leave_out_engines()
    mode = "tf32" if precision == "tf32" else "ieee"
    backends: Any = torch.backends  # its type stubs lack the new switches
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
    return describe_precision(precision)


def describe_precision(precision: Precision, exact_attention: bool = False) -> str:
    """The text that runs and benchmarks record.

    With `exact_attention` training and validation compute attention by matmuls, while sample images
    are drawn with torch's own kernel.
    """
    products = "splits each product into three TF32 ones"
    note = f"CUDA's fp32 memory-efficient attention {products}"
    if exact_attention:
        note = f"exact attention; only sample images use CUDA's fp32 kernel, which {products}"
    return {
        "fp32": "fp32: IEEE single precision in every convolution and matmul, no TF32 anywhere"
        f" ({note})",
        "tf32": "tf32: convolutions and matmuls round their inputs to 10 bits of mantissa; on a"
        " 4090 no faster in theory than fp32, on data-centre cards 7-8 times",
        "bf16": "bf16: convolutions and matmuls compute in bfloat16 (8 bits of mantissa) under"
        " autocast; weights, optimizer and sums stay fp32 without TF32",
    }[precision]


def deterministic(on: bool) -> None:
    """Use the same CUDA kernels in every run, and only those that sum in a fixed order.

    Otherwise cuDNN times its kernels for every shape and uses the fastest.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on  # it may choose another kernel in each run
