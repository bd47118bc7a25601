"""Make the optimizer and its state, and read its learning rate.

A training step is one `step()`, or several for parts of the parameters, and then `finish()`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from xlsd_train.config.optimization import OptimizerOptions
from xlsd_train.optim.lion import DLion, Lion, StreamedNbytes

EVOLVING = ("d", "k", "numerator_weighted")  # numbers of D-Lion's group that steps change


def make_optimizer(
    options: OptimizerOptions, parameters: Iterable[Parameter], streamed: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of resolved options, with its state allocated on the parameters' devices.

    `streamed`: in CPU memory, for Lion and D-Lion. The training step sets its learning rate.
    """
    assert options.lr is not None
    common: dict[str, Any] = {
        "params": list(parameters),
        "lr": options.lr,
        "betas": options.betas,
        "weight_decay": options.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if options.optimizer == "lion":
        optimizer = Lion(**common)
    elif options.optimizer == "dlion":
        d_max, d_growth = options.d_max or math.inf, options.d_growth or math.inf
        optimizer = DLion(**common, d_max=d_max, d_growth=d_growth)
    else:
        optimizer = torch.optim.AdamW(**common, fused=True)  # without temporaries
    if streamed:
        assert isinstance(optimizer, (Lion, DLion))
        optimizer.stream()
    allocate(optimizer)
    return optimizer


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Allocate all state as the first step would, so that memory that is short shows before it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, (Lion, DLion)):
        for parameter in parameters:
            optimizer.allocate(parameter)
        return
    example, its_state = _adamw_example()
    for parameter in parameters:
        optimizer.state[parameter] = {
            name: torch.zeros_like(
                parameter.detach() if value.shape == example.shape else value,
                device=parameter.device,
            )
            for name, value in its_state.items()
        }


def _adamw_example() -> tuple[Parameter, dict[str, Tensor]]:
    """A parameter of two numbers, and the state that torch's AdamW makes for it.

    Taken from a step of torch's own, so that neither names nor shapes of its state are copied here.
    """
    example = Parameter(torch.zeros(2, device="cpu"))
    example.grad = torch.zeros_like(example)
    optimizer = torch.optim.AdamW([example], fused=True)
    optimizer.step()
    return example, optimizer.state[example]


def finish(optimizer: torch.optim.Optimizer) -> None:
    """End a training step, after each parameter with a gradient was stepped."""
    if isinstance(optimizer, DLion):
        optimizer.finish()


def streamed_nbytes(
    options: OptimizerOptions, parameters: Sequence[Tensor]
) -> StreamedNbytes | None:
    """What streamed state takes; None for AdamW, whose state is not streamed."""
    kinds: dict[str, type[Lion | DLion]] = {"lion": Lion, "dlion": DLion}
    kind = kinds.get(options.optimizer)
    return kind.streamed_nbytes(parameters) if kind else None


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Call before the optimizer's state is read or written, where it may be streamed."""
    if isinstance(optimizer, (Lion, DLion)):
        optimizer.settle()


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The last training step's `lr`, `lr_effective` and, for D-Lion, `d`, for the metrics.

    Lion moves each weight by the effective rate, Adam by about as much.
    """
    group = optimizer.param_groups[0]
    lr: float = group["lr"]
    if isinstance(optimizer, DLion):
        return {"lr": lr, "lr_effective": group["used_d"] * lr, "d": group["used_d"]}
    return {"lr": lr, "lr_effective": lr}


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numbers that a checkpoint must hold in addition to the parameters' state."""
    (group,) = optimizer.param_groups
    return {key: group[key] for key in EVOLVING} if isinstance(optimizer, DLion) else {}


def set_numbers(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Restore what `numbers` gave. Raises ValueError where they are another optimizer's."""
    (group,) = optimizer.param_groups
    if values.keys() != numbers(optimizer).keys():
        raise ValueError(f"its optimizer has the numbers {', '.join(values) or 'none'}")
    group.update(values)
