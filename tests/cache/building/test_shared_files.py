"""A machine that sees other files or other locks helps with no store."""

from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.stores import empty_store
from xlsd_cache.building.shared_files import check_shared, locked_probe
from xlsd_cache.errors import UserError


def test_what_another_machine_must_see(tmp_path: Path) -> None:
    store = empty_store(tmp_path / "l", 4).manifest
    photos, unmounted = tmp_path / "photos", tmp_path / "unmounted"
    photos.mkdir()
    unmounted.mkdir()
    (photos / "a.png").write_bytes(b"")
    with locked_probe(store.root) as probe:
        check_shared(probe, [photos, photos / "a.png"])
        check_shared(probe, [])
        for missing in (unmounted, tmp_path / "none", photos / "none.tar"):
            with pytest.raises(UserError, match=f"^{missing} is not there; all machines need"):
                check_shared(probe, [photos, missing])
    assert list(store.staging.iterdir()) == []
    with pytest.raises(UserError, match="is not there; all machines need"):
        check_shared(probe, [photos])  # as on a machine with another folder of that name
    probe.touch()  # as on a machine that sees files but no locks
    with pytest.raises(UserError, match="^the lock on .* of another machine is not seen; mount"):
        check_shared(probe, [photos])
    with FileLock(probe):
        check_shared(probe, [photos])
