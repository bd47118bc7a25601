"""The training step on tensors without data: any batch, in seconds and without the memory."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_train.batches import Batch
from xlsd_train.config import TrainConfig
from xlsd_train.diffusion import Objective
from xlsd_train.footprint import FROZEN, GRADIENTS, STATE, WEIGHTS, Footprint, Tracker
from xlsd_train.latents import Scaling
from xlsd_train.layers import WHOLE, Layer
from xlsd_train.lion import DLion, Lion
from xlsd_train.model import Model
from xlsd_train.optim import make_optimizer
from xlsd_train.sliced import Work
from xlsd_train.step import Plan, Step, drop_gradients

Size = tuple[int, int]  # height and width of latents
META = torch.device("meta")  # its tensors have shapes and no data


class _Attention(TorchFunctionMode):
    """Has attention run its kernel on tensors without data, which else get the formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {"is_causal": False, "attn_mask": None, **(kwargs or {})}
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
            mask, scale = given["attn_mask"], given.get("scale")
            return kernel(*args[:3], 0.0, given["is_causal"], attn_mask=mask, scale=scale)[0]
        return func(*args, **(kwargs or {}))


class DatalessStep(Step):
    """The step; of a layer's slices it runs two, which stand for all of them."""

    tracker: Tracker

    def _mixed(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.accelerator.mixed)

    def _each(self, layer: Layer, count: int, work: Work) -> None:
        size = self.plan.micro_batch * layer.room
        for a in range(0, min(count, 2 * size), size):
            self.tracker.times = count / min(count, 2 * size)
            work(a, min(count, a + size))
        self.tracker.times = 1.0

    def _update(self, parameters: Sequence[Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.tracker.hold(gradients, GRADIENTS)
        if self.tracker.update is None:
            self.tracker.update = len(self.tracker.kernels)
        del gradients
        if isinstance(self.optimizer, (Lion, DLion)):
            super()._update(parameters)
        else:  # it reads values, or has no kernel here; it steps in place, after the peak
            self._norms.append(torch.zeros(()))
            drop_gradients(parameters)

    def _finish(self) -> None:
        if isinstance(self.optimizer, DLion):
            self.optimizer.forget()


class Rehearsal:
    """Runs steps of one phase, model, optimizer and precision, and logs what they take.

    `workspaces` are counted for a CUDA card; the CPU's libraries take none from torch.
    """

    def __init__(
        self, config: TrainConfig, unet_config: Any, text_config: Any, workspaces: bool
    ) -> None:
        self._workspaces, self._channels = workspaces, unet_config["in_channels"]
        self._logs: dict[tuple[Plan, int, Size], Footprint] = {}
        with META:
            unet = UNet2DConditionModel.from_config(dict(unet_config))
            text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(text_config)))
            channels = torch.ones(self._channels, 1, 1)
            model = Model(
                unet, text_encoder, cast("Any", None), None, {}, "the model", Path(),
                Scaling(channels, channels, normalized=False), config.clip_skip,
            )  # fmt: skip
            trained = list(model.prepare(config.phase, config.train).values())
            tensors = [x for m in (unet, text_encoder) for x in (*m.parameters(), *m.buffers())]
            alone: Any = SimpleNamespace(
                device=META, num_processes=1, mixed=config.precision == "bf16"
            )
            optimizer, table = make_optimizer(config, trained), torch.ones(1000)
            objective = Objective(config.objective or "eps", table, table, table, 0, {})
            self._step = DatalessStep(model, trained, optimizer, objective, alone, Plan("plain", 1))
        self._frozen = [x for x in tensors if not x.requires_grad]
        self._tokens = text_encoder.config.max_position_embeddings

    @property
    def two_slices(self) -> int:
        """From so many times a slice on, every layer has two whole ones, or takes all at once."""
        return 2 * max(layer.room for layer in self._step.layers if layer.room < WHOLE)

    @property
    def gradients_nbytes(self) -> int:
        """Of all trained weights."""
        return sum(p.numel() * p.element_size() for p in self._step.parameters)

    def __call__(self, plan: Plan, batch: int, size: Size) -> Footprint:
        """The footprint of one step of `batch` samples in one pass.

        It is interpolated between two runs, where that is exact: where both do the same with
        tensors of other sizes.
        """
        if plan.way == "sliced":
            slices = self.two_slices * plan.micro_batch
            runs = (plan, slices), (plan, slices + slices // 2)
        else:
            runs = (Plan(plan.way, 2), 2), (Plan(plan.way, 3), 3)
        if batch < runs[0][1]:
            return self._log(plan, batch, size)
        first, second = (self._log(*run, size) for run in runs)
        return first.at(batch, runs[0][1], second, runs[1][1])

    def _log(self, plan: Plan, batch: int, size: Size) -> Footprint:
        key = plan, batch, size
        if key not in self._logs:
            step, tracker = self._step, Tracker(self._workspaces)
            step.plan, step.tracker = plan, tracker
            with META, _Attention():
                tracker.hold(step.parameters, WEIGHTS)
                tracker.hold(self._frozen, FROZEN)
                tracker.hold(list(step.optimizer.state.values()), STATE)
                latents = torch.empty(batch, self._channels, *size)
                ids = torch.empty(batch, self._tokens, dtype=torch.int64)
                given = latents, torch.empty_like(latents), ids[:, 0].clone(), ids
                tracker.hold(given, "batch")
                with tracker:
                    step([Batch(0, "", 0.0, 0, batch, *given)], 0.0)
            self._logs[key] = tracker.footprint()
        return self._logs[key]
