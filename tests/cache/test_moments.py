from pathlib import Path

import numpy as np
import pytest

from xlsd_cache import moments as module
from xlsd_cache.moments import moments
from xlsd_cache.store import LatentStore


def test_moments_are_those_of_all_latents(store: Path) -> None:
    with LatentStore.open(store) as ours:
        parts = [ours.read(name, rows) for name, rows in ours.buckets.items()]
        found = moments(ours)
    values = np.concatenate([part.swapaxes(0, 1).reshape(4, -1) for part in parts], axis=1)
    assert found.samples == sum(len(part) for part in parts)
    assert found.mean == pytest.approx(values.mean(axis=1, dtype=np.float64), rel=1e-6)
    assert found.std == pytest.approx(values.std(axis=1, dtype=np.float64), rel=1e-6)


def test_of_many_samples_an_even_part_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED", 4)
    with LatentStore.open(store) as ours:
        assert moments(ours).samples == sum(
            len(range(0, len(rows), len(ours) // 4)) for rows in ours.buckets.values()
        )
        assert moments(ours) == moments(ours)
