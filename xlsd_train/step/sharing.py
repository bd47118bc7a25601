"""Sum gradients over the processes of a run while the backward pass goes on.

All processes send the same messages in the same order, also one that has no sample. A message is
sent when the gradients in it are complete and those before it are sent, like the buckets of torch's
DistributedDataParallel.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from xlsd_train.optim.lion import grouped

MESSAGE = 2**23  # elements of a message, 32 MiB in f32; a larger gradient is one by itself


class Sharing:
    """The sums of a step's gradients. A message's memory becomes that of its gradients."""

    def __init__(self, send: Callable[[Tensor], Any] | None = None) -> None:
        """`send` starts to sum a tensor in place over the processes; its result can `wait` for it.

        None: there is only one process.
        """
        self._send = send
        self._sent: dict[Parameter, tuple[Tensor, Any]] = {}  # gradients that are being summed

    def backward(self, loss: Tensor, parameters: Sequence[Parameter], last: bool) -> None:
        """Add to the gradients; in the `last` pass of a step send those that are complete.

        `parameters` are all that are trained, about in the order in which they are reached. If a
        pass ran out of memory, the step's passes are repeated: what was sent before is kept.
        """
        waiting = self._unsent(parameters)
        complete: set[Parameter] = set()

        def note(parameter: Parameter) -> None:
            if parameter in self._sent:  # before the pass was repeated
                parameter.grad = None
                return
            complete.add(parameter)
            while last and waiting and complete.issuperset(waiting[0]):
                self._start(waiting.pop(0))

        hooked: Sequence[Any] = parameters if self._send else ()
        hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in hooked]
        try:
            torch.autograd.backward(loss)
        finally:
            for hook in hooks:
                hook.remove()

    def start(self, parameters: Sequence[Parameter]) -> bool:
        """Send what is not sent yet, zeros where there is no gradient; False with one process."""
        if self._send:
            for message in self._unsent(parameters):
                self._start(message)
        return self._send is not None

    def wait(self, parameters: Sequence[Parameter]) -> None:
        """Wait for the sums of all that was sent. On CUDA only the current stream waits."""
        sums = {p: self._sent.pop(p) for p in parameters if p in self._sent}
        for work in dict.fromkeys(work for _, work in sums.values()):
            work.wait()
        for parameter, (gradient, _) in sums.items():
            parameter.grad = gradient

    def _unsent(self, parameters: Sequence[Parameter]) -> list[list[Parameter]]:
        """The messages of all parameters that are not sent yet: they are the last ones."""
        return list(messages([p for p in parameters if p not in self._sent]))

    def _start(self, message: list[Parameter]) -> None:
        """Move the gradients into one tensor, laid out as their parameters are, and send it."""
        assert self._send
        alone = message[0].grad if len(message) == 1 and message[0].is_contiguous() else None
        if alone is not None and alone.is_contiguous():
            flat, gradients = alone, [alone]
        else:
            sizes = [parameter.numel() for parameter in message]
            flat = message[0].new_empty(sum(sizes))
            parts = zip(message, torch.split(flat, sizes), strict=True)
            gradients = [part.as_strided(p.shape, p.stride()) for p, part in parts]
        for parameter, gradient in zip(message, gradients, strict=True):
            if parameter.grad is None:  # this process had no sample
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = None
        work = self._send(flat)
        for parameter, gradient in zip(message, gradients, strict=True):
            self._sent[parameter] = gradient, work


def messages(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Parameters in order, in lists of up to MESSAGE elements or one larger."""
    return grouped(parameters, MESSAGE)
