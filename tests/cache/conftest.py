from typing import Any

import pytest

from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.planning import probe as headers


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
        real = getattr(headers, name)

        def counting(source: str, *most: int, real: Any = real) -> Any:
            names.append(source)
            return real(source, *most)

        monkeypatch.setattr(headers, name, counting)
    return names
