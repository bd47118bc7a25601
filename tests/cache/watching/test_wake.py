"""What wakes the watcher."""

from pathlib import Path

from tests.support import wait_for
from xlsd_cache.watching.wake import Wake


def test_a_store_within_a_linked_source_wakes_nobody(tmp_path: Path) -> None:
    images, link = tmp_path / "images", tmp_path / "link"
    (images / "latents").mkdir(parents=True)
    link.symlink_to(images)
    with Wake([link], images / "latents") as wake, Wake([images], link) as other:

        def heard(path: Path) -> bool:
            path.write_text("changed")
            return wake.changed.wait(0.3)

        wait_for(lambda: heard(images / "a.png"))
        wake.changed.clear()
        assert not wake.changed.wait(0.5)
        assert not heard(images / "latents" / "status.json")
        assert not other.changed.is_set()
