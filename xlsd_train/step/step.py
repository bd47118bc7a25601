"""One optimizer step: forward, loss, backward, update. `benchmarks/throughput.py` times it.

The memory plan says how a batch passes. No sample sees another in SD1.5, so every way gives the
gradient of the whole batch, up to the order of sums:

- plain, cheap, feed-forward: micro-batches pass one after another through all layers, and their
  gradients add up. A layer keeps all activations for its backward pass, or what `cheap` and
  `feed-forward` in layers.py leave.
- sliced: the whole batch passes layer after layer, slice by slice, and only the layers' inputs are
  kept. The backward pass takes the layers in reverse. It runs a layer's slices again,
  differentiates them, steps that layer's weights and frees their gradients, before the next layer.
  With several processes it is stepped after the next layer's, when its gradients are summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.runtime.gpu_memory import give_back
from xlsd_train.data.loader import Batch
from xlsd_train.model.bundle import Networks
from xlsd_train.step.backend import MemoryPlan, StepBackend, drop_gradients
from xlsd_train.step.blocks import EAGER, MemoryBound, Mode
from xlsd_train.step.layers import INPUT_IDS, NOISY, PREDICTION, TIMESTEPS, Layer, make_layers
from xlsd_train.step.objective import Objective
from xlsd_train.step.sliced import SlicedPass


@dataclass
class Step:
    """A training step; call it with the batches to accumulate and the learning rate."""

    model: Networks
    parameters: list[Parameter]
    optimizer: torch.optim.Optimizer
    objective: Objective  # on the device
    backend: StepBackend
    bound: MemoryBound = EAGER  # computes norms and activation functions
    layers: list[Layer] = field(init=False)
    _last_first: list[Parameter] = field(init=False)  # the parameters as backward reaches them
    _norms: list[Tensor] = field(default_factory=list, init=False)  # of the gradients so far

    def __post_init__(self) -> None:
        model = self.model
        self.layers = make_layers(model.unet, model.text_encoder, model.encode, self.bound)
        self._last_first = [p for layer in self.layers for p in layer.trained][::-1]

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan in use."""
        return self.backend.plan

    @plan.setter
    def plan(self, plan: MemoryPlan) -> None:
        self.backend.plan = plan

    def __call__(self, batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Update the weights; returns mean loss over all images and gradient norm, on the device.

        Nothing here waits for the device, so the caller has to look for a loss that is not finite.
        Raises an error that `is_full` if memory is full and no plan is tighter, or if it was full
        when part of the update was done. Then the weights must not be used.
        """
        images = sum(batch.images for batch in batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._norms.clear()
        loss = None
        while loss is None and self.plan.way != "sliced":
            try:
                loss = self._micro_batched(batches, images)
            except RuntimeError as error:
                self.backend.tighten(error)
            if loss is None:  # no weight has changed: repeat all of it
                drop_gradients(self.parameters)
                give_back(self.backend.device)
        if loss is None:
            loss = self._sliced(batches, images)
        else:
            self.backend.sharing.start(self._last_first)
            self._apply(self.parameters)
        self.backend.finish(self.optimizer)
        return self.backend.reduce(loss), torch.linalg.vector_norm(torch.stack(self._norms))

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss of each of this process's samples, f32 [n]; n may be 0."""
        if not len(batch.timesteps):
            return torch.zeros(0, device=self.backend.device)
        size = self.plan.micro_batch  # so that validating needs no more memory than training
        starts = range(0, len(batch.timesteps), size)
        mode = Mode("nothing", self.plan.attention)
        return torch.cat([self._loss(batch.part(a, a + size), mode) for a in starts])

    def _start(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(values that the layers start with, target, weight of each sample)."""
        noisy, target, weight = self.objective.corrupt(
            self.model.scaling(batch.latents), batch.noise, batch.timesteps
        )
        values = {NOISY: noisy, TIMESTEPS: batch.timesteps, INPUT_IDS: batch.input_ids}
        return values, target, weight

    def _loss(self, batch: Batch, mode: Mode) -> Tensor:
        """The loss of each sample, in one pass."""
        values, target, weight = self._start(batch)
        return self.objective.loss(self._predict(values, mode), target, weight)

    def _predict(self, values: dict[str, Tensor], mode: Mode) -> Tensor:
        """Run all layers in order; a value is freed after the last layer that takes it."""
        last_use = {name: layer for layer in self.layers for name in layer.inputs}
        with self.backend.autocast():
            for layer in self.layers:
                values[layer.output] = layer.run(mode, *[values[x] for x in layer.inputs])
                for name in layer.inputs:
                    if last_use[name] is layer:
                        values.pop(name, None)
        return values[PREDICTION]

    def _micro_batched(self, batches: Sequence[Batch], images: int) -> Tensor:
        """This process's part of the loss; leaves the gradient of all weights."""
        total = torch.zeros((), device=self.backend.device)
        size = self.plan.micro_batch
        parts = [(batch, a) for batch in batches for a in range(0, len(batch.timesteps), size)]
        for n, (batch, a) in enumerate(parts, 1):
            loss = self._loss(batch.part(a, a + size), self.plan.mode).sum() / images
            total += loss.detach()
            self.backend.sharing.backward(loss, self._last_first, last=n == len(parts))
        return total

    def _sliced(self, batches: Sequence[Batch], images: int) -> Tensor:
        """This process's part of the loss; every weight is stepped when its layer is done."""
        total = torch.zeros((), device=self.backend.device)
        sums: dict[Parameter, Tensor] = {}  # gradients of the batches so far
        shared: list[Parameter] = []  # of the layer whose gradients are being summed
        for batch in batches:
            sliced = self._sliced_pass(batch, images)
            has_samples = len(batch.timesteps) > 0
            if has_samples:
                sliced.forward()
            for layer in reversed(self.layers):
                if has_samples:
                    sliced.backward(layer, sums)
                if batch is batches[-1] and layer.trained:
                    for parameter in layer.trained:
                        parameter.grad = sums.pop(parameter, None)
                    complete = layer.trained
                    if self.backend.sharing.start(complete):
                        shared, complete = complete, shared
                    self._apply(complete)
            total += sliced.loss
        self._apply(shared)
        return total

    def _sliced_pass(self, batch: Batch, images: int) -> SlicedPass:
        values, target, weight = self._start(batch)

        def loss_of(prediction: Tensor, a: int, b: int) -> Tensor:
            return self.objective.loss(prediction, target[a:b], weight[a:b]).sum() / images

        return SlicedPass(self.layers, values, loss_of, self.backend)

    def _apply(self, parameters: Sequence[Parameter]) -> None:
        if parameters:
            self._norms += self.backend.apply(self.optimizer, parameters)
