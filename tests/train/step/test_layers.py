from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.demo.pipeline import make_networks
from benchmarks.lib.flops import FlopCounter
from xlsd_cache.errors import UserError
from xlsd_train.step.blocks import Mode, Recompute
from xlsd_train.step.layers import INPUT_IDS, NOISY, PREDICTION, TIMESTEPS, make_layers


def networks() -> tuple[Any, Any]:
    unet, text_encoder = make_networks("nano", 600)
    for parameter in unet.parameters():
        if parameter.dim() > 1:  # with diffusers' own small ones everything rounds to the inputs
            torch.nn.init.normal_(parameter, std=0.05)
    return unet, text_encoder


def encode(text_encoder: Any) -> Any:
    return lambda ids: text_encoder(ids).last_hidden_state


def given(count: int, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        NOISY: torch.randn((count, 4, height, width), generator=generator),
        TIMESTEPS: torch.randint(0, 1000, (count,), generator=generator),
        INPUT_IDS: torch.randint(0, 600, (count, 77), generator=generator),
    }


def run(layers: Any, values: dict[str, Tensor], recompute: Recompute) -> Tensor:
    values = dict(values)
    for layer in layers:
        values[layer.output] = layer.run(Mode(recompute), *[values[name] for name in layer.inputs])
    return values[PREDICTION]


@pytest.mark.parametrize("size", [(16, 24), (12, 20), (9, 7)])
@pytest.mark.parametrize("recompute", ["nothing", "cheap", "feed-forward"])
def test_layers_are_the_libraries_forward_bit_for_bit(
    recompute: Recompute, size: tuple[int, int]
) -> None:
    """Also for odd latents, which are rounded up when halved."""
    unet, text_encoder = networks()
    values = given(2, *size)
    layers = make_layers(unet, text_encoder, encode(text_encoder))
    states = text_encoder(values[INPUT_IDS]).last_hidden_state
    expected = unet(values[NOISY], values[TIMESTEPS], states).sample
    assert torch.equal(run(layers, values, recompute), expected)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters()}
    unet.zero_grad()
    run(layers, values, recompute).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name]), name


def test_every_parameter_belongs_to_exactly_one_layer() -> None:
    unet, text_encoder = networks()
    layers = make_layers(unet, text_encoder, encode(text_encoder))
    there = [id(p) for layer in layers for p in layer.parameters]
    expected = [id(p) for m in (text_encoder, unet) for p in m.parameters()]
    assert sorted(there) == sorted(expected)


def saved_bytes(layers: Any, values: dict[str, Tensor], recompute: Recompute) -> tuple[int, int]:
    """Bytes that a forward pass keeps besides weights, and FLOPs of forward and backward."""
    weights = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(layers, values, recompute)
        out.square().sum().backward()  # type: ignore[no-untyped-call]
    return sum(kept.values()), counter.total


def test_cheap_keeps_much_less_and_computes_nothing_twice() -> None:
    unet, text_encoder = networks()
    text_encoder.requires_grad_(False)
    layers = make_layers(unet, text_encoder, encode(text_encoder))
    values = given(2, 16, 16)
    plain, flops = saved_bytes(layers, values, "nothing")
    cheap, same = saved_bytes(layers, values, "cheap")
    least, more = saved_bytes(layers, values, "feed-forward")
    assert least < cheap < 0.7 * plain
    assert same == flops
    assert flops < more < 1.06 * flops


@pytest.mark.parametrize(
    ("name", "value"),
    [("resnet_time_scale_shift", "scale_shift"), ("use_linear_projection", True),
     ("dual_cross_attention", True), ("downsample_padding", 0)],
)  # fmt: skip
def test_other_architectures_are_refused_by_name(name: str, value: Any) -> None:
    unet, text_encoder = networks()
    config = {key: it for key, it in unet.config.items() if not key.startswith("_")} | {name: value}
    other = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match=f"its config has {name} .* SD1.5's"):
        make_layers(other, text_encoder, encode(text_encoder))
