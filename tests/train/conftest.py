"""What the trainer's tests share: sessions on the small model and store."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from xlsd_train.config import TrainConfig
from xlsd_train.session import Session, open_session

Open = Callable[..., Session]


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
