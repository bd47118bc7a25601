import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import mishaps, picture, wait_for
from xlsd_cache.errors import UserError
from xlsd_cache.images.child import limit_memory
from xlsd_cache.images.decode import decode
from xlsd_cache.images.header import MAX_PIXELS
from xlsd_cache.images.sandbox import Sandbox, decode_nbytes, decoders
from xlsd_cache.outcomes import Rejected

ROOT = Path(__file__).parents[3]
MIB = 2**20


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(seconds=60, nbytes=512 * MIB) as sandbox:
        yield sandbox


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dtype=st.sampled_from(["u1", "f4", "i8"]),
    rest=st.recursive(st.none() | st.binary() | st.text() | st.floats(allow_nan=False), st.lists),
)
@settings(max_examples=50)
def test_what_goes_in_and_out_is_unchanged(
    sandbox: Sandbox, shape: list[int], dtype: str, rest: object
) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    came = sandbox.call(mishaps.same, (array, array.T, array[..., ::2], rest))
    assert isinstance(came, tuple)
    for sent, returned in zip((array, array.T, array[..., ::2]), came[:3], strict=True):
        assert returned.dtype == sent.dtype
        assert np.array_equal(returned, sent)
    assert came[3] == rest


def test_decoding_in_a_child_gives_the_same_pixels(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    Image.fromarray(picture(0)).save(path)
    args = (path.read_bytes(), (160, 128), (8.0, 0.0, 152.0, 128.0), (64, 64))
    here, there = decode(*args), sandbox.call(decode, *args)
    assert not isinstance(here, Rejected)
    assert not isinstance(there, Rejected)
    assert np.array_equal(here, there)


def test_a_child_never_loads_torch(sandbox: Sandbox) -> None:
    sandbox.call(decode, b"", (8, 8), (0.0, 0.0, 8.0, 8.0), (8, 8))
    loaded = sandbox.call(mishaps.modules)
    assert not isinstance(loaded, Rejected)
    assert "PIL.Image" in loaded
    assert not {"torch", "pyarrow", "zarr"} & loaded


def test_what_a_function_raises_is_raised_and_the_child_goes_on(sandbox: Sandbox) -> None:
    child = sandbox.call(os.getpid)
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        sandbox.call(math.sqrt, -1.0)
    with pytest.raises(TypeError, match="pickle"):
        sandbox.call(mishaps.unanswerable)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        sandbox.call(lambda: 0)
    assert sandbox.call(mishaps.shout) == "answer"
    assert sandbox.call(os.getpid) == child != os.getpid()


@pytest.mark.parametrize(
    ("mishap", "detail"),
    [
        (os.abort, "SIGABRT"),
        (mishaps.null_pointer, "SIGSEGV"),
        (mishaps.give_up, "exit status 1"),
        (sys.exit, "exit status 0"),
    ],
)
def test_a_crash_costs_one_call(sandbox: Sandbox, mishap: Callable[[], None], detail: str) -> None:
    before = sandbox.call(os.getpid)
    assert sandbox.call(mishap) == Rejected("decoder_crashed", detail)
    after = sandbox.call(os.getpid)
    assert isinstance(after, int)
    assert after != before


@pytest.mark.parametrize("hang", [mishaps.hang, mishaps.hang_in_c])
def test_a_hang_costs_one_call(hang: Callable[[], None]) -> None:
    with Sandbox(seconds=0.5, nbytes=512 * MIB) as sandbox:
        assert sandbox.call(hang) == Rejected("decoder_hung", "no end after 0.5 seconds")
        assert sandbox.call(math.sqrt, 4.0) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_taking_too_much_memory_costs_one_call(sandbox: Sandbox) -> None:
    assert sandbox.call(len, b"x" * 100 * MIB) == 100 * MIB
    for hog in (mishaps.eat_memory, mishaps.eat_memory_in_c):
        eaten = sandbox.call(hog)
        assert isinstance(eaten, Rejected)
        assert eaten.reason == "too_much_memory"
    assert sandbox.call(math.sqrt, 4.0) == 2


def test_a_call_is_not_blamed_for_what_the_one_before_it_did(sandbox: Sandbox) -> None:
    poisoned = sandbox.call(mishaps.poison)
    assert sandbox.call(os.getpid) == poisoned
    fresh = sandbox.call(mishaps.fragile)
    assert isinstance(fresh, int)
    assert fresh != poisoned


def test_a_child_killed_between_calls_is_replaced(sandbox: Sandbox) -> None:
    child = sandbox.call(os.getpid)
    assert isinstance(child, int)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert isinstance(sandbox.call(os.getpid), int)


def test_threads_share_the_children_and_these_work_at_once(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with Sandbox(60, 512 * MIB, children=2) as sandbox, ThreadPoolExecutor(4) as threads:
        pair = set(threads.map(lambda ab: sandbox.call(mishaps.meet, *ab), ((a, b), (b, a))))
        assert len(pair) == 2
        assert set(threads.map(lambda _: sandbox.call(os.getpid), range(20))) <= pair


def test_closing_ends_every_child_and_a_later_call_starts_one() -> None:
    sandbox = Sandbox(60, 512 * MIB)
    with sandbox:
        child = sandbox.call(os.getpid)
    assert isinstance(child, int)
    assert not psutil.pid_exists(child)
    assert sandbox.call(math.sqrt, 4.0) == 2
    sandbox.close()


def test_an_interrupted_call_s_answer_is_never_the_next_call_s(sandbox: Sandbox) -> None:
    sandbox.call(os.getpid)
    # A shell's background jobs, and so their tests, are started with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.call(time.sleep, 30)
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert sandbox.call(math.sqrt, 4.0) == 2


def test_ctrl_c_is_not_for_the_children(sandbox: Sandbox) -> None:
    child = sandbox.call(os.getpid)
    assert isinstance(child, int)
    assert os.getpgid(child) != os.getpgid(0)  # where the terminal sends it
    os.kill(child, signal.SIGINT)
    assert sandbox.call(os.getpid) == child


@pytest.mark.parametrize("busy", [False, True])
def test_killing_the_parent_leaves_no_children(busy: bool, tmp_path: Path) -> None:
    script = """if True:
        import os, threading
        from tests.support import mishaps
        from xlsd_cache.images.sandbox import Sandbox
        sandbox = Sandbox(seconds=2, nbytes=2**29)
        child = sandbox.call(os.getpid)
        if BUSY:
            threading.Thread(target=sandbox.call, args=(mishaps.hang_in_c, "deaf")).start()
        print(child, flush=True)
        threading.Event().wait()
    """.replace("BUSY", str(busy))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        if busy:  # in the C library's sleep, deaf to its pipe
            wait_for((tmp_path / "deaf").exists)
        parent.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_that_cannot_start_is_an_error_not_a_rejection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "xlsd_cache").mkdir()
    (tmp_path / "xlsd_cache" / "__init__.py").write_text("raise ImportError('broken')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with (
        Sandbox(60, 512 * MIB) as sandbox,
        pytest.raises(UserError, match="cannot start a process to decode"),
    ):
        sandbox.call(os.getpid)


def test_it_works_where_memory_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    limit_memory(MIB)
    assert len(b"x" * 2 * MIB) == 2 * MIB


def take(nbytes: int) -> int:
    """Reserve that much, without touching it."""
    return len(mmap.mmap(-1, nbytes))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a memory limit")
def test_a_larger_limit_of_pixels_gives_more_memory() -> None:
    room = decode_nbytes(MAX_PIXELS)
    assert decode_nbytes(1) == room
    assert decode_nbytes(2 * MAX_PIXELS) == 2 * room
    with pytest.raises(OSError, match="memory"):
        decoders(1).call(take, room)
    assert decoders(1, 2 * MAX_PIXELS).call(take, room) == room


def test_children_that_are_started_ahead_answer_the_calls() -> None:
    mine = psutil.Process()
    before = {child.pid for child in mine.children()}
    with Sandbox(60, 512 * MIB, children=2) as sandbox:
        sandbox.start(3)
        wait_for(lambda: len(mine.children()) >= len(before) + 2)
        started = {child.pid for child in mine.children()} - before
        assert len(started) == 2
        assert {sandbox.call(os.getpid) for _ in range(5)} <= started
