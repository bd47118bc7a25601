"""Run the training step on meta tensors: any batch, in seconds and without its memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_cache.console.progress import progress_bar
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.footprint import FROZEN, GRADIENTS, STATE, WEIGHTS, Footprint
from xlsd_train.memory.tracker import Tracker
from xlsd_train.model.bundle import Networks
from xlsd_train.model.latent_scaling import LatentScaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.optim.lion import DLion, Lion, StreamedNbytes
from xlsd_train.step import attention, blocks
from xlsd_train.step.attention import Block
from xlsd_train.step.backend import MemoryPlan, Work, drop_gradients, step_parameters
from xlsd_train.step.layers import WHOLE, Layer
from xlsd_train.step.objective import Objective
from xlsd_train.step.sharing import Sharing
from xlsd_train.step.step import Step

Size = tuple[int, int]  # height and width of latents
META = torch.device("meta")  # its tensors have shapes and no data

# What CUDA's autocast does with the functions that the networks call. A CPU's does otherwise, and
# meta tensors get neither. Other functions compute in the dtype of their inputs.
_IN_BF16 = {
    F.conv2d,
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
}
_IN_FP32 = {F.group_norm, F.layer_norm, F.interpolate, F.softmax, torch.softmax, Tensor.softmax}
_CASTS = dict.fromkeys(_IN_BF16, torch.bfloat16) | dict.fromkeys(_IN_FP32, torch.float32)


class CudaMode(TorchFunctionMode):
    """Makes meta tensors call the kernels, in the dtypes, that CUDA tensors would.

    Attention calls the fused kernel, instead of the formula that meta tensors get otherwise. Under
    autocast, which for them is the CPU's and does nothing, functions cast as CUDA's autocast does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[Parameter, Tensor] | None = None  # in bf16, until autocast ends

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        dtype = _CASTS.get(func)
        if dtype and torch.is_autocast_enabled("cpu"):
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
        return self.weights.setdefault(x, x.to(dtype))  # nothing casts a weight twice


@contextmanager
def _recomputing(mode: CudaMode) -> Iterator[None]:
    """Apply the mode to recomputation in the backward pass too, where torch leaves all modes."""
    blocks.checkpoint_options["context_fn"] = lambda: (nullcontext(), mode)
    try:
        yield
    finally:
        blocks.checkpoint_options.clear()


class MetaSharing(Sharing):
    """Logs when each message is sent and needed. Its kernels run once a step, not in each pass."""

    tracker: Tracker

    def __init__(self) -> None:
        super().__init__(lambda flat: self.tracker.send(flat.nbytes))

    def _start(self, message: list[Parameter]) -> None:
        self.tracker.times = 0.0
        super()._start(message)
        self.tracker.times = 1.0


@contextmanager
def _one_block(tracker: Tracker) -> Iterator[None]:
    """Let the first block of each exact attention stand for all of its rows."""

    def first(blocks: Sequence[Block]) -> Iterator[Block]:
        before, rows = tracker.times, [block.b - block.a for block in blocks]
        tracker.times, tracker.cached = before * sum(rows) / rows[0], True
        yield blocks[0]
        tracker.times, tracker.cached = before, False

    attention.each_block = first
    try:
        yield
    finally:
        attention.each_block = iter


class MetaBackend:
    """Runs a step on meta tensors and tracks it. Two slices of a layer stand for all of them."""

    device = META

    def __init__(self, bf16: bool, alone: bool = True) -> None:
        self.plan, self._bf16 = MemoryPlan("plain", 1), bf16
        self.tracker, self.mode = Tracker(), CudaMode()
        self.sharing = Sharing() if alone else MetaSharing()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast; what it casts trained weights to lives as long."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            self.mode.weights = {}
            yield
            self.mode.weights = None

    def slices(self, layer: Layer, count: int, work: Work) -> None:
        """The first two slices; each of their kernels counts for those of the others too."""
        size = self.plan.micro_batch * layer.room
        for a in range(0, min(count, 2 * size), size):
            self.tracker.times = count / min(count, 2 * size)
            work(a, min(count, a + size))
        self.tracker.times = 1.0

    def tighten(self, error: RuntimeError) -> None:
        """Raise the error: no memory is used that could run out."""
        raise error

    def apply(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter]
    ) -> Sequence[Tensor]:
        """Label the gradients, and step those optimizers that run on meta tensors.

        AdamW has no kernel for them. It steps in place, after the peak.
        """
        self.sharing.start(parameters)
        self.sharing.wait(parameters)
        self.tracker.hold([p.grad for p in parameters if p.grad is not None], GRADIENTS)
        if self.tracker.update is None:
            self.tracker.update = len(self.tracker.kernels)
        if isinstance(optimizer, (Lion, DLion)):
            return step_parameters(optimizer, parameters)
        drop_gradients(parameters)
        return [torch.zeros((), device=META)]

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        """D-Lion's sums have no values here."""
        if isinstance(optimizer, DLion):
            optimizer.forget()

    def reduce(self, value: Tensor) -> Tensor:
        """One process."""
        return value


def random_networks(
    config: TrainConfig, unet_config: Any, text_config: Any
) -> tuple[Networks, list[Parameter], Objective]:
    """Untrained networks of these configs on torch's default device, what trains, an objective."""
    unet = UNet2DConditionModel.from_config(dict(unet_config))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(text_config)))
    channels, table = torch.ones(unet_config["in_channels"], 1, 1), torch.ones(1000)
    model = Networks(
        unet=unet, text_encoder=text_encoder, source="the model",
        scaling=LatentScaling(channels, channels, normalized=False), clip_skip=config.clip_skip,
    )  # fmt: skip
    trained = list(model.prepare(config.phase, config.train).values())
    return model, trained, Objective(config.objective or "eps", table, table, table, 0, {})


class MetaStep:
    """Runs training steps of one config on meta tensors, and returns their footprints.

    `workspaces` counts those of CUDA's libraries; the CPU's take none from torch. `alone`: there
    are no other processes to share gradients with. On a terminal each run is shown.
    """

    def __init__(
        self, config: TrainConfig, unet_config: Any, text_config: Any, workspaces: bool,
        alone: bool = True, progress: bool = True,
    ) -> None:  # fmt: skip
        self._progress = progress
        self._workspaces, self._channels = workspaces, unet_config["in_channels"]
        self._logs: dict[tuple[MemoryPlan, int, Size], Footprint] = {}
        with META:
            model, trained, objective = random_networks(config, unet_config, text_config)
            tensors = [
                x for m in (model.unet, model.text_encoder) for x in (*m.parameters(), *m.buffers())
            ]
            optimizer = make_optimizer(config, trained)
            self._backend = MetaBackend(config.precision == "bf16", alone)
            self._step = Step(model, trained, optimizer, objective, self._backend)
        self._frozen = [x for x in tensors if not x.requires_grad]
        self._tokens = model.text_encoder.config.max_position_embeddings

    @property
    def two_slices(self) -> int:
        """Batch, in micro-batches, from which on each layer has two whole slices or one for all."""
        return 2 * max(layer.room for layer in self._step.layers if layer.room < WHOLE)

    @property
    def gradients_nbytes(self) -> int:
        """Bytes of the gradients of all trained weights."""
        return sum(p.numel() * p.element_size() for p in self._step.parameters)

    @property
    def streamed_nbytes(self) -> StreamedNbytes:
        """Of the optimizer's state."""
        optimizer = self._step.optimizer
        assert isinstance(optimizer, (Lion, DLion))
        return optimizer.streamed_nbytes(self._step.parameters)

    def __call__(self, plan: MemoryPlan, batch: int, size: Size) -> Footprint:
        """The footprint of one step of `batch` samples in one pass.

        Interpolated between two runs where that is exact: where both run the same kernels on
        tensors of other sizes. The optimizer's state is resident.
        """
        plan = plan._replace(momentum="resident")
        if plan.way == "sliced":
            slices = self.two_slices * plan.micro_batch
            runs = (plan, slices), (plan, slices + slices // 2)
        else:
            two, three = (MemoryPlan(plan.way, n, plan.attention) for n in (2, 3))
            runs = (two, 2), (three, 3)
        if batch < runs[0][1]:
            return self._log(plan, batch, size)
        first, second = (self._log(*run, size) for run in runs)
        return first.at(batch, runs[0][1], second, runs[1][1])

    def _log(self, plan: MemoryPlan, batch: int, size: Size) -> Footprint:
        key = plan, batch, size
        if key not in self._logs:
            step, tracker, mode = self._step, Tracker(self._workspaces), CudaMode()
            self._backend.plan, self._backend.tracker, self._backend.mode = plan, tracker, mode
            if isinstance(self._backend.sharing, MetaSharing):
                self._backend.sharing.tracker = tracker
            said = f"memory plan: running step {len(self._logs) + 1} on meta tensors, {plan}"
            hidden = None if self._progress else True  # None: unless stderr is a terminal
            shown = progress_bar(desc=said, bar_format="{desc}", leave=False, disable=hidden)
            with shown, mode, _recomputing(mode), _one_block(tracker):
                tracker.hold(step.parameters, WEIGHTS)
                tracker.hold(self._frozen, FROZEN)
                tracker.hold(list(step.optimizer.state.values()), STATE)
                latents = torch.empty(batch, self._channels, *size, device=META)
                ids = torch.empty(batch, self._tokens, dtype=torch.int64, device=META)
                inputs = latents, torch.empty_like(latents), ids[:, 0].clone(), ids
                tracker.hold(inputs, "batch")
                with tracker:
                    step([Batch(0, "", 0.0, 0, batch, *inputs)], 0.0)
            self._logs[key] = tracker.footprint()
        return self._logs[key]
