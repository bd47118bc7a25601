"""A whole batch through the layers, one layer after another, each slice by slice.

Between layers only their inputs are kept, for the whole batch; within a layer, activations live for
one slice. Backward passes each slice of a layer again and differentiates it. So memory is almost
independent of the batch, and it costs one more forward pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_train.step.layers import Layer

Work = Callable[[int, int], None]


class PartlyDone(torch.OutOfMemoryError):
    """Memory was full when some of a slice's gradients were added: it cannot be done again."""


class Slice(NamedTuple):
    """What differentiating a slice gave, of which nothing is kept yet."""

    a: int
    b: int
    loss: Tensor | None  # of the last layer
    inner: dict[str, Tensor]  # gradients of the wanted inputs
    outer: dict[Parameter, Tensor]  # and of the layer's parameters


class SlicedPass:
    """One batch on its way: `forward`, then `backward` of every layer from last to first."""

    def __init__(
        self,
        layers: Sequence[Layer],
        values: dict[str, Tensor],
        loss_of: Callable[[Tensor, int, int], Tensor],
        each: Callable[[Layer, int, Work], None],
        mixed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`values` are what the batch begins with, [B, ...] each.

        `loss_of(out, a, b)` is the loss of slice a:b of the last layer's output; `each(layer, B,
        work)` calls work(a, b) over slices, again with a smaller one where it ran out of memory.
        """
        self._layers, self._values, self._loss_of = layers, values, loss_of
        self._each, self._mixed = each, mixed
        self._count = len(next(iter(values.values())))
        self._gradients: dict[str, Tensor] = {}  # of values, for the whole batch
        self._first_use: dict[str, Layer] = {}  # in backward it is the last
        self._differentiated: set[str] = set()  # values on which a trained weight has an effect
        for layer in layers:
            for name in layer.inputs:
                self._first_use.setdefault(name, layer)
            if layer.trained or self._differentiated & set(layer.inputs):
                self._differentiated.add(layer.output)
        self.loss = torch.zeros((), device=next(iter(values.values())).device)

    @torch.no_grad()
    def forward(self) -> None:
        """All layers but the last, which only backward passes."""
        for layer in self._layers[:-1]:
            inputs = [self._values[name] for name in layer.inputs]
            out: list[Tensor] = []

            def work(
                a: int, b: int, layer: Layer = layer, inputs: list[Tensor] = inputs,
                out: list[Tensor] = out,
            ) -> None:  # fmt: skip
                with self._mixed():
                    part = layer.run("nothing", *(value[a:b] for value in inputs))
                if b - a == self._count:
                    out.append(part)
                    return
                if not out:
                    out.append(part.new_empty((self._count, *part.shape[1:])))
                out[0][a:b] = part

            self._each(layer, self._count, work)
            self._values[layer.output] = out.pop()

    def backward(self, layer: Layer, sums: dict[Parameter, Tensor]) -> None:
        """Differentiate a layer, all layers after it being done.

        Adds the gradients of its trained parameters to `sums`; those of its inputs are kept here,
        for the layers before it.
        """
        if layer.output not in self._differentiated:
            return
        wanted = [name for name in layer.inputs if name in self._differentiated]
        fresh = {name for name in wanted if name not in self._gradients}
        given = self._gradients.pop(layer.output, None)  # none of the last layer, which has a loss

        def work(a: int, b: int) -> None:
            found = self._differentiate(layer, wanted, given, a, b)
            self._make_room(found, fresh, layer)
            # From here on no memory is taken, so that no slice is added twice. Yet a kernel that
            # is loaded at its first use may lack some.
            try:
                self._keep(found, fresh, sums)
            except RuntimeError as error:
                if not is_full(error):
                    raise
                raise PartlyDone(str(error)) from error

        self._each(layer, self._count, work)
        for name in layer.inputs:
            if self._first_use[name] is layer:
                self._values.pop(name, None)

    def _differentiate(
        self, layer: Layer, wanted: list[str], given: Tensor | None, a: int, b: int
    ) -> Slice:
        """Gradients of a slice of the wanted inputs, and by it of the layer's parameters."""
        parts = [self._values[name][a:b].detach() for name in layer.inputs]
        leaves = [
            part.requires_grad_()
            for name, part in zip(layer.inputs, parts, strict=True)
            if name in wanted
        ]
        trained = layer.trained
        with torch.enable_grad():
            with self._mixed():
                out = layer.run("nothing", *parts)
            if given is None:
                out = self._loss_of(out, a, b)
        to_out = None if given is None else given[a:b]
        gradients = torch.autograd.grad(out, [*leaves, *trained], to_out, allow_unused=True)
        first, last = gradients[: len(wanted)], gradients[len(wanted) :]
        inner = {k: g for k, g in zip(wanted, first, strict=True) if g is not None}
        outer = {k: g for k, g in zip(trained, last, strict=True) if g is not None}
        return Slice(a, b, out.detach() if given is None else None, inner, outer)

    def _make_room(self, found: Slice, fresh: set[str], layer: Layer) -> None:
        """Take all memory that keeping a slice needs; it changes nothing that another try reads."""
        for name in fresh & found.inner.keys():
            gradient, value = found.inner[name], self._values[name]
            if found.b - found.a == self._count:
                # One half of what a join gives would keep the other half alive.
                alone = gradient.untyped_storage().nbytes() == gradient.nbytes
                found.inner[name] = gradient if alone else gradient.clone()
            elif name not in self._gradients:
                # No layer before this one takes the value: its own memory, slice by slice.
                last = self._first_use[name] is layer
                self._gradients[name] = value if last else torch.empty_like(value)

    def _keep(self, found: Slice, fresh: set[str], sums: dict[Parameter, Tensor]) -> None:
        """Add a slice's loss and gradients to what others have given."""
        a, b = found.a, found.b
        for name, gradient in found.inner.items():
            if name not in fresh:
                self._gradients[name][a:b].add_(gradient)
            elif b - a == self._count:
                self._gradients[name] = gradient
            else:
                self._gradients[name][a:b] = gradient
        for parameter, gradient in found.outer.items():
            if parameter in sums:
                sums[parameter] += gradient
            else:
                sums[parameter] = gradient
        if found.loss is not None:
            self.loss += found.loss
