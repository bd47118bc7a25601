from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel

from xlsd_train.config.optimization import Optimizer as Name
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.factory import finish, make_optimizer, numbers, rates
from xlsd_train.optim.lion import DLion, Lion

RATES: dict[Name, float] = {"lion": 1e-3, "dlion": 1.0, "adamw": 1e-3}


def test_defaults_are_the_papers() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(TrainConfig(phase="te").resolved(), [weight])
    assert isinstance(optimizer, Lion)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.99), 0.0, 3e-6)
    adam = make_optimizer(TrainConfig(phase="te", optimizer="adamw").resolved(), [weight])
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)
    config = TrainConfig(phase="te", optimizer="dlion", d_max=1e-5, d_growth=1.5).resolved()
    dlion = make_optimizer(config, [weight])
    assert isinstance(dlion, DLion)
    (group,) = dlion.param_groups
    assert (group["betas"], group["lr"], group["d"]) == ((0.9, 0.999), 1.0, 1e-6)
    assert (dlion.d_max, dlion.d_growth) == (1e-5, 1.5)


def unet_of(model: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(model / "unet")


def made(name: Name, unet: Any) -> torch.optim.Optimizer:
    config = TrainConfig(phase="unet", optimizer=name, lr=RATES[name], weight_decay=0.01)
    return make_optimizer(config.resolved(), unet.parameters())


def backward(unet: Any, step: int) -> None:
    """Gradients of one fixed batch, another each step."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    width = unet.config.cross_attention_dim
    states = torch.randn(2, 7, width, generator=generator)
    unet(latents, torch.tensor([10, 700]), states).sample.square().mean().backward()


def leave_to_hooks(optimizer: torch.optim.Optimizer, together: int) -> None:
    """Step inside backward, whenever `together` gradients wait; then free them."""
    waiting: list[torch.Tensor] = []

    def step(parameter: torch.Tensor) -> None:
        waiting.append(parameter)
        if len(waiting) >= together:
            flush()

    def flush() -> None:
        optimizer.step()
        for parameter in waiting:
            parameter.grad = None
        waiting.clear()

    for parameter in optimizer.param_groups[0]["params"]:
        parameter.register_post_accumulate_grad_hook(step)
    optimizer.flush = flush  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RATES)
def test_stepping_in_parts_inside_backward_changes_not_one_bit(name: Name, model: Path) -> None:
    """Parameter by parameter and seven at a time, as backward gives them, against all at once."""
    unets = [unet_of(model) for _ in range(3)]
    whole, *parts = optimizers = [made(name, unet) for unet in unets]
    for optimizer, together in zip(parts, (1, 7), strict=True):
        leave_to_hooks(optimizer, together)
    start = [parameter.detach().clone() for parameter in unets[0].parameters()]
    for step in range(1, 5):
        for unet, optimizer in zip(unets, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] *= 0.9
            backward(unet, step)
            if optimizer is whole:
                optimizer.step()
                optimizer.zero_grad()
            else:
                optimizer.flush()  # type: ignore[attr-defined]
            assert all(parameter.grad is None for parameter in unet.parameters())
            finish(optimizer)
        for unet, optimizer in zip(unets[1:], parts, strict=True):
            for ours, theirs in zip(unet.parameters(), unets[0].parameters(), strict=True):
                assert torch.equal(ours, theirs)
                for key, value in whole.state[theirs].items():
                    assert torch.equal(optimizer.state[ours][key], value), key
            assert numbers(optimizer) == numbers(whole)
            assert rates(optimizer) == rates(whole)
    changed = [not torch.equal(a, b) for a, b in zip(start, unets[0].parameters(), strict=True)]
    assert all(changed)


def test_every_optimizer_is_tested_here() -> None:
    assert RATES.keys() == set(get_args(Name))


@pytest.mark.parametrize("name", RATES)
def test_state_made_at_the_start_is_state_made_by_the_first_step(name: Name, model: Path) -> None:
    unets = [unet_of(model).to(memory_format=torch.channels_last) for _ in range(2)]
    early, late = (made(name, unet) for unet in unets)
    late.state.clear()
    pointers = {x.data_ptr() for x in tensors(early)}
    for step in range(1, 4):
        for unet, optimizer in zip(unets, (early, late), strict=True):
            backward(unet, step)
            optimizer.step()
            optimizer.zero_grad()
            finish(optimizer)
    for ours, theirs in zip(unets[0].parameters(), unets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert early.state[ours].keys() == late.state[theirs].keys()
        for key, value in late.state[theirs].items():
            mine = early.state[ours][key]
            assert (mine.dtype, mine.stride()) == (value.dtype, value.stride()), key
            assert torch.equal(mine, value), key
    assert numbers(early) == numbers(late)
    assert pointers == {x.data_ptr() for x in tensors(early)}


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [x for state in optimizer.state.values() for x in state.values()]


def test_the_fused_adamw_is_torchs_plain_one_to_rounding(model: Path) -> None:
    unets = [unet_of(model) for _ in range(2)]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01}
    ours = made("adamw", unets[0])
    plain = torch.optim.AdamW(unets[1].parameters(), foreach=False, fused=False, **settings)
    for step in range(1, 4):
        backward(unets[1], step)  # the same gradients for both: Adam turns rounding into steps
        for mine, its in zip(unets[0].parameters(), unets[1].parameters(), strict=True):
            mine.grad = its.grad.clone()
        ours.step()
        plain.step()
        plain.zero_grad()
    for mine, its in zip(unets[0].parameters(), unets[1].parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7)


def test_effective_rates() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    lion = make_optimizer(TrainConfig(phase="te").resolved(), [weight])
    assert rates(lion) == {"lr": 3e-6, "lr_effective": 3e-6}
    dlion = make_optimizer(TrainConfig(phase="te", optimizer="dlion").resolved(), [weight])
    dlion.param_groups[0].update(lr=0.5, d=4e-6)
    weight.grad = torch.ones(3)
    dlion.step()
    dlion.param_groups[0]["d"] = 5e-6  # for the next step
    assert rates(dlion) == {"lr": 0.5, "lr_effective": 2e-6, "d": 4e-6}
