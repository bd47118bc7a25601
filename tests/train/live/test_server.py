"""What the server gives and refuses, and that a reader misses nothing."""

import asyncio
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvicorn

from tests.support import files, train, wait_for
from tests.support.live import Served, append, begin_of, events, get, serving
from xlsd_train.live import follow
from xlsd_train.live.follow import Position, from_id, to_id
from xlsd_train.live.runs import Runs
from xlsd_train.live.server import application
from xlsd_train.runs.history import histories


@pytest.fixture(scope="module")
def trained(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with samples and validation; not to be written to."""
    run = tmp_path_factory.mktemp("live") / "run"
    words = [
        "--phase", "te", "--batch", 3, "--data", store, "--model", model, "--steps", 3, "--lr",
        1e-3, "--warmup", 0, "--threads", 1, "--sample-every", 3, "--sample-steps", 1,
        "--validate-every", 3, "--validation-fraction", 0.4, "--out", run,
    ]  # fmt: skip
    assert train(*words) == 0
    return run


@pytest.fixture(scope="module")
def served(trained: Path) -> Iterator[Served]:
    with serving(trained) as found:
        yield found


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be written to, without weights."""
    without = shutil.ignore_patterns("base", "*.safetensors", "tensorboard")
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=without))


def test_the_page_and_its_pictures(trained: Path, served: Served) -> None:
    before = files(trained, "**/*")
    status, html, headers = get(served.url)
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("frame-ancestors 'none'")
    assert b"default-src 'none'; img-src data: blob: 'self'; connect-src 'self'; style" in html
    assert b"data:image" not in html
    path = "samples/0/step-00000003/00"
    assert f'"{path}.webp"'.encode() in html
    picture = (trained / "samples/step-00000003/00.png").read_bytes()
    status, content, headers = get(f"{served.url}{path}.png")
    assert (status, content) == (200, picture)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert get(f"{served.url}{path}.webp")[1][8:12] == b"WEBP"
    assert files(trained, "**/*") == before


def test_nothing_is_written_for_a_picture_without_a_thumbnail(run: Path) -> None:
    thumbnail = run / "samples/step-00000003/00.webp"
    thumbnail.unlink()
    with serving(run) as it:
        assert get(f"{it.url}samples/0/step-00000003/00.webp")[1][8:12] == b"WEBP"
    assert not thumbnail.exists()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_requests_for_another_host_are_refused(served: Served, host: str) -> None:
    for path in ("", "events?from=0.0.0.0.0", "samples/0/step-00000003/00.png"):
        assert get(served.url + path, Host=host)[0] == 400
    assert get(served.url, Host="localhost:1234")[0] == 200


@pytest.mark.parametrize(("host", "at"), [("::1", "[::1]"), ("LocalHost", "LocalHost")])
def test_addresses_of_ipv6_and_names_in_capitals_are_served(
    trained: Path, host: str, at: str
) -> None:
    with serving(trained, host=host, at=at) as it:
        # A browser sends names in small letters.
        assert get(it.url, Host=it.url.lower()[len("http://") : -1])[0] == 200
        assert get(it.url, Host="evil.example")[0] == 400


def test_a_page_of_a_quiet_run_says_for_how_long(run: Path) -> None:
    with serving(run, code="import xlsd_train.live.server as it; it.RENEW_S = 0.0") as it:
        for quiet_s in (10, 5000):
            os.utime(run / "metrics.jsonl", (0, time.time() - quiet_s))
            found = re.search(rb'"quiet_s": ?(\d+)', get(it.url)[1])
            assert found is not None
            assert quiet_s <= int(found[1]) < quiet_s + 60


def test_requests_from_another_page_are_refused(served: Served) -> None:
    own = served.url.rstrip("/")
    for path in ("", "events?from=0.0.0.0.0", "samples/0/step-00000003/00.png"):
        for origin in ("http://evil.example", own.replace("127.0.0.1", "localhost"), "null"):
            assert get(served.url + path, Origin=origin)[0] == 403
    assert get(served.url, Origin=own)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "config.json", "metrics.jsonl", "samples/", "samples/0/", "samples/0/step-00000003/",
        "samples/0/../config.json", "samples/0/..%2Fconfig.json", "samples/0/step-00000003/..",
        "samples/0/step-00000003/..%2F..%2F..%2Fconfig.json", "samples/1/step-00000003/00.png",
        "samples/-1/step-00000003/00.png", "samples/0/step-00000003/00.txt",
        "samples/0/step-00000003/99.png", "samples/0/step-3/00.png", "samples/0/%2Fetc/passwd",
        "samples/0/step-00000003/00.png%00", "samples/0//00.png", "samples/0/step-00000003/99.webp",
    ],
)  # fmt: skip
def test_nothing_but_samples_is_served(served: Served, path: str) -> None:
    assert get(served.url + path)[0] == 404


def test_other_methods_are_refused(served: Served) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert get(served.url, method)[0] == 405


def test_links_lead_nowhere(run: Path, trained: Path) -> None:
    """Also ones that come while the server runs."""
    outside = trained / "samples/step-00000003"
    with serving(run) as it:
        (run / "samples/step-00000001").symlink_to(outside)
        (run / "samples/step-00000002").mkdir()
        (run / "samples/step-00000002/00.png").symlink_to(outside / "00.png")
        for name in ("1/00.png", "1/00.webp", "2/00.png", "2/00.webp"):
            assert get(f"{it.url}samples/0/step-0000000{name}")[0] == 404
        status, content, _ = get(it.url)
        assert status == 503
        assert b"is a link to" in content


def test_a_reader_resumes_at_the_last_event(run: Path) -> None:
    with serving(run) as it:
        begin = begin_of(get(it.url)[1])
        with events(it.url, begin) as found:
            append(run, 4, 2)
            first = next(found)
        assert first.name == "steps"
        assert first.data["columns"]["step"] == [4, 5]
        assert first.data["columns"]["loss"] == [0.25, 0.25]
        assert int(first.id.split(".")[1]) == (run / "metrics.jsonl").stat().st_size
        append(run, 6, 3, end="")  # the last line is unfinished
        with events(it.url, begin, last=first.id) as found:
            assert next(found).data["columns"]["step"] == [6, 7]
            append(run, 9, 0)  # ends that line
            assert next(found).data["columns"]["step"] == [8]
        with events(it.url, begin) as found:  # and from the page's position all again
            assert next(found).data["columns"]["step"] == [4, 5, 6, 7, 8]
        for bad in ("", "x", "1.2.3", "1.2.3.4.5_1.2.3.4.5", "1.2.3.4.-5"):
            assert get(f"{it.url}events?from={bad}")[0] == 400


def test_samples_validation_and_a_cut_log_are_told(run: Path) -> None:
    with serving(run) as it, events(it.url, begin_of(get(it.url)[1])) as found:
        (run / "samples/grid.png").touch()
        assert next(found).name == "changed"
        line = (run / "validation.jsonl").read_text().splitlines()[0]
        with (run / "validation.jsonl").open("a") as log:
            log.write(line + "\n")
        assert next(found).name == "changed"
        kept = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
        (run / "metrics.jsonl").write_bytes(kept)
        cut = next(found)
        assert cut.name == "reset"
        assert int(cut.id.split(".")[1]) == len(kept)
        append(run, 2, 1)
        assert next(found).data["columns"]["step"] == [2]


def test_a_log_that_was_replaced_and_grew_again_is_told(run: Path) -> None:
    """As when the run was resumed while the reader was away."""
    append(run, 4, 3)
    with serving(run) as it:
        begin = begin_of(get(it.url)[1])
        log = run / "metrics.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        (run / "new").write_bytes(b"".join(lines[:4]))
        (run / "new").replace(log)
        append(run, 5, 9)
        with events(it.url, begin) as found:
            assert next(found).name == "reset"
            append(run, 14, 1)
            assert next(found).data["columns"]["step"] == [14]


def test_a_run_that_was_started_anew_under_its_name_is_told(run: Path) -> None:
    """Its log may get the inode of the old one's, and grow beyond it."""
    with serving(run) as it:
        begin = begin_of(get(it.url)[1])
        (run / "config.json").write_bytes((run / "config.json").read_bytes())
        (run / "metrics.jsonl").write_bytes(b"")  # the same inode
        append(run, 1, 50)
        with events(it.url, begin) as found:
            assert next(found).name == "reset"


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_ends_the_server_though_readers_are_slow(run: Path, number: int) -> None:
    append(run, 4, 100_000)
    with serving(run) as it, ExitStack() as open_:
        address = "127.0.0.1", int(it.url.rstrip("/").rpartition(":")[2])
        for begin in ("0.0.0.0.0", to_id([Position.of(run)])):
            client = open_.enter_context(socket.create_connection(address))
            client.sendall(f"GET /events?from={begin} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert client.recv(9) == b"HTTP/1.1 "
        server = psutil.Process(it.pid)
        server.send_signal(number)
        wait_for(lambda: server.status() == psutil.STATUS_ZOMBIE)  # `serving` checks its code


def test_a_refresh_reads_only_what_was_appended(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"")
    append(run, 1, 20_000)
    size = (run / "metrics.jsonl").stat().st_size
    with serving(run) as it:
        get(it.url)
        server = psutil.Process(it.pid)
        before = server.io_counters().read_chars
        assert before > size
        for step in range(20_001, 20_011):
            append(run, step, 1)
            assert f'"step": {step}'.encode() in get(it.url)[1]
        read = (server.io_counters().read_chars - before) / 10
    print(f"{read:.0f} bytes read per page of a log of {size}")
    assert read < size / 10


def test_what_was_read_piece_by_piece_is_what_the_logs_hold(run: Path) -> None:
    log, runs = run / "metrics.jsonl", Runs([run])
    lines = log.read_bytes().splitlines(keepends=True)

    def read() -> int:
        (now,), (fresh,) = runs.read(runs.look()), histories([run])
        assert replace(now, series={}) == replace(fresh, series={})
        for name, series in fresh.series.items():  # sums may be rounded otherwise
            for one, other in zip(astuple(now.series[name]), astuple(series), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12)
        return int(now.last["step"])

    append(run, 4, 2, end="")  # the last line is unfinished
    assert read() == 4
    append(run, 6, 0)  # ends it
    append(run, 6, 5000)
    assert read() == 5005
    (run / "new").write_bytes(b"".join(lines[:2]))  # the run is resumed,
    (run / "new").replace(log)
    assert read() == 2
    append(run, 3, 7000)
    (run / "new").write_bytes(b"".join(lines[:1]))  # and again, and has grown beyond
    (run / "new").replace(log)
    append(run, 2, 9000)
    assert read() == 9001
    text = log.read_text()
    log.write_text(text.replace("0.25", "0.75"))  # in place
    assert read() == 9001
    with (run / "validation.jsonl").open("a") as file:
        file.write((run / "validation.jsonl").read_text().replace('"step": 3', '"step": 9'))
    read()
    (run / "validation.jsonl").write_text("")
    read()


def test_a_sweep_is_followed_and_a_deleted_run_stays(run: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    shutil.copytree(run, sweep / "lr-1")
    with serving(sweep) as it, events(it.url, begin_of(get(it.url)[1])) as found:
        shutil.copytree(run, tmp_path / "lr-2")
        (tmp_path / "lr-2").rename(sweep / "lr-2")
        told = next(found)
        assert (told.name, told.data["run"]) == ("changed", 1)
        append(sweep / "lr-2", 4, 1)
        assert next(found).data["run"] == 1
        shutil.rmtree(sweep / "lr-1")
        assert next(found).name == "reset"
        status, page, _ = get(it.url)
        assert status == 200
        assert b'"gone": true' in page
        assert b"samples/0/" not in page
        assert b"samples/1/" in page
    assert train("live", run, sweep, sweep) == 1


def test_a_long_log_comes_in_parts_and_whole(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"")
    append(run, 1, 20_000)
    with (run / "metrics.jsonl").open("a") as log:
        log.write("no json\n" + "x" * (2 * follow.CHUNK) + "\n")
    append(run, 20_001, 1)
    seen: list[int] = []
    with serving(run) as it, events(it.url, "0.0.0.0.0") as found:
        while seen[-1:] != [20_001]:
            event = next(found)
            if event.name == "steps":
                seen += event.data["columns"]["step"]
                assert len(event.data["columns"]["step"]) <= follow.CHUNK // 100
    assert seen == list(range(1, 20_002))


def test_several_runs_are_told_in_one_stream(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    with serving(run, other) as it, events(it.url, begin_of(get(it.url)[1])) as found:
        append(other, 4, 1)
        assert next(found).data["run"] == 1
        append(run, 4, 1)
        assert next(found).data["run"] == 0


def test_positions_are_ids() -> None:
    positions = [Position(1, 2, 3, 4, 5), Position(5, 6, 7, 8, 9)]
    assert from_id(to_id(positions), 2) == from_id(to_id(positions), 3) == positions
    assert from_id(to_id(positions), 1) is None


def test_readers_that_go_away_leave_no_task(run: Path) -> None:
    """Also while they catch up with a long log."""
    (run / "metrics.jsonl").write_bytes(b"")
    append(run, 1, 50_000)
    app = application(Runs([run]), "127.0.0.1", lambda: server.should_exit)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http="h11", loop="asyncio")
    )
    loops: list[Any] = []

    async def serve(listening: socket.socket) -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    async def count() -> int:
        return len(asyncio.all_tasks())

    def tasks() -> int:
        return asyncio.run_coroutine_threadsafe(count(), loops[0]).result(60)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        wait_for(lambda: server.started)
        idle = tasks()
        for begin in ("0.0.0.0.0", to_id([Position.of(run)])):
            clients = [socket.create_connection(address) for _ in range(8)]
            for client in clients:
                request = f"GET /events?from={begin} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
                client.sendall(request.encode())
                assert client.recv(9) == b"HTTP/1.1 "
            assert tasks() >= idle + 8
            for client in clients:
                client.close()
            wait_for(lambda: tasks() <= idle)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def test_what_cannot_be_served_is_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert train("live", trained, "--port", taken.getsockname()[1]) == 1
        assert "and a free --port" in capsys.readouterr().err
    assert train("live", tmp_path) == 1
    assert "is not a run" in capsys.readouterr().err
    assert train("live", trained, "--host", "0.0.0.0") == 1
    assert "no address that a browser can open" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_bounded_over_100_000_events(run: Path) -> None:
    """Polls without a pause; each event is one step, as in a run with steps of half a second."""
    (run / "metrics.jsonl").write_bytes(b"")
    sizes = {}
    with serving(run, code="import xlsd_train.live.follow as it; it.POLL_S = 0") as it:
        begin = begin_of(get(it.url)[1])
        server = psutil.Process(it.pid)
        with events(it.url, begin) as found:
            for step in range(1, 100_001):
                append(run, step, 1)
                assert next(found).data["columns"]["step"] == [step]
                if step in {1000, 100_000}:
                    sizes[step] = server.memory_info().rss / 2**20
    print({step: f"{size:.1f} MiB" for step, size in sizes.items()})
    assert sizes[100_000] - sizes[1000] <= 20
