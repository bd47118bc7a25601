"""Real photos, a real small model and a store of them, made once a session; nothing is mocked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import make_pipeline, read_captions
from tests.support import cache

# Found examples must be found again, and nothing here is about time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums must not depend on the machine; and accelerate keeps its state in the process."""
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos with captions; not to be written to."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    write_photos(folder)
    return folder


@pytest.fixture(scope="session")
def model(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in SD1.5's layout; not to be written to."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    make_pipeline(folder, "nano", read_captions(photos))
    return folder


@pytest.fixture(scope="session")
def vae(model: Path) -> Path:
    """The model's VAE."""
    return model / "vae"


@pytest.fixture(scope="session")
def store(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the photos in two buckets; not to be written to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("store") / "latents"
    done = cache("build", photos, "--out", folder, "--vae", vae, "--resolution", 128, "--batch", 4)
    assert done == 0
    return folder
