"""One optimizer step: forward, loss, backward, update. What `benchmarks/throughput.py` times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from xlsd_cache import UserError
from xlsd_train.batches import Batch
from xlsd_train.diffusion import Objective
from xlsd_train.model import Model

MESSAGE = 2**24  # elements that processes exchange at once: 64 MiB


@dataclass(frozen=True)
class Step:
    """The parts of a step; call it with the batches to accumulate and the learning rate."""

    model: Model
    parameters: list[Parameter]
    optimizer: torch.optim.Optimizer
    objective: Objective  # on the device
    accelerator: Accelerator

    def __call__(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """Update the weights; returns the mean loss over all images, and the gradient's norm.

        Raises UserError for a loss that is not finite, before it reaches the weights.
        """
        images = sum(batch.images for batch in batches)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            loss = self.loss(batch).sum() / images
            shared = self._sum(loss.detach().clone())
            if not torch.isfinite(shared):  # waits for the device
                raise UserError(
                    f"the loss of batch {batch.number} is {shared.item()}; the weights are as they "
                    f"were before it: go on from the last checkpoint with a lower --lr"
                )
            total += shared
            if loss.requires_grad:
                self.accelerator.backward(loss)
        self._share_gradients()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item()  # waits for the device

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss of each of this process's samples, f32 [n]; n may be 0."""
        if not len(batch.timesteps):
            return torch.zeros(0, device=self.accelerator.device)
        noisy, target, weight = self.objective.corrupt(
            self.model.scaling(batch.latents), batch.noise, batch.timesteps
        )
        with self.accelerator.autocast():
            states = self.encode(batch.input_ids)
            prediction = self.model.unet(noisy, batch.timesteps, states).sample
        return self.objective.loss(prediction, target, weight)

    def encode(self, input_ids: Tensor) -> Tensor:  # int64 [B, tokens] -> [B, tokens, width]
        """The text encoder's last hidden states; its graph is kept only where it trains."""
        trains = any(p.requires_grad for p in self.model.text_encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            states: Any = self.model.text_encoder(input_ids).last_hidden_state
        assert isinstance(states, Tensor)
        return states

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(value)
        return value

    def _share_gradients(self) -> None:
        """Sum the processes' gradients, each of which is already divided by all images."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # this process had no sample
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for group in _groups(gradients):
            # One message for many small tensors, whose latency would cost more than their bytes.
            flat = torch.cat([gradient.reshape(-1) for gradient in group])
            torch.distributed.all_reduce(flat)
            summed = torch.split(flat, [gradient.numel() for gradient in group])
            for gradient, part in zip(group, summed, strict=True):
                gradient.copy_(part.view_as(gradient))


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of up to MESSAGE elements or one larger tensor."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(map(Tensor.numel, group)) + tensor.numel() > MESSAGE:
            yield group
            group = []
        group.append(tensor)
    yield group
