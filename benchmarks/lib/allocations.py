"""What torch's CPU allocator really hands out in a training step: beside it stands a prediction."""

from collections.abc import Sequence

from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from xlsd_train.data.loader import Batch
from xlsd_train.step.step import Step


def peak_of(step: Step, batches: Sequence[Batch]) -> int:
    """Bytes that a step on the CPU holds at its worst; it takes one, at a learning rate of 0.

    The profiler counts from its start, so weights and optimizer state are added; the batches, the
    VAE, and whatever else was there before are not. Libraries' workspaces count where they come
    from torch's allocator, as oneDNN's do.
    """
    there = held(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(batches, 0.0)
    kineto = profiled.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    waiting, events = list(kineto.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            assert event.typed[0] == _EventType.Allocation
            fields = event.typed[1]
            if fields.device.type == "cpu":
                events.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    events.sort(key=lambda event: event[0])
    _, total, size = events[0]
    most: int = max(now for _, now, _ in events) - (total - size)
    return there + most


def held(step: Step) -> int:
    """Bytes of weights, buffers and optimizer state, each storage once."""
    modules = step.model.unet, step.model.text_encoder
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    tensors += [x for s in step.optimizer.state.values() for x in s.values() if _is_tensor(x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)
