"""Recognises out-of-memory errors of CUDA and its libraries, and frees cached memory."""

import gc

import torch

# Only torch's own allocator raises OutOfMemoryError. cuDNN finds no engine whose workspace fits,
# cuBLAS cannot allocate a handle's workspace, a kernel loaded at its first use needs memory of the
# driver (as do expandable segments), and on a CPU the C library reports it.
_MESSAGES = (
    "out of memory",
    "unable to find an engine to execute",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
)


def is_full(error: BaseException) -> bool:
    """Whether an error, of torch or another library, reports that memory is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)


def give_back(device: torch.device) -> None:
    """Free the GPU memory that torch has cached, so that large allocations fit again.

    After an error, call this outside the `except` block: within it, the traceback still holds the
    failed attempt's tensors.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_on(device: torch.device) -> float | None:
    """Bytes of GPU memory that this process may still allocate; None on a CPU."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    own, cached = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
    share: float = torch.cuda.get_per_process_memory_fraction(index)
    return max(0.0, min(free + cached, share * total) - own)
