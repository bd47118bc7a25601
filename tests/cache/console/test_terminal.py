"""Output to terminals of every encoding, to closed pipes and to no terminal, in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xlsd_cache
from tests.support import cache, files, write_images
from xlsd_cache.console.terminal import say_json, shown
from xlsd_cache.store.reader import LatentStore

Out = pytest.CaptureFixture[str]
CAPTIONS = ("captions", "--from", ".", "--columns", "txt")  # starts without torch: in a second
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # of names as well


def program(
    *args: object, module: str = "xlsd_cache", env: dict[str, str] | None = None, **options: Any
) -> Any:
    """A command line in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", module, *map(str, args)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    paths = os.pathsep.join(sys.path)
    told = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, env=told, check=False, **given)


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("name", "as_shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("del\x7f c1\x9b\x85", "del\\x7f c1\\x9b\\x85"),
        ("photo\u202egnp.exe\u2066\u200e", "photo\\u202egnp.exe\\u2066\\u200e"),
        ("l\u2028p\u2029bom\ufeff\u200b", "l\\u2028p\\u2029bom\\ufeff\\u200b"),
        ("byte\udcff lone\ud800", "byte\\udcff lone\\ud800"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("写真 é 👩\u200d🎨 \u0646\u200c", "写真 é 👩\u200d🎨 \u0646\u200c"),  # as it is
    ],
)
def test_control_characters_are_shown_escaped(name: str, as_shown: str) -> None:
    assert shown(name) == as_shown


def test_json_stays_exact_and_harmless(capsys: Out) -> None:
    for name in ("a\u202eb\x9b\x7f", "写真🙂", "\ud800", "two\nlines"):
        say_json({name: [name]})
        printed = capsys.readouterr().out
        assert json.loads(printed) == {name: [name]}
        assert not {*printed} & {"\u202e", "\x9b", "\x7f", "\ud800"}


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"LC_ALL": "C.UTF-8"}, "写é\\x1b[2J\\udcff"),
        ({"PYTHONIOENCODING": "cp1252"}, "\\u5199é\\x1b[2J\\udcff"),
        (ASCII, "\\u5199\\xe9\\x1b[2J\\udcff"),
        ({"LC_ALL": "POSIX"}, "写é\\x1b[2J\\udcff"),
        ({**ASCII, "PYTHONIOENCODING": "latin-1"}, "\\u5199é\\x1b[2J\\udcff"),
    ],
)
def test_every_encoding_of_the_terminal_will_do(env: dict[str, str], told: str) -> None:
    done = program(*CAPTIONS, "写é\x1b[2J\udcff", env={"LC_ALL": "C.UTF-8", **env})
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    (line,) = done.stderr.decode(encoding).splitlines()
    assert done.returncode == 1
    assert line.startswith(f"xlsd-cache: no latent store in {told}: ")


def test_a_name_is_good_in_every_locale(vae: Path, tmp_path: Path) -> None:
    """Under an ASCII locale the same images give the same keys and the same bytes."""
    write_images(tmp_path / "写真", ["é.png", "ascii.png", "お\u0301.png"], width=64, height=64)
    rest = ("--vae", vae, "--resolution", 64, "--batch", 1)
    assert cache("build", tmp_path / "写真", "--out", tmp_path / "here", *rest) == 0
    done = program("build", tmp_path / "写真", "--out", tmp_path / "l", *rest, env=ASCII)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"3 scanned = 3 encoded + 0 reused + 0 duplicate + 0 rejected" in done.stdout
    assert done.stdout.isascii()
    with LatentStore.open(tmp_path / "l") as one, LatentStore.open(tmp_path / "here") as two:
        assert one.samples.equals(two.samples)
    parts = "latents.zarr/**/*"
    assert files(tmp_path / "l", parts) == files(tmp_path / "here", parts)


@pytest.mark.parametrize("module", ["xlsd_cache", "xlsd_train"])
def test_a_reader_that_leaves_ends_a_help_text_as_it_ends_cat(module: str) -> None:
    done = program("--help", module=module, stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
    env = {"PYTHONUNBUFFERED": "1"}  # as torchrun starts its processes
    done = program("--help", module=module, stdout=closed_pipe(), env=env)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("module", ["xlsd_cache", "xlsd_train"])
def test_nobody_need_listen_to_an_error(module: str) -> None:
    words = (*CAPTIONS, "nothing") if module == "xlsd_cache" else ("--phase", "te", "--batch", "0")
    for stderr in (closed_pipe(), subprocess.DEVNULL):
        done = program(*words, module=module, stderr=stderr)
        assert (done.returncode, done.stdout) == (1, b"")


def test_what_is_made_is_made_without_a_reader(store: Path, tmp_path: Path) -> None:
    """A command that writes a file succeeds although nobody reads its output."""
    out = tmp_path / "index.parquet"
    for closed in ("stdout", "stderr"):
        options: dict[str, Any] = {closed: closed_pipe()}
        done = program("export-index", store, out, **options)
        assert done.returncode == 0
        assert b"Traceback" not in (done.stderr or b"")
        assert out.exists()
        out.unlink()


def script(code: str, **options: Any) -> Any:
    """Lines of Python, after those that prepare a program's streams."""
    words = [sys.executable, "-c", f"from xlsd_cache.console.terminal import *\nstart()\n{code}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(words, check=False, **{**pipes, **options})


def test_without_buffers_text_is_written_at_once() -> None:
    """By a process that has no time to flush; images of containers set this variable."""
    code = "print('data')\nprint('a line', file=sys.stderr)\nos._exit(0)"
    done = script(code, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert (done.stdout, done.stderr) == (b"data\n", b"a line\n")


def test_a_package_that_is_missing_is_one_sentence() -> None:
    """Python without its site-packages; a module of ours that is missing is a bug."""
    found = {**os.environ, "PYTHONPATH": str(Path(xlsd_cache.__file__).parents[1])}
    words = ["-S", "-c", "import sys\nfrom xlsd_cache.console.terminal import run\n"]
    for module, told in (("torch.nn", True), ("xlsd_cache.nothing", False)):
        code = f"sys.exit(run('prog', lambda: __import__('{module}')))"
        done = subprocess.run(
            [sys.executable, *words[:-1], words[-1] + code],
            env=found, capture_output=True, text=True, check=False,
        )  # fmt: skip
        sentence = "prog: the package torch is not installed; run `pip install xlsd`\n"
        assert (done.returncode, done.stderr == sentence) == (1, told)


@pytest.mark.parametrize("command", ["lambda: 0", "lambda: signal.raise_signal(signal.SIGINT)"])
def test_ctrl_c_while_a_process_ends_prints_no_traceback(command: str) -> None:
    """Here its last moment: what libraries do at exit."""
    late = "import atexit\natexit.register(signal.raise_signal, signal.SIGINT)"
    typed = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a CI may ignore it
    done = script(f"{late}\n{typed}\nsys.exit(run('prog', {command}))")
    assert done.returncode == -signal.SIGINT
    assert done.stderr in {b"", b"prog: stopped at once\n"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
def test_a_full_device_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        done = program("--help", stdout=full)
        assert done.returncode == 1
        assert done.stderr == b"xlsd-cache: cannot write to stdout: No space left on device\n"
        done = program("info", "nothing", stderr=full)
        assert done.returncode == 1


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0)])
def test_closed_descriptors_are_no_files(redirect: str, code: int) -> None:
    shell = f'exec "$0" -m xlsd_cache --help {redirect}'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", "-c", shell, sys.executable]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_files_never_become_a_closed_stdout(vae: Path, tmp_path: Path) -> None:
    """What libraries print to descriptor 2 must not land in a shard that was opened as number 2."""
    write_images(tmp_path / "im", ["a.png", "b.png"], width=64, height=64)
    shell = 'exec "$0" -m xlsd_cache build "$1" --out "$2" --vae "$3" --resolution 64 >&- 2>&- <&-'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    paths = map(str, (tmp_path / "im", tmp_path / "l", vae))
    done = subprocess.run(["sh", "-c", shell, sys.executable, *paths], env=env, check=False)
    assert done.returncode == 0
    assert cache("check", tmp_path / "l") == 0


def test_hostile_names_reach_the_terminal_escaped(vae: Path, tmp_path: Path, capsys: Out) -> None:
    folder = tmp_path / "im\x1b[31m\nnext"
    write_images(folder, ["a\x1b]0;x\x07\r.png", "b\u202egnp.png"], width=64, height=64)
    shutil.copy(folder / "b\u202egnp.png", folder / "z\nz.png")
    rest = ("--out", tmp_path / "l\x9b", "--vae", vae, "--resolution", 64)
    assert cache("build", folder, *rest) == 0
    (folder / "a\x1b]0;x\x07\r.png").unlink()
    shard = next((tmp_path / "l\x9b/latents.zarr/64x64").glob("c.*"))
    shard.write_bytes(b"\xff" * 9000)
    assert cache("check", tmp_path / "l\x9b") == 1
    assert cache("build", tmp_path / "no\x1b[2Jthing", *rest) == 1
    printed = "".join(capsys.readouterr())
    printed = printed.replace("\x1b[A", "")  # tqdm's own, which goes up a line
    assert not {*printed} & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert "im\\x1b[31m\\nnext" in printed
