"""Measure the memory that torch's CPU allocator hands out in a training step."""

from collections.abc import Sequence

from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from xlsd_train.data.loader import Batch
from xlsd_train.step.step import Step


def peak_of(step: Step, batches: Sequence[Batch]) -> int:
    """The peak bytes of a step on the CPU; runs one step with a learning rate of 0.

    The profiler counts from its start, so weights and optimizer state are added. Batches, the VAE
    and earlier allocations are not counted. Workspaces of libraries are counted if they come from
    torch's allocator, as oneDNN's do.
    """
    resident = held(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batches, 0.0)
    kineto = profiled.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    pending, events = list(kineto.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            assert event.typed[0] == _EventType.Allocation
            fields = event.typed[1]
            if fields.device.type == "cpu":
                events.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    events.sort(key=lambda event: event[0])
    _, total, size = events[0]
    most: int = max(now for _, now, _ in events) - (total - size)
    return resident + most


def held(step: Step) -> int:
    """Bytes of weights, buffers and optimizer state, counting each storage once.

    Streamed state counts too, as here all memory is the CPU's.
    """
    modules = step.model.unet, step.model.text_encoder
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    tensors += [x for s in step.optimizer.state.values() for x in s.values() if _is_tensor(x)]
    if streamed := getattr(step.optimizer, "streamed", None):
        tensors.append(streamed.buffers)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)
