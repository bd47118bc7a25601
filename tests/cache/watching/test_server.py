"""The page, JSON, metrics and health of a watcher, over HTTP."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.browser import chromium, faults
from tests.support.live import get
from xlsd_cache.errors import UserError
from xlsd_cache.watching.server import serving
from xlsd_cache.watching.status import LONGEST, STATES, Status, StatusFile

SUMS = {
    "scanned": 9, "encoded": 3, "reused": 2, "duplicate": 1, "rejected": {"truncated": 3},
    "pending": 0, "buckets": {"64x64": 5}, "live": 5,
}  # fmt: skip
NOW = Status("idle", 3, SUMS, waiting=2, unsettled=1, passes=7, encoded=4, heartbeat=time.time())


class Told:
    """A status that tests change."""

    now = NOW


@pytest.fixture(autouse=True)
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "now", replace(NOW, heartbeat=time.time()))


@contextmanager
def served(capsys: pytest.CaptureFixture[str], patience_s: float = 60.0) -> Iterator[str]:
    with serving("127.0.0.1", 0, "latents", lambda: Told.now, patience_s):
        yield capsys.readouterr().out.strip()


def test_the_four_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(capsys) as url:
        status, html, headers = get(url)
        assert status == 200
        assert headers["Refresh"] == "5"
        assert headers["Content-Security-Policy"].startswith("frame-ancestors 'none'")
        assert b"5 images" in html
        assert b"the file ends before its picture does" in html
        told = json.loads(get(f"{url}status.json")[1])
        assert told == Told.now.as_json()
        assert get(f"{url}healthz")[:2] == (200, b"ok\n")
        _, text, headers = get(f"{url}metrics")
        assert headers["Content-Type"].startswith("text/plain; version=")
        families = {it.name: it for it in text_string_to_metric_families(text.decode())}
        assert all(it.documentation for it in families.values())
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for it in families.values() for sample in it.samples
        }  # fmt: skip
        for name, value in {
            ("xlsd_watch_generation",): 3,
            ("xlsd_watch_waiting_images",): 2,
            ("xlsd_watch_unsettled_images",): 1,
            ("xlsd_watch_passes_total",): 7,
            ("xlsd_watch_encoded_images_total",): 4,
            ("xlsd_watch_state", "idle"): 1,
            ("xlsd_watch_state", "paused"): 0,
            ("xlsd_watch_images", "live"): 5,
            ("xlsd_watch_rejected_images", "truncated"): 3,
        }.items():
            assert values[name] == value, name
        assert families["xlsd_watch_encoded_images"].type == "counter"
        assert values[("process_resident_memory_bytes",)] > 2**20
        for state in ("paused", "refused"):
            why = replace(
                Told.now, state=state, failing_since=time.time() - 30, last_error="<b>full"
            )
            monkeypatch.setattr(Told, "now", why)
            assert b"&lt;b&gt;full" in get(url)[1]
            assert get(f"{url}healthz")[0] == 200
        monkeypatch.setattr(Told, "now", replace(why, failing_since=time.time() - 90))
        status, text, _ = get(f"{url}healthz")
        assert (status, text[:14]) == (503, b"failing for 90")
        monkeypatch.setattr(Told, "now", replace(NOW, heartbeat=time.time() - 66))
        assert get(f"{url}healthz")[0] == 503
        monkeypatch.setattr(Told, "now", replace(Told.now, state="encoding"))
        assert get(f"{url}healthz")[0] == 200
        monkeypatch.setattr(Told, "now", Status())  # before anything is known
        assert b"0 images" in get(url)[1]
        assert b"xlsd_watch_generation -1.0" in get(f"{url}metrics")[1]


def test_nothing_else_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with served(capsys) as url:
        for path in ("", "status.json", "metrics", "healthz"):
            for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
                assert get(url + path, Host=host)[0] == 400
            for method in ("POST", "PUT", "DELETE"):
                assert get(url + path, method)[0] == 405
        assert get(url, Host="localhost:1234")[0] == 200
        for path in ("manifest", "../status.json", "..%2f..%2fetc/passwd", "index.arrow"):
            assert get(url + path)[0] == 404
        port = url.rpartition(":")[2].strip("/")
        with (
            pytest.raises(UserError, match=f"cannot serve at 127.0.0.1:{port}"),
            serving("127.0.0.1", int(port), "x", lambda: NOW, 1.0),
        ):
            pass


def test_the_page_in_a_browser(capsys: pytest.CaptureFixture[str]) -> None:
    with served(capsys) as url, chromium() as browser:
        page, printed = browser.new_page(), []
        page.on("console", lambda message: printed.append(message.text))
        page.on("pageerror", lambda error: printed.append(str(error)))
        page.goto(url)
        assert page.title() == "latents: idle"
        assert page.locator("#reasons td").count() == 2
        assert printed == []
        assert faults(page) == []


def test_the_file_is_whole_at_any_time(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    file, end = StatusFile(tmp_path), threading.Event()

    def write() -> None:
        while not end.is_set():
            file.set("encoding", encoded=file.now.encoded + 1, sums=SUMS)

    file.set()
    thread = threading.Thread(target=write)
    thread.start()
    seen: list[int] = []
    while len(set(seen)) < 50:
        seen.append(json.loads(file.path.read_bytes())["encoded"])
    end.set()
    thread.join()
    assert seen == sorted(seen)
    assert list((tmp_path / "staging").iterdir()) == []
    file.failed("paused", 0.1, "long " * 1000)
    assert len(file.now.last_error) <= LONGEST


def test_a_disk_that_is_full_keeps_the_old_file(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "gone")
    file.set("idle", waiting=3)
    assert file.now.waiting == 3
    assert not (tmp_path / "gone").exists()


def test_the_guide_has_every_field_and_state() -> None:
    guide = (Path(__file__).parents[3] / "docs/guides/watch-a-folder.md").read_text()
    named = {cell for row in re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE)
             for cell in re.findall(r"`(\w+)`", row)}  # fmt: skip
    wanted = {field.name for field in fields(Status)} | {"oldest_waiting_s"} | STATES.keys()
    assert wanted <= named
