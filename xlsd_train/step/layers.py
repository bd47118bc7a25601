"""Text encoder and UNet as a list of layers, each of which the memory plan can run in several ways.

The weights are in diffusers' and transformers' modules. `blocks` has the forward pass over them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from xlsd_cache.errors import UserError
from xlsd_train.step.attention import exact_in
from xlsd_train.step.blocks import (
    EAGER,
    MemoryBound,
    Mode,
    in_grad_mode,
    recomputed,
    resnet,
    transformer,
    upsample,
)

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
            x = upsample(up, mode.recompute, x, skip[0].shape[2:])
        used = in_grad_mode(bound)
        x = resnet(used, res, mode.recompute, temb, x, *skip)
        return x if att is None else transformer(used, att, mode, x, states)

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


def _out(bound: MemoryBound, unet: Any) -> Callable[..., Tensor]:
    def run(mode: Mode, x: Tensor) -> Tensor:
        norm_silu = in_grad_mode(bound).norm_silu
        return recomputed(
            mode.recompute, lambda z: unet.conv_out(norm_silu(unet.conv_norm_out, z)), x
        )

    return run
