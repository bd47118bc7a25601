"""The training step on tensors without data: any batch, in seconds and without the memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.tracker import FROZEN, GRADIENTS, STATE, WEIGHTS, Footprint, Tracker
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.model.latent_scaling import LatentScaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.optim.lion import DLion, Lion
from xlsd_train.step import layers
from xlsd_train.step.layers import WHOLE, Layer
from xlsd_train.step.objective import Objective
from xlsd_train.step.sliced import Work
from xlsd_train.step.step import Plan, Step, drop_gradients

Size = tuple[int, int]  # height and width of latents
META = torch.device("meta")  # its tensors have shapes and no data


# What CUDA's autocast does with the functions that the networks call; a CPU's does otherwise, and
# tensors without data get neither. The rest computes in what it is given.
_IN_BF16 = {
    F.conv2d,
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
}
_IN_FP32 = {F.group_norm, F.layer_norm, F.interpolate, F.softmax, torch.softmax, Tensor.softmax}


class AsOnACard(TorchFunctionMode):
    """Has tensors without data computed as a card does it.

    Attention runs its kernel, of which else they get the formula; under autocast, which is the
    CPU's in name and does nothing to them, each function computes in what CUDA's makes of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[Parameter, Tensor] | None = None  # in bf16, kept until autocast ends

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        if torch.is_autocast_enabled("cpu"):
            for functions, dtype in ((_IN_BF16, torch.bfloat16), (_IN_FP32, torch.float32)):
                if func in functions:
                    args, given = tree_map(partial(self._cast, dtype), (args, given))
        if func is F.scaled_dot_product_attention:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
            mask, scale = given.get("attn_mask"), given.get("scale")
            causal = given.get("is_causal", False)
            return kernel(*args[:3], 0.0, causal, attn_mask=mask, scale=scale)[0]
        return func(*args, **given)

    def _cast(self, dtype: torch.dtype, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if self.weights is None or not isinstance(x, Parameter) or not x.requires_grad:
            return x.to(dtype)
        return self.weights.setdefault(x, x.to(dtype))  # nothing passes a weight twice


@contextmanager
def _rebuilding(card: AsOnACard) -> Iterator[None]:
    """Also what is rebuilt in the backward pass, where torch has left all modes."""
    layers.rebuilding = lambda: card
    try:
        yield
    finally:
        layers.rebuilding = nullcontext


class DatalessStep(Step):
    """The step; of a layer's slices it runs two, which stand for all of them."""

    tracker: Tracker
    card: AsOnACard

    @contextmanager
    def _mixed(self) -> Iterator[None]:
        """Autocast; what it made of trained weights lives as long."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.accelerator.mixed):
            self.card.weights = {}
            yield
            self.card.weights = None

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
            model = ModelBundle(
                unet, text_encoder, cast("Any", None), None, {}, "the model", Path(),
                LatentScaling(channels, channels, normalized=False), config.clip_skip,
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
            step.plan, step.tracker, step.card = plan, tracker, AsOnACard()
            with META, step.card, _rebuilding(step.card):
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
