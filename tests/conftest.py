"""Fixtures: real photos, a small real model and a store of both, made once a session."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from benchmarks.demo.photos import write_photos
from benchmarks.demo.pipeline import make_pipeline, read_captions
from tests.support import cache
from tests.support.sessions import Open
from xlsd_cache import UserError
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.planning import probe
from xlsd_train.config.train import TrainConfig
from xlsd_train.training.session import Session, open_session

# Found examples must be found again, and nothing here is about time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums must not depend on the machine; and accelerate keeps its state in the process."""
    torch.set_num_threads(1)
    UserError.names_flags = True  # as on the command line, whose messages the tests look for
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


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the real encoder encodes."""
    sizes: list[int] = []
    encode = Encoder.encode

    def counting(self: Encoder, pixels: Any) -> Any:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", counting)
    return sizes


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are really opened."""
    names: list[str] = []
    for name in ("open_source", "read_source"):
        real = getattr(probe, name)

        def counting(source: str, *most: int, real: Any = real) -> Any:
            names.append(source)
            return real(source, *most)

        monkeypatch.setattr(probe, name, counting)
    return names
