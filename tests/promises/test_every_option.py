"""Every invalid value of any option of any command is one error, before any work starts.

The commands' dataclasses are walked by the types of their fields: a new option is tried by itself.
"""

import math
import os
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import xlsd_cache.cli
import xlsd_train.cli
from tests.support import cache, train
from xlsd_cache.console.option_checks import MayBeEmpty, Target, Within, leaves, option_of
from xlsd_cache.errors import UserError

Out = pytest.CaptureFixture[str]
KINDS: list[type[Any]] = list(dict.fromkeys(it.options for it in xlsd_train.cli.COMMANDS.values()))
KINDS += [command.options for command in xlsd_cache.cli.COMMANDS.values()]
# What must be given, where its type does not say it.
GIVEN = {"columns": "txt", "phase": "unet", "vae": "sdxl"}
OUT = {"PreviewOptions": "p.png", "ReportConfig": "p.html", "StoreReportOptions": "p.html"}
ABSURD = (math.nan, math.inf, -math.inf, 1e300, 10**30, 2**63)
OPTIONS = [(kind, field.name) for kind in KINDS for field in fields(kind)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def make(kind: type[Any], **given: Any) -> Any:
    """The command's dataclass with what it must be given, and this."""
    settings: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "out" and (field.default is MISSING or kind.__name__ in OUT):
            settings["out"] = Path(OUT.get(kind.__name__, "new"))
        elif field.default is MISSING and field.default_factory is MISSING:
            types = {leaf for leaf, _ in leaves(hints(kind)[field.name])}
            one: Any = Path("there") if Path in types else "there"
            many = "tuple" in str(hints(kind)[field.name])
            settings[field.name] = GIVEN.get(field.name, (one,) if many else one)
    return kind(**{**settings, **given})


def put(kind: type[Any], name: str, value: object) -> Any:
    """The dataclass with this value as one field, or as each element of that field."""
    hint = hints(kind)[name]
    while get_origin(hint) not in {None, tuple} and get_origin(hint) is not Literal:
        hint = next((x for x in get_args(hint) if x is not type(None)), None)
    pair = get_origin(hint) is tuple
    return make(kind, **{name: (value, value) if pair else value})


def numbers(kind: type[Any], name: str) -> list[tuple[type, tuple[Any, ...]]]:
    return [x for x in leaves(hints(kind)[name]) if x[0] in {int, float}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_given_is_taken(kind: type[Any], folder: Path) -> None:
    assert make(kind)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_absurd_numbers_are_refused_by_name(kind: type[Any], name: str) -> None:
    for of, notes in numbers(kind, name):
        found = [note for note in notes if isinstance(note, Within)]
        assert found, f"--{name} has no bounds"
        bounds = found[0]
        beyond = [bounds.least - 1, 2 * bounds.most + 1, *ABSURD]
        beyond += [bounds.least] if bounds.above else []
        for value in beyond:
            if of is int and not isinstance(value, int):
                continue
            with pytest.raises(UserError) as error:
                put(kind, name, value)
            assert option_of(name, hints(kind)[name]) in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_texts_that_are_none_are_refused_by_name(kind: type[Any], name: str) -> None:
    for of, notes in leaves(hints(kind)[name]):
        if of not in {str, Path}:
            continue
        values = ["a\0b"] if of is Path or MayBeEmpty() in notes else ["a\0b", ""]
        for value in values:
            with pytest.raises(UserError) as error:
                put(kind, name, of(value))
            assert option_of(name, hints(kind)[name]) in str(error.value)


def unwritable(folder: Path) -> dict[str, Path]:
    """Names under which nothing can be made, by why."""
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to(folder / "nowhere")
    found = {
        "below a file": folder / "file" / "x",
        "below a link to nothing": folder / "link" / "x",
        "a link to nothing": folder / "link",
        "too long": folder / ("n" * 300),
        "too long for a temporary file": folder / ("n" * 250),
        "a long folder": folder / ("n" * 300) / "x",
    }
    if sys.platform == "linux":
        found["no disk"] = Path("/proc/x")
    if os.name == "posix" and os.geteuid():
        (folder / "locked").mkdir(mode=0o500)
        found["read only"] = folder / "locked" / "x"
    return found


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_paths_that_cannot_be_written_are_refused_at_once(
    kind: type[Any], name: str, folder: Path
) -> None:
    targets = [note for _, notes in leaves(hints(kind)[name]) for note in notes]
    if not any(isinstance(note, Target) for note in targets):
        assert name != "out", "not said to be written"
        return
    suffix = Path(OUT.get(kind.__name__, "")).suffix
    for why, path in unwritable(folder).items():
        named = path.with_name(path.name + suffix)
        if why == "a link to nothing" and suffix:
            named.symlink_to(folder / "nowhere")
        with pytest.raises(UserError) as error:
            put(kind, name, named)
        assert re.search("give a(nother)? |use at most 200", str(error.value)), why
    assert not (folder / "nowhere").exists()
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("command", xlsd_train.cli.COMMANDS)
def test_empty_words_are_refused_of_every_training_command(
    command: str, folder: Path, capsys: Out
) -> None:
    kind = xlsd_train.cli.COMMANDS[command].options
    may = {
        option_of(name, hint)
        for name, hint in hints(kind).items()
        if any(MayBeEmpty() in notes for _, notes in leaves(hint))
    }
    for option in {option_of(name, hint) for name, hint in hints(kind).items()} - may:
        if option.startswith("--"):
            for words in ((option, ""), (f"{option}=",)):
                assert train(command, *words) == 1
                (line,) = capsys.readouterr().err.splitlines()
                assert f"{option} '' is empty" in line
    assert train(command, "") == 1
    assert list(folder.iterdir()) == []


def test_empty_words_are_refused_of_the_cache(folder: Path, capsys: Out) -> None:
    for words in (("build", ""), ("build", "--out", ""), ("info", ""), ("build", "--vae=")):
        assert cache(*words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "'' is empty" in line
    assert list(folder.iterdir()) == []


def test_names_that_no_system_takes_are_one_sentence(capsys: Out) -> None:
    long = "n" * 300
    for words in (
        ("report", long),
        ("tags", long),
        ("ema", long, "new"),
        ("plan", "--phase", "unet", "--data", long),
        ("recipes", f"{long}.toml"),
    ):
        assert train(*words) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    for words in (("info", long), ("build", long, "--dry-run"), ("check", long)):
        assert cache(*words) == 1
        told = capsys.readouterr().err  # a build logs its options first
        assert told.splitlines()[-1].startswith("xlsd-cache: ")
        assert "Traceback" not in told
