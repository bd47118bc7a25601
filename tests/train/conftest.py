from pathlib import Path

import pytest


@pytest.fixture
def arguments(model: Path, store: Path, tmp_path: Path) -> list[object]:
    """A run of six steps in tmp_path/run; many files have another of their own."""
    return [
        "--phase", "unet", "--batch", 4, "--data", store, "--model", model, "--steps", 6,
        "--save-every", 2, "--sample-every", 0, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--out", tmp_path / "run",
    ]  # fmt: skip
