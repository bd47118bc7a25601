"""Average the weights of a run's checkpoints directly, to compare with the EMA."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from xlsd_train.optim.ema_profiles import gamma_of
from xlsd_train.runs.layout import checkpoints


def trajectory(run: Path) -> list[dict[str, torch.Tensor]]:
    """The trained weights after each step, under the names of the EMA file."""
    return [
        {
            name.replace("text_model.", "text_encoder.", 1): value.double()
            for name, value in load_file(path / "text_encoder.safetensors").items()
        }
        for path in checkpoints(run)
    ]


def power_average(steps: list[dict[str, torch.Tensor]], sigma: float, every: int = 1) -> Any:
    """The power-function average of a trajectory, from the formula."""
    taken = steps[every - 1 :: every]
    counts = np.diff((np.arange(len(taken) + 1) / len(taken)) ** (gamma_of(sigma) + 1))
    return {
        name: sum(count * step[name] for count, step in zip(counts, taken, strict=True))
        for name in steps[0]
    }
