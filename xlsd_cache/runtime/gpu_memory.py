"""When a card's memory is full, in all the words that CUDA and its libraries have for it."""

import gc

import torch

# Only torch's own allocator raises OutOfMemoryError. cuDNN's engines find no room for a workspace
# one after another, until none is left; cuBLAS has none for a handle's; a kernel that is loaded at
# its first use needs memory of the driver (and so do expandable segments); on a CPU the C library
# has the last word.
_WORDS = (
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
    """Whether an error says that memory is full, whoever raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and any(word in told for word in _WORDS)


def give_back(device: torch.device) -> None:
    """Return what nobody uses to a card, so that what comes next finds it in one piece.

    After an error this must be outside its `except`: within it, the failed try is still held.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def most_on(device: torch.device) -> float:
    """Bytes that this process may take of a card, whoever else is on it: the same in every run."""
    index = torch.cuda.current_device() if device.index is None else device.index
    share: float = torch.cuda.get_per_process_memory_fraction(index)
    return share * torch.cuda.get_device_properties(index).total_memory
