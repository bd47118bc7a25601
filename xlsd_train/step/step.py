"""One optimizer step: forward, loss, backward, update. What `benchmarks/throughput.py` times.

A batch passes in one of two manners, which the plan names (memory.py chooses it). No sample sees
another in SD1.5, so both give the gradient of the whole batch, but for the order of sums:

- micro-batches pass one after another through all layers, and their gradients add up. What a layer
  keeps for its backward pass is all, or what `cheap` and `feed-forward` in layers.py leave.
- `sliced`: the whole batch passes layer after layer, slice by slice, and only the layers' inputs
  are kept. Backward takes the layers in reverse: it passes a layer's slices again, differentiates
  them, steps that layer's weights and frees their gradients, before it comes to the next.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.runtime.gpu_memory import give_back, is_full
from xlsd_train.data.loader import Batch
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.factory import finish
from xlsd_train.optim.lion import chunks
from xlsd_train.step.layers import (
    EPSILON,
    INPUT_IDS,
    NOISY,
    TIMESTEPS,
    Layer,
    Recompute,
    make_layers,
)
from xlsd_train.step.objective import Objective
from xlsd_train.step.sliced import PartlyDone, SlicedPass

log = logging.getLogger("xlsd.train.step")

Way = Literal["plain", "cheap", "feed-forward", "sliced"]


class Plan(NamedTuple):
    """How a batch passes."""

    way: Way
    micro_batch: int  # samples at once; if sliced, in the widest layers, and more in the others

    @property
    def recompute(self) -> Recompute:
        """What its layers rebuild; a slice's activations live but a moment, so nothing there."""
        return "nothing" if self.way in {"plain", "sliced"} else self.way  # type: ignore[return-value]

    def __str__(self) -> str:
        return f"{self.way} by {self.micro_batch}"

    def tighter(self) -> "Plan | None":
        """The next plan that needs less memory; None when there is none."""
        if self.micro_batch > 1:
            return Plan(self.way, self.micro_batch // 2)
        return None if self.way == "sliced" else Plan("sliced", 1)


@dataclass
class Step:
    """The parts of a step; call it with the batches to accumulate and the learning rate."""

    model: ModelBundle
    parameters: list[Parameter]
    optimizer: torch.optim.Optimizer
    objective: Objective  # on the device
    accelerator: Accelerator
    plan: Plan
    layers: list[Layer] = field(init=False)
    _norms: list[Tensor] = field(default_factory=list, init=False)  # of the gradients so far

    def __post_init__(self) -> None:
        model = self.model
        self.layers = make_layers(model.unet, model.text_encoder, model.encode)

    def __call__(self, batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Update the weights; returns mean loss over all images and gradient norm, on the device.

        Nothing here waits for the device, so a loss that is not finite is the caller's to find.
        Raises an error that `is_full` where memory is full and no plan is tighter, or where it
        was full when some of the update was done: then the weights are good for nothing.
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
                self._tighten(error)
            if loss is None:  # no weight has changed: all of it again
                drop_gradients(self.parameters)
                give_back(self.accelerator.device)
        if loss is None:
            loss = self._sliced(batches, images)
        else:
            self._update(self.parameters)
        self._finish()
        return self._sum(loss), torch.linalg.vector_norm(torch.stack(self._norms))

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss of each of this process's samples, f32 [n]; n may be 0."""
        if not len(batch.timesteps):
            return torch.zeros(0, device=self.accelerator.device)
        size = self.plan.micro_batch  # so that validating needs no more memory than training
        starts = range(0, len(batch.timesteps), size)
        return torch.cat([self._loss(batch.part(a, a + size), "nothing") for a in starts])

    def _mixed(self) -> AbstractContextManager[None]:
        """Where bf16 is asked for, convolutions and matmuls compute in it."""
        mixed: AbstractContextManager[None] = self.accelerator.autocast()
        return mixed

    def _start(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The values that the layers begin with; the target, and each sample's weight."""
        noisy, target, weight = self.objective.corrupt(
            self.model.scaling(batch.latents), batch.noise, batch.timesteps
        )
        values = {NOISY: noisy, TIMESTEPS: batch.timesteps, INPUT_IDS: batch.input_ids}
        return values, target, weight

    def _loss(self, batch: Batch, recompute: Recompute) -> Tensor:
        """Of each sample, in one pass."""
        values, target, weight = self._start(batch)
        return self.objective.loss(self._predict(values, recompute), target, weight)

    def _predict(self, values: dict[str, Tensor], recompute: Recompute) -> Tensor:
        """All layers, one after another; a value goes when the last layer that takes it ran."""
        last_use = {name: layer for layer in self.layers for name in layer.inputs}
        with self._mixed():
            for layer in self.layers:
                values[layer.output] = layer.run(recompute, *[values[x] for x in layer.inputs])
                for name in layer.inputs:
                    if last_use[name] is layer:
                        values.pop(name, None)
        return values[EPSILON]

    def _micro_batched(self, batches: Sequence[Batch], images: int) -> Tensor:
        """This process's part of the loss; leaves the gradient of all weights."""
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            for a in range(0, len(batch.timesteps), self.plan.micro_batch):
                part = batch.part(a, a + self.plan.micro_batch)
                loss = self._loss(part, self.plan.recompute).sum() / images
                total += loss.detach()
                torch.autograd.backward(loss)
        return total

    def _sliced(self, batches: Sequence[Batch], images: int) -> Tensor:
        """This process's part of the loss; every weight is stepped when its layer is done."""
        total = torch.zeros((), device=self.accelerator.device)
        sums: dict[Parameter, Tensor] = {}  # gradients of the batches so far
        for batch in batches:
            values, target, weight = self._start(batch)

            def loss_of(
                out: Tensor, a: int, b: int, target: Tensor = target, weight: Tensor = weight
            ) -> Tensor:
                return self.objective.loss(out, target[a:b], weight[a:b]).sum() / images

            here = len(batch.timesteps) > 0
            passing = SlicedPass(self.layers, values, loss_of, self._each, self._mixed)
            if here:
                passing.forward()
            for layer in reversed(self.layers):
                if here:
                    passing.backward(layer, sums)
                if batch is batches[-1] and layer.trained:
                    for parameter in layer.trained:
                        parameter.grad = sums.pop(parameter, None)
                    self._update(layer.trained)
            total += passing.loss
        return total

    def _each(self, layer: Layer, count: int, work: Callable[[int, int], None]) -> None:
        """Do the work of a layer on slices a:b of `count` samples; a slice that fails is halved."""
        a = 0
        while a < count:
            b = min(count, a + self.plan.micro_batch * layer.room)
            try:
                work(a, b)
            except RuntimeError as error:
                self._tighten(error)
                b = a
            if b == a:  # nothing was done
                give_back(self.accelerator.device)
            a = b

    def _tighten(self, error: RuntimeError) -> None:
        """Go over to a plan that needs less, and say so.

        Raises the error where there is none, or where it is not about memory or comes too late.
        """
        plan = self.plan.tighter()
        stays = self.accelerator.num_processes > 1  # another way sums in other messages
        if isinstance(error, PartlyDone) or not is_full(error):
            raise error
        if plan is None or (plan.way != self.plan.way and stays):
            raise error
        log.info(
            f"out of memory with {self.plan}: it is done again with {plan}, on the same data and "
            f"noise, and so is all that follows"
        )
        self.plan = plan

    def _update(self, parameters: Sequence[Parameter]) -> None:
        """Step these weights, whose gradients are complete, and free those."""
        if self.accelerator.num_processes > 1:
            _share_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._norms += torch._foreach_norm(gradients)  # noqa: SLF001 (it has no public name)
        del gradients
        self.optimizer.step()
        drop_gradients(parameters)

    def _finish(self) -> None:
        finish(self.optimizer)

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(value)
        return value


def drop_gradients(parameters: Sequence[Parameter]) -> None:
    """Free them."""
    for parameter in parameters:
        parameter.grad = None


def _share_gradients(parameters: Sequence[Parameter]) -> None:
    """Sum the processes' gradients, each of which is already divided by all images."""
    for parameter in parameters:
        if parameter.grad is None:  # this process had no sample
            parameter.grad = torch.zeros_like(parameter)
    for chunk in chunks(parameters):
        # One message for many small tensors, whose latency would cost more than their bytes.
        gradients: list[Tensor] = [parameter.grad for parameter in chunk]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        summed = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, summed, strict=True):
            gradient.copy_(part.view_as(gradient))
