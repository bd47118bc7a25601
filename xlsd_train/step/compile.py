"""`--compile`: torch.compile of the memory-bound functions, one graph per kind of them.

Convolutions, matmuls and attention stay as they are: inductor would call the same libraries, and
its lowering of convolution_backward fixes height and width (torch 2.13). So what is recomputed and
stored is what the memory plan says, or less: a fused norm and SiLU keeps no tensor between them.

A resumed run meets the buckets in another order and must compute the same bits. So everything is
compiled before the first step, for one shape, and with sizes as variables. Later a tensor that no
graph accepts, such as a batch of one sample, takes the eager functions.
"""

import logging
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import mark_dynamic
from torch._dynamo.utils import counters
from torch.nn import Conv2d, GroupNorm
from torch.nn import functional as F

from xlsd_cache.errors import UserError
from xlsd_train.step.blocks import EAGER, MemoryBound
from xlsd_train.step.layers import INPUT_IDS, NOISY, TIMESTEPS
from xlsd_train.step.step import Step

log = logging.getLogger("xlsd.train.step")

# Nothing is chosen by its time, and no graph is taken from an earlier run with another shape.
_OPTIONS: dict[str, Any] = {"deterministic": True, "fx_graph_cache": False}
_KINDS = 64  # per function: the numbers of channels, and whether each input needs a gradient


def check_compiler(device: torch.device) -> None:
    """Raise UserError if nothing can be compiled here."""
    x = torch.ones(2, device=device)
    try:
        _compiled(_twice)(x)
    except Exception as error:  # of torch, Triton or a C++ compiler
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--compile needs {needs} ({reason}); install it, or leave it out"
        ) from error


class Compiled(MemoryBound):
    """Each function is one fused kernel or a few. Biases of convolutions are added in them."""

    def __init__(self) -> None:
        self.stance = "default"  # compiles what is new; `warm_up` ends that
        self._add, self._geglu = _compiled(_add), _compiled(_geglu)
        self._norm_silu = _compiled(_norm_silu)

    def conv(self, m: Conv2d, x: Tensor) -> Tensor:
        """Without the bias."""
        return F.conv2d(x, m.weight, None, m.stride, m.padding)

    def add_bias(self, m: Conv2d, x: Tensor, shift: Tensor) -> Tensor:
        """One addition for both shifts; a broadcast one needs no compiler."""
        assert m.bias is not None
        return x + (shift + m.bias.to(shift.dtype))[:, :, None, None]

    def add(self, m: Conv2d, x: Tensor, residual: Tensor) -> Tensor:
        """Bias and residual."""
        return self._run(self._add, (0, 2, 3), (x, residual), m.bias)

    def norm_silu(self, m: GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm and SiLU."""
        return self._run(self._norm_silu, (0, 2, 3), (x,), m.weight, m.bias, m.num_groups, m.eps)

    def geglu(self, x: Tensor) -> Tensor:
        """GEGLU of [B, tokens, channels]."""
        return self._run(self._geglu, (0, 1), (x,))

    def _run(
        self, function: Callable[..., Tensor], sizes: tuple[int, ...], inputs: tuple[Tensor, ...],
        *others: Any,
    ) -> Tensor:  # fmt: skip
        """`sizes` are the dimensions of the inputs that differ between batches."""
        if self.stance == "default":
            for x in inputs:  # a size of 1 is always part of a graph
                mark_dynamic(x, [n for n in sizes if x.shape[n] > 1])
        with torch.compiler.set_stance(self.stance):
            return function(*inputs, *others)


def warm_up(step: Step, bound: Compiled, micro_batch: int, size: tuple[int, int]) -> None:
    """Compile all that a step of this phase needs; changes no weight, gradient or random state.

    `micro_batch` and `size`, the height and width of latents, are what the compiler optimises for.
    """
    begun, before = time.perf_counter(), counters["stats"]["unique_graphs"]
    with dynamo_config.patch(recompile_limit=_KINDS):
        for batch in sorted({micro_batch, max(2, micro_batch)}):
            _run_layers(step, batch, size)
    bound.stance = "eager_on_recompile"
    count, seconds = counters["stats"]["unique_graphs"] - before, time.perf_counter() - begun
    log.info(f"compiled {count} kinds of norms, activations and additions in {seconds:.0f} s")


def _run_layers(step: Step, batch: int, size: tuple[int, int]) -> None:
    """Run and differentiate one layer after another on zeros."""
    device, mode = step.backend.device, step.plan.mode
    tokens = step.model.text_encoder.config.max_position_embeddings
    values = {
        NOISY: torch.zeros(batch, step.model.unet.config.in_channels, *size, device=device),
        TIMESTEPS: torch.zeros(batch, dtype=torch.int64, device=device),
        INPUT_IDS: torch.zeros(batch, tokens, dtype=torch.int64, device=device),
    }
    for layer in step.layers:
        inputs = [values[name].detach() for name in layer.inputs]
        for name, x in zip(layer.inputs, inputs, strict=True):
            x.requires_grad_(values[name].requires_grad)
        with step.backend.autocast():
            out = layer.run(mode, *inputs)
        wanted = [x for x in (*inputs, *layer.trained) if x.requires_grad]
        if out.requires_grad:
            torch.autograd.grad(out, wanted, torch.zeros_like(out), allow_unused=True)
        values[layer.output] = out.detach().requires_grad_(out.requires_grad)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function. Graphs belong to its code, so a copy of that has its own."""
    alone = FunctionType(function.__code__.replace(), function.__globals__)
    return torch.compile(alone, fullgraph=True, dynamic=False, options=_OPTIONS)


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def _add(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    return x + bias.to(x.dtype)[:, None, None] + residual


def _geglu(x: Tensor) -> Tensor:
    return EAGER.geglu(x)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
