"""Text encoder and UNet as a list of layers, each of which the memory plan can run in several ways.

The weights are in diffusers' and transformers' modules. Their forward pass is written again here,
over those modules and equal bit for bit, with activation checkpointing: `cheap` recomputes the
outputs of norms and activation functions in the backward pass, and `feed-forward` that of the
feed-forward projection too. A recomputed region ends with the convolution or matmul that takes what
it recomputes. Non-reentrant checkpointing stops before that last operation, so it runs only once.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xlsd_cache.errors import UserError
from xlsd_train.step.attention import exact_attention, exact_in
from xlsd_train.step.memory_bound import EAGER, MemoryBound, in_grad_mode

Recompute = Literal["nothing", "cheap", "feed-forward"]
Attention = Literal["sdpa", "exact"]
# The values that a batch starts with; none has a gradient.
NOISY, TIMESTEPS, INPUT_IDS = "noisy latents", "timesteps", "input_ids"
STATES, PREDICTION = "encoder_hidden_states", "prediction"
_TEMB = "time embedding"
WHOLE = 4096  # the `room` of a layer so small that any batch passes at once
# The architecture that the forward pass below implements: SD1.5's, at any size.
_EXPECTED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim": None,
    "dual_cross_attention": False, "only_cross_attention": False, "use_linear_projection": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
    "mid_block_scale_factor": 1, "time_cond_proj_dim": None, "upcast_attention": False,
    "conv_in_kernel": 3, "time_embedding_act_fn": None, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1, "cross_attention_norm": None, "dropout": 0.0,
}  # fmt: skip


# More arguments of torch's checkpoint; memory/meta_step.py sets a context for the recomputation.
checkpoint_options: dict[str, Any] = {}


class Mode(NamedTuple):
    """How the layers run."""

    recompute: Recompute = "nothing"
    attention: Attention = "sdpa"


@dataclass(frozen=True)
class Layer:
    """Modules that run, and are differentiated, together."""

    inputs: tuple[str, ...]  # names of values
    output: str  # name of its output value; the layer's own name as well
    parameters: tuple[Parameter, ...]
    room: int  # samples here that need about as much memory as one sample in the widest layers
    run: Callable[..., Tensor]  # (mode, *inputs) -> output; no sample sees another

    @property
    def trained(self) -> list[Parameter]:
        """The parameters that get a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


def make_layers(
    unet: Any, text_encoder: Any, encode: Callable[[Tensor], Tensor], bound: MemoryBound = EAGER
) -> list[Layer]:
    """Layers of the text encoder, the time embedding and the UNet, in forward order.

    `encode` maps input_ids int64 [B, tokens] to encoder_hidden_states [B, tokens, width]; `bound`
    computes norms and activation functions. Raises UserError for a UNet whose architecture is not
    SD1.5's.
    """
    for name, expected in _EXPECTED.items():
        if (value := unet.config.get(name, expected)) != expected:
            raise UserError(
                f"cannot train this UNet: its config has {name} {value!r}, and SD1.5's "
                f"{expected!r}; give an SD1.5-like --model"
            )
    layers: list[Layer] = []

    channels = unet.config.block_out_channels
    rooms = [max(1, 4**level * channels[0] // wide) for level, wide in enumerate(channels)]

    def add(output: str, inputs: tuple[str, ...], modules: list[Any], room: int, run: Any) -> str:
        parameters = tuple(p for m in modules if m is not None for p in m.parameters())
        layers.append(Layer(inputs, output, parameters, room, run))
        return output

    tokens = text_encoder.config.max_position_embeddings
    room = max(1, 4 * 77 // tokens)
    add(STATES, (INPUT_IDS,), [text_encoder], room, partial(_text, text_encoder, encode))
    add(_TEMB, (TIMESTEPS,), [unet.time_embedding], WHOLE, _time_embedding(unet))
    h = add("conv_in", (NOISY,), [unet.conv_in], 1, lambda _, x: unet.conv_in(x))
    skips = [h]
    for i, block in enumerate(unet.down_blocks):
        for j, (res, att) in enumerate(_pairs(block)):
            h = add(
                f"down {i}.{j}", (_TEMB, STATES, h), [res, att], rooms[i], _pair(bound, res, att)
            )
            skips.append(h)
        for down in block.downsamplers or ():
            run = partial(_downsample, down)
            h = add(f"down {i} sampler", (h,), [down], rooms[i], run)
            skips.append(h)
    for j, (res, att) in enumerate(_pairs(unet.mid_block)):
        h = add(f"mid {j}", (_TEMB, STATES, h), [res, att], rooms[-1], _pair(bound, res, att))
    up = None  # shares a layer with what follows, since its output is large and its input small
    for i, block in enumerate(unet.up_blocks):
        for j, (res, att) in enumerate(_pairs(block)):
            inputs = (_TEMB, STATES, h, skips.pop())
            pair = _pair(bound, res, att, up)
            h = add(f"up {i}.{j}", inputs, [up, res, att], rooms[-1 - i], pair)
            up = None
        up = block.upsamplers[0] if block.upsamplers else None
    add(PREDICTION, (h,), [unet.conv_norm_out, unet.conv_out], 1, _out(bound, unet))
    return layers


def _pairs(block: Any) -> list[tuple[Any, Any]]:
    return list(zip_longest(block.resnets, getattr(block, "attentions", [])))


def _pair(bound: MemoryBound, res: Any, att: Any, up: Any = None) -> Callable[..., Tensor]:
    """An upsampler, a resnet and a transformer, in one layer; the first and last may be missing."""

    def run(mode: Mode, temb: Tensor, states: Tensor, x: Tensor, *skip: Tensor) -> Tensor:
        if up is not None:
            x = _upsample(up, mode.recompute, x, skip[0].shape[2:])
        used = in_grad_mode(bound)
        x = _resnet(used, res, mode.recompute, temb, x, *skip)
        return x if att is None else _transformer(used, att, mode, x, states)

    return run


def _text(m: Any, encode: Callable[[Tensor], Tensor], mode: Mode, input_ids: Tensor) -> Tensor:
    with exact_in(m) if mode.attention == "exact" else nullcontext():
        return encode(input_ids)


def _time_embedding(unet: Any) -> Callable[..., Tensor]:
    def run(_: Mode, timesteps: Tensor) -> Tensor:
        sinusoids = unet.time_proj(timesteps).to(unet.conv_in.weight.dtype)
        embedded: Tensor = unet.time_embedding(sinusoids)
        return embedded

    return run


def _downsample(m: Any, _: Mode, x: Tensor) -> Tensor:
    halved: Tensor = m.conv(x)
    return halved


def _upsample(m: Any, recompute: Recompute, x: Tensor, size: torch.Size) -> Tensor:
    """Upsample2D, to the size of the skip connection: downsampling rounds odd sizes up."""
    return recomputed(recompute, lambda z: m.conv(F.interpolate(z, size, mode="nearest")), x)


def _out(bound: MemoryBound, unet: Any) -> Callable[..., Tensor]:
    def run(mode: Mode, x: Tensor) -> Tensor:
        norm_silu = in_grad_mode(bound).norm_silu
        return recomputed(
            mode.recompute, lambda z: unet.conv_out(norm_silu(unet.conv_norm_out, z)), x
        )

    return run


def recomputed(recompute: Recompute, region: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The region's output. Nothing between its inputs and its last operation is stored."""
    if recompute == "nothing" or not torch.is_grad_enabled():
        return region(*inputs)
    # There is no dropout, so no random state to restore.
    out: Tensor = checkpoint(
        region, *inputs, use_reentrant=False, preserve_rng_state=False, **checkpoint_options
    )
    return out


def _resnet(
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


def _transformer(bound: MemoryBound, m: Any, mode: Mode, x: Tensor, states: Tensor) -> Tensor:
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
