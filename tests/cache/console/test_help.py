import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import tyro
from tyro.conf import Positional, Suppress, arg

from tests.support import cache
from xlsd_cache.cli import COMMANDS
from xlsd_cache.console.help import Command, Option, asks_for_help, help_page, option_groups
from xlsd_cache.console.option_checks import Folder, marks_of
from xlsd_cache.console.suggestions import check_words, options_of


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data and captions.

    More about them is not in the title.
    """

    store: Positional[Path]
    """The store."""

    mix: tuple[str, ...] = ()
    """Stores to mix."""

    pair: tuple[float, float] | None = None
    """Two numbers. Default: 1 2."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model."""

    phase: Literal["unet", "te"]
    """What trains."""

    way: Literal["fastest", "largest", "plain", "cheap", "feed-forward"] = "fastest"
    """How a batch passes."""

    batch: int | Literal["auto"] = 32
    """Images."""

    lr: float | None = None
    """Its rate."""

    exact: bool = True
    """Exactly."""


@dataclass(frozen=True, kw_only=True)
class Options(Model, Data):
    """Train something."""

    out: Annotated[Folder | None, arg(aliases=["-o"])] = None
    """Where."""

    dry_run: bool = False
    """Write nothing."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """Model."""

    seed: int = 0
    """Its seed."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """Train several times.

    A second paragraph, longer than a line of eighty characters, so that it has to be wrapped
    somewhere.
    """

    lr: Annotated[float | None, Suppress] = None

    way: Literal["fastest", "plain"] = "plain"
    """Another help."""


def command(kind: type[Any], *first: str) -> Command:
    return Command(kind, lambda *_: None, ("prog one", "prog two"), first)


def options(command: Command, default: object = None) -> dict[str, Option]:
    groups = option_groups(command, default)
    return {option.name: option for group in groups.values() for option in group}


def test_base_classes_are_the_groups() -> None:
    groups = option_groups(command(Options, "phase", "out"))
    assert {title: [it.name for it in group] for title, group in groups.items()} == {
        "Arguments": ["store"],
        "Most used": ["phase", "out"],
        "Options": ["dry_run"],
        "Data and captions": ["mix", "pair"],
        "Model": ["way", "batch", "lr", "exact"],
    }
    swept = option_groups(command(Sweep, "out"))
    assert [it.name for it in swept["Model"]] == ["phase", "way", "batch", "exact"]
    assert swept["Model"][1].text == "Another help. (default: plain)"


def test_a_command_that_shows_none_first_has_one_group() -> None:
    groups = option_groups(command(Sweep))
    assert {title: [it.name for it in group] for title, group in groups.items()} == {
        "Arguments": ["store"],
        "Options": ["mix", "pair", "phase", "way", "batch", "exact", "out", "dry_run"],
    }


def test_groups_of_the_same_title_are_one() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(Twin, Options):
        """Train."""

    groups = option_groups(command(More, "out"))
    assert [it.name for it in groups["Model"]] == ["phase", "way", "batch", "lr", "exact", "seed"]


def test_options_are_shown_as_one_types_them() -> None:
    told = options(command(Options))
    assert {name: it.flags for name, it in told.items()} == {
        "store": "STORE",
        "mix": "--mix MIX ...",
        "pair": "--pair X X",
        "phase": "--phase {unet,te}",
        "way": "--way WAY",
        "batch": "--batch N|auto",
        "lr": "--lr X",
        "exact": "--exact, --no-exact",
        "out": "--out, -o FOLDER",
        "dry_run": "--dry-run",
    }
    assert told["phase"].text == "What trains. (required)"
    assert told["way"].text == (
        "How a batch passes. (one of fastest, largest, plain, cheap, feed-forward; "
        "default: fastest)"
    )
    assert told["pair"].text == "Two numbers. Default: 1 2."
    assert told["exact"].text == "Exactly. (default: on)"
    assert told["lr"].text == "Its rate."


def test_another_default_is_shown() -> None:
    given = Options(store=Path("s"), phase="te", batch=4, pair=(3.0, 4.5), mix=("a", "b"))
    told = options(command(Options), given)
    assert told["phase"].text == "What trains. (default: te)"
    assert told["batch"].text == "Images. (default: 4)"
    assert told["pair"].text == "Two numbers. Default: 1 2. (default: 3 4.5)"
    assert told["mix"].text == "Stores to mix. (default: a b)"
    assert "usage: prog [OPTION ...] [STORE]\n" in help_page("prog", command(Options), given)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_page_is_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    page = help_page("prog", command(Sweep), others={"other": command(Options)})
    assert max(map(len, page.splitlines())) <= min(columns, 100)
    for told in ("usage: prog --phase {unet,te}", "Another help.", "other", "  prog two"):
        assert told in page


@pytest.mark.parametrize(("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_respected(env: dict[str, str], colored: bool) -> None:
    for words in ("--help", "build --help", "preview"):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "xlsd_cache", *words.split()],
            stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"} | env,
        ) as process:  # fmt: skip
            os.close(theirs)
            shown = b""
            while chunk := read(ours):
                shown += chunk
        os.close(ours)
        assert process.returncode == (2 if words == "preview" else 0)
        assert (b"\x1b[" in shown) is colored


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 2**16)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_page_is_complete_and_its_examples_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache(name, "--help") == 0
    page = capsys.readouterr().out
    assert "None" not in page.replace("none", "")
    kind, told = COMMANDS[name].options, options(COMMANDS[name]).values()
    hints = get_type_hints(kind, include_extras=True)
    offered = [it.name for it in fields(kind) if Suppress not in marks_of(hints[it.name])]
    assert sorted(it.name for it in told) == sorted(offered)
    assert all(it.text and it.flags in page for it in told)
    flags = {flag for it in told for flag in re.findall(r"--?[a-z][a-z-]*", it.flags)}
    assert flags == {it for it in options_of(kind) if not it.startswith("--no-")}
    assert len(COMMANDS[name].examples) == 2
    for example in COMMANDS[name].examples:
        assert f"  {example}\n" in page
        prog, *words = shlex.split(example.partition(" > ")[0])
        if prog == "xlsd-cache":
            assert words[0] == name
            check_words(words[1:], kind, {})
            assert isinstance(tyro.cli(kind, args=words[1:]), kind)


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cache("--help") == cache("-h") == 0
    page = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in page
        assert command.summary[:20] in page
    assert not asks_for_help(["build", "help"])
