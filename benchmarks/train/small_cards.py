"""Memory plans for small GPUs, with the optimizer's state on the GPU and streamed from the CPU.

    python benchmarks/train/small_cards.py      8, 12, 16 and 24 GB; no GPU is needed

Each predicted peak is checked by another tracker: the real step runs with all micro-batches and
slices on fake tensors, with CUDA's attention kernel, and the bytes of live storages are summed.
"""

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.lib.real_step import machine_of, networks
from benchmarks.lib.report import JsonOption, Report, run_script
from benchmarks.train.max_batch import latents
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.choose import asked, memory_limit
from xlsd_train.memory.footprint import CUBLAS
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, Planner, Prediction
from xlsd_train.model.bundle import Networks
from xlsd_train.model.latent_scaling import LatentScaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.optim.lion import DLion
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.objective import Objective
from xlsd_train.step.step import Step

_aten = torch.ops.aten
# As in memory/tracker.py: what cuDNN takes, as a multiple of what a convolution reads and writes.
WORKSPACES = {_aten.convolution: 1, _aten.convolution_backward: 2}
TOLERANCE = 1.0  # percent


@dataclass(frozen=True)
class SmallCardsConfig(JsonOption):
    """Compare plans with resident and with streamed momentum."""

    vram: tuple[float, ...] = (8.0, 12.0, 16.0, 24.0)
    """GPU memory in GB. The run gets the share that xlsd-train uses."""

    size: tuple[str, ...] = ("512x512", "768x768")
    """Image sizes, WIDTHxHEIGHT."""

    batch: int = 32
    """Images per batch."""

    optimizer: Literal["lion", "dlion"] = "lion"
    """As in xlsd-train."""

    model: Literal["nano", "demo", "sd15"] = "sd15"
    """sd15: full size. The others are small SD1.5s."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak of all live storages in bytes, of those that operations make and those given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def add(self, tensors: Any, counted: bool = True) -> int:
        """Count the storages of these tensors, or leave them out; returns the bytes of all."""
        found = [x for x in tree_leaves(tensors) if isinstance(x, Tensor)]
        for tensor in found:
            storage = tensor.untyped_storage()
            key = storage._cdata  # noqa: SLF001 (its address)
            if key not in self._seen:
                self._seen[key] = -(-storage.nbytes() // 512) * 512 * counted
                self.now += self._seen[key]
                weakref.finalize(storage, self._gone, key).atexit = False
        self.peak = max(self.peak, self.now)
        return sum(x.numel() * x.element_size() for x in found)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = self.add((args, kwargs)) + self.add(out)
        workspace = WORKSPACES.get(func.overloadpacket, 0) * moved
        self.peak = max(self.peak, self.now + workspace)
        return out


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Any:  # fmt: skip
    """CUDA's kernel for fp32."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    kernel = _aten._scaled_dot_product_efficient_attention  # noqa: SLF001
    return kernel(q, k, v, attn_mask, gradient, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def _fake() -> Iterator[None]:
    """Tensors without data; weights are not initialised."""
    sdpa = "torch.nn.functional.scaled_dot_product_attention"
    with FakeTensorMode(), patch(sdpa, _attention), patch.object(DLion, "finish", DLion.forget):
        yield


def _step(settings: TrainConfig, plan: MemoryPlan, unet: Any, text_encoder: Any) -> Step:
    """The run's own step, of these networks."""
    ones = torch.ones(4, 1, 1)
    scaling, device = LatentScaling(ones, ones, normalized=False), torch.device("cpu")
    model = Networks(
        unet=unet, text_encoder=text_encoder, source="", scaling=scaling, clip_skip=0
    )  # fmt: skip
    trained = list(model.prepare(settings.phase).values())
    optimizer = make_optimizer(settings, trained, plan.momentum == "streamed")
    table = torch.ones(1000)
    alone: Any = SimpleNamespace(device=device, num_processes=1, autocast=nullcontext)
    objective = Objective("eps", table, table, table, 0, {})
    return Step(model, trained, optimizer, objective, DeviceBackend(alone, plan))


def tracked(config: SmallCardsConfig, settings: TrainConfig, it: Prediction, size: Size) -> int:
    """Peak bytes of a real step with the prediction's plan, without the state on the host."""
    with _fake():
        unet, text_encoder = networks(config.model)
        step = _step(settings, it.plan, unet, text_encoder)
        live, streamed = Live(), getattr(step.optimizer, "streamed", None)
        live.add(list(step.optimizer.state.values()), counted=streamed is None)
        live.add(streamed.buffers if streamed else [])
        live.add([[*m.parameters(), *m.buffers()] for m in (unet, text_encoder)])
        drawn = torch.empty(it.batch, 4, *size)
        ids = torch.zeros(it.batch, text_encoder.config.max_position_embeddings, dtype=torch.int64)
        batch = Batch(0, "", 0.0, 0, it.batch, drawn, torch.empty_like(drawn), ids[:, 0], ids)
        live.add((batch.latents, batch.noise, batch.input_ids))
        with live:
            step([batch], 0.0)
    return live.peak + CUBLAS


def main(config: SmallCardsConfig, command: Sequence[str]) -> None:
    """Print a row for each card, size and place of the momentum."""
    quiet_libraries()
    report = Report("benchmarks/train/small_cards.py", command, machine_of("cpu"))
    print(
        f"{config.model}, unet, {config.optimizer}, fp32, batch {config.batch}; GiB of GPU memory "
        f"predicted and counted, of pinned CPU memory; images/s at 100% of an RTX 4090"
    )
    form = "{:>5}{:>9}{:>7}  {:<36}{:>10}{:>9}{:>9}{:>7}{:>7}{:>10}"
    names = ("GB", "size", "limit", "plan", "predicted", "counted", "error", "host", "FLOPs")
    print(form.format(*names, "images/s"))
    settings = TrainConfig(phase="unet", optimizer=config.optimizer).resolved()
    with torch.device("meta"):
        unet, text_encoder = networks(config.model)
    planner = Planner(settings, unet.config, text_encoder.config.to_dict())
    errors, known = [0.0], dict[Any, int]()
    for name in config.size:
        size = latents(name)
        for vram in config.vram:
            limit = memory_limit(vram) or 0.0
            chosen = planner.fastest(config.batch, size, limit, asked(settings))
            for momentum in ("resident", "streamed"):
                ask = asked(replace(settings, momentum=momentum))
                it = planner.fastest(config.batch, size, limit, ask)
                cells = [f"{vram:g}", name, f"{limit / GIB:.2f}"]
                if it is None:
                    print(
                        form.format(*cells, f"{momentum}: none fits", *[""] * 6).rstrip(),
                        flush=True,
                    )
                    report.add("card", vram=vram, size=name, momentum=momentum, plan=None)
                    continue
                key = it.plan, size
                real = known[key] = known.get(key) or tracked(config, settings, it, size)
                errors.append(100 * (it.peak / real - 1))
                mark = " <" if chosen is not None and chosen.plan == it.plan else ""
                rate = it.batch / it.seconds["RTX 4090"]
                row = form.format(
                    *cells, f"{it.plan}{mark}", f"{it.peak / GIB:.2f}", f"{real / GIB:.2f}",
                    f"{errors[-1]:+.2f}%", f"{it.host / GIB:.2f}", f"{it.factor:.3f}",
                    f"{rate:.1f}",
                )  # fmt: skip
                print(row.rstrip(), flush=True)
                report.add(
                    "card", vram=vram, size=name, momentum=momentum, plan=str(it.plan),
                    chosen=bool(mark), predicted_gib=it.peak / GIB, counted_gib=real / GIB,
                    host_gib=it.host / GIB, flops=it.factor, error=errors[-1],
                )  # fmt: skip
    print("<: the run's own choice")
    report.target("largest error in percent", max(map(abs, errors)), most=TOLERANCE)
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, SmallCardsConfig, __doc__)
