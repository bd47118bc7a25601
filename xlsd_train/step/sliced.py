"""The sliced pass: the whole batch goes through one layer after another, slice by slice.

Between layers only their inputs are kept, for the whole batch. Within a layer, activations live for
one slice. The backward pass runs each slice of a layer again and differentiates it. So memory is
almost independent of the batch, at the cost of one more forward pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.runtime.gpu_memory import is_full
from xlsd_train.step.backend import PartlyDone, StepBackend
from xlsd_train.step.layers import Layer


class SliceGradients(NamedTuple):
    """Gradients of one slice of a layer, not yet added to the batch's."""

    a: int
    b: int
    loss: Tensor | None  # of the last layer
    inputs: dict[str, Tensor]
    parameters: dict[Parameter, Tensor]


class SlicedPass:
    """One batch: `forward`, then `backward` for every layer from the last to the first."""

    def __init__(
        self,
        layers: Sequence[Layer],
        values: dict[str, Tensor],
        loss_of: Callable[[Tensor, int, int], Tensor],
        backend: StepBackend,
    ) -> None:
        """`values` are what the layers start with, [B, ...] each.

        `loss_of(prediction, a, b)` is the loss of slice a:b, given the last layer's output for it.
        """
        self._layers, self._values, self._loss_of = layers, values, loss_of
        self._backend = backend
        self._count = len(next(iter(values.values())))
        self._gradients: dict[str, Tensor] = {}  # of values, for the whole batch
        self._first_use: dict[str, Layer] = {}  # in the backward pass it is the last
        self._differentiated: set[str] = set()  # values that a trained weight has an effect on
        for layer in layers:
            for name in layer.inputs:
                self._first_use.setdefault(name, layer)
            if layer.trained or self._differentiated & set(layer.inputs):
                self._differentiated.add(layer.output)
        self.loss = torch.zeros((), device=next(iter(values.values())).device)

    @torch.no_grad()
    def forward(self) -> None:
        """Run all layers but the last, which only `backward` runs."""
        for layer in self._layers[:-1]:
            self._forward(layer)

    def _forward(self, layer: Layer) -> None:
        inputs = [self._values[name] for name in layer.inputs]

        def work(a: int, b: int) -> None:
            with self._backend.autocast():
                part = layer.run(self._backend.plan.mode, *(value[a:b] for value in inputs))
            if b - a == self._count:
                self._values[layer.output] = part
                return
            if layer.output not in self._values:
                self._values[layer.output] = part.new_empty((self._count, *part.shape[1:]))
            self._values[layer.output][a:b] = part

        self._backend.slices(layer, self._count, work)

    def backward(self, layer: Layer, sums: dict[Parameter, Tensor]) -> None:
        """Differentiate a layer; all layers after it must be done.

        Adds the gradients of its trained parameters to `sums`, and keeps those of its inputs for
        the layers before it.
        """
        if layer.output not in self._differentiated:
            return
        wanted = [name for name in layer.inputs if name in self._differentiated]
        first = {name for name in wanted if name not in self._gradients}
        output_gradient = self._gradients.pop(layer.output, None)  # None: the last layer has a loss

        def work(a: int, b: int) -> None:
            gradients = self._differentiate(layer, wanted, output_gradient, a, b)
            self._allocate(gradients, first, layer)
            # From here on no memory is allocated, so that no slice is added twice. But a kernel
            # that is loaded at its first use may need some.
            try:
                self._add(gradients, first, sums)
            except RuntimeError as error:
                if not is_full(error):
                    raise
                raise PartlyDone(str(error)) from error

        self._backend.slices(layer, self._count, work)
        for name in layer.inputs:
            if self._first_use[name] is layer:
                self._values.pop(name, None)

    def _differentiate(
        self, layer: Layer, wanted: list[str], output_gradient: Tensor | None, a: int, b: int
    ) -> SliceGradients:
        """Gradients of the wanted inputs' slices, and what the slice adds to the parameters'."""
        parts = [self._values[name][a:b].detach() for name in layer.inputs]
        leaves = [
            part.requires_grad_()
            for name, part in zip(layer.inputs, parts, strict=True)
            if name in wanted
        ]
        trained = layer.trained
        with torch.enable_grad():
            with self._backend.autocast():
                out = layer.run(self._backend.plan.mode, *parts)
            if output_gradient is None:
                out = self._loss_of(out, a, b)
        to_out = None if output_gradient is None else output_gradient[a:b]
        gradients = torch.autograd.grad(out, [*leaves, *trained], to_out, allow_unused=True)
        to_inputs, to_trained = gradients[: len(wanted)], gradients[len(wanted) :]
        inputs = {k: g for k, g in zip(wanted, to_inputs, strict=True) if g is not None}
        parameters = {k: g for k, g in zip(trained, to_trained, strict=True) if g is not None}
        loss = out.detach() if output_gradient is None else None
        return SliceGradients(a, b, loss, inputs, parameters)

    def _allocate(self, gradients: SliceGradients, first: set[str], layer: Layer) -> None:
        """Allocate all memory that adding a slice needs, changing nothing that a retry reads."""
        for name in (name for name in gradients.inputs if name in first):
            gradient, value = gradients.inputs[name], self._values[name]
            if gradients.b - gradients.a == self._count:
                # One half of a concatenation's gradient would keep the other half alive.
                alone = gradient.untyped_storage().nbytes() == gradient.nbytes
                gradients.inputs[name] = gradient if alone else gradient.clone()
            elif name not in self._gradients:
                # No layer before this one takes the value: its own memory, slice by slice.
                last = self._first_use[name] is layer
                self._gradients[name] = value if last else torch.empty_like(value)

    def _add(
        self, gradients: SliceGradients, first: set[str], sums: dict[Parameter, Tensor]
    ) -> None:
        """Add a slice's loss and gradients to those of other slices and layers."""
        a, b = gradients.a, gradients.b
        for name, gradient in gradients.inputs.items():
            if name not in first:
                self._gradients[name][a:b].add_(gradient)
            elif b - a == self._count:
                self._gradients[name] = gradient
            else:
                self._gradients[name][a:b] = gradient
        for parameter, gradient in gradients.parameters.items():
            if parameter in sums:
                sums[parameter] += gradient
            else:
                sums[parameter] = gradient
        if gradients.loss is not None:
            self.loss += gradients.loss
