"""The optimizers, their state, and what they say of their rate.

A training step is `step()`, or several of them for parts of the parameters, and then `finish()`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor
from torch.nn import Parameter

from xlsd_train.config.optimization import OptimizerOptions
from xlsd_train.optim.lion import D0, DLion, Lion

# Numbers that steps change: a checkpoint must hold them beside the parameters' state.
EVOLVING: dict[type, tuple[str, ...]] = {
    DLion: ("d", "k", "numerator_weighted"),
    Prodigy: ("d", "k", "d_max", "d_numerator"),
}


def steps_in_parts(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters may be stepped as their gradients come, as the memory plan would.

    Prodigy's step needs all gradients twice: for the new d, and then for the update with it.
    """
    return not isinstance(optimizer, Prodigy)


def make_optimizer(
    options: OptimizerOptions, parameters: Iterable[Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of resolved options, its state allocated beside the parameters.

    Its learning rate is set anew at every step.
    """
    assert options.lr is not None
    common: dict[str, Any] = {
        "params": list(parameters),
        "lr": options.lr,
        "weight_decay": options.weight_decay,
    }
    if options.optimizer != "adafactor":
        common["betas"] = options.betas
    growth = options.d_growth or math.inf
    optimizer: torch.optim.Optimizer
    if options.optimizer == "lion":
        optimizer = Lion(**common)
    elif options.optimizer == "dlion":
        optimizer = DLion(**common, d_max=options.d_max or math.inf, d_growth=growth)
    elif options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(**common, fused=True)  # without temporaries
    elif options.optimizer == "prodigy":
        # What its README recommends for diffusion models and for a warm-up.
        advised = {"safeguard_warmup": True, "use_bias_correction": True}
        optimizer = Prodigy(**common, **advised, d0=D0, growth_rate=growth)
        optimizer.register_step_pre_hook(_note_d)
    else:
        optimizer = torch.optim.Adafactor(**common, foreach=False)  # True would copy the model
    allocate(optimizer)
    return optimizer


def _note_d(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    optimizer.param_groups[0]["used_d"] = optimizer.param_groups[0]["d"]


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make all state as the first step would: what does not fit is known before it.

    Prodigy's includes a copy of the parameters, as they are now.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(optimizer, (Lion, DLion)):
            optimizer.allocate(parameter)
        elif not optimizer.state[parameter]:
            optimizer.state[parameter] = _state(optimizer, parameter.detach())


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The first state that the libraries make of a parameter (their step functions say how)."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {
            "step": torch.zeros((), device=parameter.device),  # on the CPU, were it not fused
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if isinstance(optimizer, Prodigy):
        return {
            "step": 0,
            "s": torch.zeros_like(parameter.flatten()),
            "p0": parameter.flatten().clone(),  # also where all are zero, of which it keeps one 0
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    shape, step = parameter.shape, torch.tensor(0.0)
    if len(shape) < 2:
        return {"step": step, "variance": torch.zeros_like(parameter)}
    return {
        "step": step,
        "row_var": parameter.new_zeros((*shape[:-1], 1)),
        "col_var": parameter.new_zeros((*shape[:-2], 1, shape[-1])),
    }


def finish(optimizer: torch.optim.Optimizer) -> None:
    """End a training step, after each parameter with a gradient was stepped."""
    if isinstance(optimizer, DLion):
        optimizer.finish()


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Of the step that ended last, for the metrics: `lr`, `lr_effective`, and `d` if there is one.

    The effective rate is what Lion moves each weight by, and Adam about; Adafactor's is relative to
    the root mean square of each tensor's weights.
    """
    group = optimizer.param_groups[0]
    lr: float = group["lr"]
    if type(optimizer) in EVOLVING:
        return {"lr": lr, "lr_effective": group["used_d"] * lr, "d": group["used_d"]}
    return {"lr": lr, "lr_effective": lr}


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a checkpoint must hold beside the parameters' state."""
    (group,) = optimizer.param_groups
    return {key: group[key] for key in EVOLVING.get(type(optimizer), ())}


def set_numbers(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Put back what `numbers` gave. Raises ValueError where they are another optimizer's."""
    (group,) = optimizer.param_groups
    if values.keys() != numbers(optimizer).keys():
        raise ValueError(f"its optimizer has the numbers {', '.join(values) or 'none'}")
    group.update(values)
