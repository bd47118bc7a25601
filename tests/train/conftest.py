"""What the trainer's tests share: sessions on the small model and store."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlsd_train.config import sd15
from xlsd_train.config.train import TrainConfig
from xlsd_train.model.latent_scaling import LatentScaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.step.objective import make_objective
from xlsd_train.step.step import Plan, Step
from xlsd_train.training.session import Session, open_session

Open = Callable[..., Session]


def bare_step(config: TrainConfig, plan: Plan, unet: Any, text_encoder: Any) -> Step:
    """A step of these networks on the CPU, with neither store nor tokenizer."""
    unet.requires_grad_(config.phase != "te")
    text_encoder.requires_grad_(config.phase != "unet")
    trained = [p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad]
    model: Any = SimpleNamespace(
        unet=unet, text_encoder=text_encoder, scaling=LatentScaling.of([0] * 4, [1] * 4, False),
        encode=lambda ids: text_encoder(ids).last_hidden_state,
    )  # fmt: skip
    alone: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, config.precision == "bf16"),
    )  # fmt: skip
    optimizer = make_optimizer(config, trained)
    objective = make_objective("eps", "none", 0, sd15.SCHEDULER)
    return Step(model, trained, optimizer, objective, alone, plan)


@pytest.fixture
def arguments(model: Path, store: Path, tmp_path: Path) -> list[object]:
    """A run of six steps in tmp_path/run; many files have another of their own."""
    return [
        "--phase", "unet", "--batch", 4, "--data", store, "--model", model, "--steps", 6,
        "--save-every", 2, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--out", tmp_path / "run",
    ]  # fmt: skip


@pytest.fixture
def open_run(model: Path, store: Path, tmp_path: Path) -> Iterator[Open]:
    """Open a session with these settings; closed at the test's end."""
    with ExitStack() as stack:

        def open_(**settings: Any) -> Session:
            given: dict[str, Any] = {
                "phase": "unet",
                "batch": 4,
                "data": store,
                "model": str(model),
                "out": tmp_path / "run",
                "steps": 10,
                "warmup": "0",
                "device": "cpu",
                "threads": 1,
                **settings,
            }
            given["data"] = (str(given["data"]),)
            return stack.enter_context(open_session(TrainConfig(**given), []))

        yield open_
