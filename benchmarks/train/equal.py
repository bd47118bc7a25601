"""How near every memory plan's gradients come to the plain step's, on SD1.5's real shapes.

    python benchmarks/train/equal.py                        minutes, and 16 GB
    python benchmarks/train/equal.py --model demo           a small model, seconds

Gradients are compared as one vector, in float32 with the plain step's, and with what the plain step
gives in float64 where `--float64` affords that.
"""

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import torch
import tyro
from torch import Tensor

from benchmarks.lib.real_step import drawn_batch, machine, model_of, step_of
from xlsd_cache.console.libraries import quiet_libraries
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import set_precision
from xlsd_train.config.inputs import Phase
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.step.step import Plan, Step


@dataclass(frozen=True)
class EqualConfig:
    """Compare the plans' gradients."""

    model: Literal["nano", "demo", "sd15"] = "sd15"
    """sd15: its real shapes with random weights."""

    phase: Phase = "unet"
    """As in xlsd-train."""

    batch: int = 2
    """Images."""

    resolution: int = 512
    """Pixels."""

    float64: bool = False
    """Also with float64's gradients: twice the memory, several times the time."""


class Seen(Step):
    """A step that hands over its gradients and changes no weight."""

    gradients: dict[int, Tensor]

    def _update(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self.gradients[id(parameter)] = parameter.grad
                parameter.grad = None
        self._norms.append(torch.zeros(()))


def main(config: EqualConfig, command: Sequence[str]) -> None:
    """Print the table."""
    quiet_libraries()
    precision = set_precision("fp32")
    model = model_of(config.model)
    torch.manual_seed(0)
    for parameter in model.unet.parameters():
        if parameter.dim() > 1:  # as a trained one's: the initial ones leave the skips alone
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    settings = TrainConfig(phase=config.phase, batch=config.batch).resolved()
    n = config.batch
    step = step_of(Seen, model, settings, Plan("plain", n), "cpu")
    side = config.resolution // 8
    batch = drawn_batch(model, n, (side, side), "cpu")
    print(f"machine: {machine('cpu')}")
    print(f"command: {shlex.join(('python', 'benchmarks/train/equal.py', *command))}")
    print(f"precision: {precision}")
    print(f"{config.model}, phase {config.phase}, {side * 8}x{side * 8}, batch {n}; relative error")
    print(f"{'plan':>20}{'loss':>14}{'of plain':>12}{'of float64':>12}{'bit-equal':>14}{'s':>8}")
    exact = None
    if config.float64:
        step.model.unet.double()
        step.model.text_encoder.double()
        wide = replace(batch, latents=batch.latents.double(), noise=batch.noise.double())
        exact = gradients(step, wide, Plan("sliced", 1))[1]
        step.model.unet.float()
        step.model.text_encoder.float()
    plain: list[Tensor] | None = None
    for plan in plans(n):
        begun = time.perf_counter()
        loss, found = gradients(step, batch, plan)
        seconds = time.perf_counter() - begun
        plain = plain or found
        same = sum(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        far = f"{distance(found, exact):12.1e}" if exact else f"{'':12}"
        print(
            f"{plan!s:>20}{loss:14.8f}{distance(found, plain):12.1e}{far}"
            f"{f'{same}/{len(found)}':>14}{seconds:8.1f}",
            flush=True,
        )


def plans(batch: int) -> list[Plan]:
    """The plain step first; the others in one pass and in several."""
    first = [Plan("plain", batch), Plan("cheap", batch), Plan("feed-forward", batch)]
    return [*first, Plan("plain", 1), Plan("cheap", 1), Plan("sliced", batch), Plan("sliced", 1)]


def gradients(step: Seen, batch: Batch, plan: Plan) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients in the order of the parameters."""
    step.plan, step.gradients = plan, {}
    loss, _ = step([batch], 0.0)
    found = [step.gradients[id(p)] for p in step.parameters if id(p) in step.gradients]
    return loss.item(), found


def distance(these: list[Tensor], those: list[Tensor]) -> float:
    """Of all gradients as one vector, relative."""
    pairs = zip(these, those, strict=True)
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(squares / sum(float(b.double().square().sum()) for b in those))


if __name__ == "__main__":
    try:
        main(tyro.cli(EqualConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"equal: {error}")
