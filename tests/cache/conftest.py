from typing import Any

import pytest

from xlsd_cache.encode import Encoder


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
