from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from xlsd_cache.errors import UserError
from xlsd_train.model.reinit import reinitialise


def unet_of(model: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(model / "unet")


def drawn(model: Path, names: list[str], seed: int = 1) -> dict[str, torch.Tensor]:
    """The weights that it changed."""
    before, after = unet_of(model), unet_of(model)
    reinitialise(after, names, seed)
    old = before.state_dict()
    return {k: v for k, v in after.state_dict().items() if not torch.equal(v, old[k])}


def test_it_is_a_function_of_seed_and_name_and_touches_nothing_else(model: Path) -> None:
    state = torch.get_rng_state()
    both = drawn(model, ["unet.conv_in.weight", "unet.conv_in.bias", "unet.conv_out.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert both.keys() == {"conv_in.weight", "conv_in.bias", "conv_out.weight"}
    torch.rand(3)
    alone = drawn(model, ["unet.conv_out.weight"])
    assert alone.keys() == {"conv_out.weight"}
    assert torch.equal(alone["conv_out.weight"], both["conv_out.weight"])
    other = drawn(model, ["unet.conv_out.weight"], seed=2)
    assert not torch.equal(alone["conv_out.weight"], other["conv_out.weight"])


def test_the_law_is_that_of_a_new_unet(model: Path) -> None:
    """Every kind of layer: the same bounds and spread as diffusers gives one, norms exactly."""
    names = [name for name, _ in unet_of(model).named_parameters()]
    unet = unet_of(model)
    reinitialise(unet, [f"unet.{name}" for name in names], 1)
    torch.manual_seed(3)
    fresh = dict(UNet2DConditionModel(**unet.config).named_parameters())
    for name, value in unet.named_parameters():
        new = fresh[name]
        if "norm" in name:
            assert torch.equal(value, new), name
            continue
        module = unet.get_submodule(name.rpartition(".")[0])
        bound = module.weight[0].numel() ** -0.5
        assert value.abs().max() <= bound
        assert new.abs().max() <= bound
        if value.numel() > 1000:
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert value.std().item() == pytest.approx(new.std().item(), rel=0.1), name


def test_what_has_no_law_is_refused() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))

    with pytest.raises(UserError, match="--reinit unet.own is a Own"):
        reinitialise(torch.nn.ModuleDict({"own": Own()}), ["unet.own.scale"], 0)
