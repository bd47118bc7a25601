"""The blocks of a UNet: their forward pass, and what of it the backward pass computes again.

The forward pass of diffusers' modules is written again here, over those modules and equal bit for
bit, with activation checkpointing: `cheap` recomputes the
outputs of norms and activation functions in the backward pass, and `feed-forward` that of the
feed-forward projection too. A recomputed region ends with the convolution or matmul that takes what
it recomputes. Non-reentrant checkpointing stops before that last operation, so it runs only once.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Conv2d, GroupNorm
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xlsd_train.step.attention import exact_attention

Recompute = Literal["nothing", "cheap", "feed-forward"]
Attention = Literal["sdpa", "exact"]
# More arguments of torch's checkpoint; memory/meta_step.py sets a context for the recomputation.
checkpoint_options: dict[str, Any] = {}


class Mode(NamedTuple):
    """How the layers run."""

    recompute: Recompute = "nothing"
    attention: Attention = "sdpa"


class MemoryBound:
    """The functions between convolutions and matmuls, whose time is that of memory access.

    As diffusers' modules compute them; `compile.Compiled` fuses each one into a kernel.
    """

    def conv(self, m: Conv2d, x: Tensor) -> Tensor:
        """The convolution, whose output goes to `add_bias` or `add`."""
        out: Tensor = m(x)
        return out

    def add_bias(self, m: Conv2d, x: Tensor, shift: Tensor) -> Tensor:  # noqa: ARG002
        """Output x [B, C, H, W] of `conv(m, ...)`, shifted by [B, C]."""
        return x + shift[:, :, None, None]

    def add(self, m: Conv2d, x: Tensor, residual: Tensor) -> Tensor:  # noqa: ARG002
        """Output of `conv(m, ...)` plus a residual."""
        return residual + x

    def norm_silu(self, m: GroupNorm, x: Tensor) -> Tensor:
        """GroupNorm and SiLU."""
        return F.silu(m(x))

    def geglu(self, x: Tensor) -> Tensor:
        """The first half of the last dimension, times GELU of the second."""
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


EAGER = MemoryBound()


def in_grad_mode(chosen: MemoryBound) -> MemoryBound:
    """`chosen` where a gradient may be taken; validation and samples run eagerly."""
    return chosen if torch.is_grad_enabled() else EAGER


def upsample(m: Any, recompute: Recompute, x: Tensor, size: torch.Size) -> Tensor:
    """Upsample2D, to the size of the skip connection: downsampling rounds odd sizes up."""
    return recomputed(recompute, lambda z: m.conv(F.interpolate(z, size, mode="nearest")), x)


def recomputed(recompute: Recompute, region: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The region's output. Nothing between its inputs and its last operation is stored."""
    if recompute == "nothing" or not torch.is_grad_enabled():
        return region(*inputs)
    # There is no dropout, so no random state to restore.
    out: Tensor = checkpoint(
        region, *inputs, use_reentrant=False, preserve_rng_state=False, **checkpoint_options
    )
    return out


def resnet(
    bound: MemoryBound, m: Any, recompute: Recompute, temb: Tensor, *parts: Tensor
) -> Tensor:
    """ResnetBlock2D on `parts`, concatenated along channels.

    A recomputed region concatenates them again. If nothing is recomputed they are concatenated
    once, since both results would be stored. diffusers also divides by output_scale_factor, which
    is 1: a pass over memory for nothing.
    """
    if recompute == "nothing":
        parts = (_join(parts),)
    conv, norm_silu = bound.conv, bound.norm_silu
    h = recomputed(recompute, lambda *z: conv(m.conv1, norm_silu(m.norm1, _join(z))), *parts)
    h = bound.add_bias(m.conv1, h, m.time_emb_proj(F.silu(temb)))
    h = recomputed(recompute, lambda z: conv(m.conv2, norm_silu(m.norm2, z)), h)
    if m.conv_shortcut is None:
        return bound.add(m.conv2, h, _join(parts))
    shortcut = recomputed(recompute, lambda *z: m.conv_shortcut(_join(z)), *parts)
    return bound.add(m.conv2, h, shortcut)


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def transformer(bound: MemoryBound, m: Any, mode: Mode, x: Tensor, states: Tensor) -> Tensor:
    """Transformer2DModel over its one or more blocks."""
    batch, _, height, width = x.shape

    def out(z: Tensor) -> Tensor:
        image = z.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        return bound.conv(m.proj_out, image)

    h = recomputed(mode.recompute, lambda z: m.proj_in(m.norm(z)), x)
    h = h.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
    for block in m.transformer_blocks:
        h = _block(bound, block, mode, h, states)
    return bound.add(m.proj_out, recomputed(mode.recompute, out, h), x)


def _block(bound: MemoryBound, m: Any, mode: Mode, h: Tensor, states: Tensor) -> Tensor:
    """BasicTransformerBlock: self-attention, cross-attention to the text, feed-forward."""
    recompute = mode.recompute
    a = m.attn1
    if recompute == "nothing" or not torch.is_grad_enabled():
        z = m.norm1(h)
        q, k, v = a.to_q(z), a.to_k(z), a.to_v(z)
        del z
    else:
        weights = (a.to_q.weight, a.to_k.weight, a.to_v.weight)
        norm = (m.norm1.weight, m.norm1.bias, m.norm1.eps)
        q, k, v = _NormedLinears.apply(h, *norm, *weights)  # type: ignore[no-untyped-call]
    h = _attention(a, mode.attention, q, k, v) + h
    del q, k, v
    a = m.attn2
    q = recomputed(recompute, lambda z: a.to_q(m.norm2(z)), h)
    h = _attention(a, mode.attention, q, a.to_k(states), a.to_v(states)) + h
    del q
    project, last = m.ff.net[0].proj, m.ff.net[2]

    def gated(z: Tensor) -> Tensor:  # GEGLU, and the layer that ends the feed-forward
        ended: Tensor = last(bound.geglu(z))
        return ended

    if recompute == "feed-forward":
        return recomputed(recompute, lambda z: gated(project(m.norm3(z))), h) + h
    return recomputed(recompute, gated, recomputed(recompute, lambda z: project(m.norm3(z)), h)) + h


def _attention(m: Any, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention and its last layer. Neither kind stores the matrix of all pairs."""
    if attention == "exact":
        mixed = exact_attention(q, k, v, m.heads)
    else:
        q, k, v = (z.view(z.shape[0], z.shape[1], m.heads, -1).transpose(1, 2) for z in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape(mixed.shape[0], mixed.shape[1], -1)
    out: Tensor = m.to_out[0](mixed)
    return out


class _NormedLinears(Function):
    """LayerNorm and several linear layers without bias on its output; only its input is stored.

    Three layers share the norm's output, so a checkpointed region would run two of them again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float, *weights: Tensor) -> Any:
        y = F.layer_norm(x, x.shape[-1:], w, b, eps)
        ctx.save_for_backward(x, w, b, *weights)
        ctx.eps = eps
        return tuple(F.linear(y, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w, b, *weights = ctx.saved_tensors
        needs, x32 = ctx.needs_input_grad, x.to(w.dtype)
        norm, mean, rstd = torch.native_layer_norm(x32, x.shape[-1:], w, b, ctx.eps)
        # Under autocast gradients are bfloat16, as those of a linear layer are; weights are not.
        y = norm.flatten(0, -2).to(gradients[0].dtype)
        del norm
        to_y, to_weights = None, []
        for gradient, weight in zip(
            gradients[::-1], weights[::-1], strict=True
        ):  # as autograd sums
            flat = gradient.flatten(0, -2)
            to_weights.append((y.t() @ flat).t().to(weight.dtype) if needs[4] else None)
            part = flat @ weight.to(flat.dtype)
            to_y = part if to_y is None else to_y.add_(part)
        del y
        assert to_y is not None
        to_x, to_w, to_b = torch.ops.aten.native_layer_norm_backward(
            to_y.view(x.shape).to(w.dtype), x32, x.shape[-1:], mean, rstd, w, b,
            [needs[0], needs[1], needs[2]],
        )  # fmt: skip
        return to_x.to(x.dtype), to_w, to_b, None, *to_weights[::-1]
