"""The help page of a command, made from the dataclass of its options.

The base classes of the dataclass are the groups of the page, in the order of their fields: each has
the first line of its docstring as title and the fields that it declares as options. Groups of the
same title are one, and so are all of a command that shows none first. A field's docstring is its
help.
"""

import ast
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from itertools import pairwise
from textwrap import wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from xlsd_cache.console.option_checks import POSITIONAL, Target, marks_of, option_of
from xlsd_cache.console.terminal import bold

WIDEST = 100  # characters a line, on wider terminals too
NARROW = 70  # below it, help stands under its option and not to the right
COLUMN = 26  # where help starts otherwise
LONGEST_CHOICES = 32  # characters; more choices than that are listed in the help


@dataclass(frozen=True)
class Command:
    """One command of a program."""

    options: type[Any]  # a dataclass
    run: Callable[[Any, Any], int | None]  # imports what is slow; returns the exit code, None: 0
    examples: tuple[str, ...]  # command lines
    first: tuple[str, ...] = ()  # the fields that the page shows first: what everybody needs

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return _paragraphs(self.options)[0]


def calls(target: str) -> Callable[[Any, Any], None]:
    """A call of `module:function` with a command's options; imported when the command runs."""
    module, _, function = target.partition(":")

    def call(options: Any, _: Any) -> None:
        getattr(import_module(module), function)(options)

    return call


@dataclass(frozen=True)
class Option:
    """One option, as a help page or the reference shows it."""

    name: str  # of the field
    flags: str  # "--out FOLDER", or "STORE" for a positional argument
    text: str
    required: bool
    positional: bool


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line contains -h or --help."""
    return not {"-h", "--help"}.isdisjoint(words)


def option_groups(command: Command, default: Any = None) -> dict[str, list[Option]]:
    """Title -> options of each group, in the page's order.

    `default` is an instance of the options class; its values replace the class's defaults.
    """
    options = {option.name: option for option in _options(command.options, default)}
    bases = {base: inspect.get_annotations(base) for base in command.options.__mro__}
    # The base that first declares a field has it, though a derived class declares it again.
    owner = {name: base for base, declared in bases.items() for name in declared}
    groups = [
        ("Arguments", [option.name for option in options.values() if option.positional]),
        ("Most used", list(command.first)),
        *(
            (_title(command, base), [name for name in declared if owner[name] is base])
            for base, declared in [*list(bases.items())[:1], *reversed(bases.items())]
        ),
    ]
    left, found = dict(options), dict[str, list[Option]]()
    for title, names in groups:
        if members := [left.pop(name) for name in names if name in left]:
            found.setdefault(title, []).extend(members)
    return found


def help_page(
    prog: str, command: Command, default: Any = None, others: Mapping[str, Command] | None = None
) -> str:
    """The page that `PROG --help` prints, as wide as the terminal.

    `default` is as for `option_groups`; `others` are commands to list at the end.
    """
    groups = option_groups(command, default)
    options = [option for group in groups.values() for option in group]
    usage = [prog, *(it.flags for it in options if it.required and not it.positional)]
    usage += ["[OPTION ...]"] if len(groups) > 1 or "Arguments" not in groups else []
    usage += [it.flags if it.required else f"[{it.flags}]" for it in options if it.positional]
    lines = _wrapped("usage: " + " ".join(usage), rest=4)
    for paragraph in _paragraphs(command.options):
        lines += ["", *_wrapped(paragraph)]
    for title, group in groups.items():
        lines += ["", bold(title), *(line for it in group for line in _entry(it.flags, it.text))]
    lines += _command_list(f"Other commands of {prog.partition(' ')[0]}", others or {})
    lines += ["", bold("Examples"), *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)


def program_page(prog: str, summary: str, commands: Mapping[str, Command]) -> str:
    """The page of a program that does nothing without a command."""
    usage = _wrapped(f"usage: {prog} COMMAND [OPTION ...]", rest=4)
    listed = _command_list(f"Commands, each with its own page: {prog} COMMAND --help", commands)
    return "\n".join([*usage, "", *_wrapped(summary), *listed])


def _command_list(title: str, commands: Mapping[str, Command]) -> list[str]:
    entries = [_entry(name, command.summary) for name, command in commands.items()]
    return ["", bold(title), *(line for entry in entries for line in entry)] if entries else []


def _entry(left: str, text: str) -> list[str]:
    """An option or a command in bold, and its help next to it or below."""
    column = COLUMN if _width() >= NARROW else 6
    lines = _wrapped(text, column, column)
    if len(left) + 4 > column:
        return ["  " + bold(left), *lines]
    return ["  " + bold(left) + lines[0][2 + len(left) :], *lines[1:]]


def _wrapped(text: str, first: int = 0, rest: int = 0) -> list[str]:
    """Lines as wide as the page, indented by so many spaces."""
    # Paths, URLs and lists of choices stay whole, though they be wider than the terminal.
    return wrap(
        text, _width(), initial_indent=" " * first, subsequent_indent=" " * rest,
        break_long_words=False, break_on_hyphens=False,
    ) or [""]  # fmt: skip


def _width() -> int:
    return max(40, min(WIDEST, shutil.get_terminal_size().columns))


def _title(command: Command, base: type[Any]) -> str:
    one_group = base is command.options or not command.first
    return "Options" if one_group else _paragraphs(base)[0].rstrip(".")


def _paragraphs(kind: type[Any]) -> list[str]:
    """A class's docstring, each paragraph on one line."""
    return [" ".join(it.split()) for it in (inspect.getdoc(kind) or "").split("\n\n")]


def _options(kind: type[Any], default: Any) -> Iterator[Option]:
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    for field in fields(kind):
        hint = hints[field.name]
        marks = marks_of(hint)
        if Suppress in marks:
            continue
        usual = field.default_factory() if callable(field.default_factory) else field.default
        value = usual if default is None else getattr(default, field.name)
        positional, required = POSITIONAL in marks, value is MISSING
        metavar, choices = _metavar(hint, field.name)
        flags = option_of(field.name, hint)
        if positional:
            flags += " ..." if get_origin(get_args(hint)[0]) is tuple else ""
        elif hint is bool:
            flags += f", --no-{flags[2:]}" if usual is True else ""
        else:
            names = [flags, *(x for mark in marks for x in getattr(mark, "aliases", None) or ())]
            flags = f"{', '.join(names)} {metavar}"
        text = texts.get(field.name, "")
        notes = [f"one of {choices}"] if choices else []
        if required and not positional:
            notes.append("required")
        elif (shown := _value(value)) and not ("Default:" in text and value == usual):
            notes.append(f"default: {shown}")
        yield Option(
            field.name, flags, f"{text} ({'; '.join(notes)})" if notes else text,
            required, positional,
        )  # fmt: skip


def _metavar(hint: Any, name: str) -> tuple[str, str]:
    """What stands for a value of this type, and the choices where these are too many for it."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        for mark in marks:
            if given := getattr(mark, "metavar", None):
                return given, ""
            if isinstance(mark, Target):
                return mark.kind.upper().replace(" ", "-"), ""
        return _metavar(inner, name)
    if get_origin(hint) in {Union, UnionType}:
        found = [_metavar(kind, name) for kind in get_args(hint) if kind is not NoneType]
        return "|".join(metavar for metavar, _ in found), "".join(choices for _, choices in found)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        metavars = [_metavar(kind, name)[0] for kind in inner if kind is not Ellipsis]
        return " ".join([*metavars, "..."] if inner[-1] is Ellipsis else metavars), ""
    word = name.rpartition("_")[2].upper()
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        choices = "{" + ",".join(values) + "}" if len(values) > 1 else values[0]
        return (choices, "") if len(choices) <= LONGEST_CHOICES else (word, ", ".join(values))
    return {int: "N", float: "X", str: word}.get(hint, "PATH"), ""


def _value(value: Any) -> str:
    """A default as one would type it; empty where there is nothing to type."""
    if value is MISSING or value is None or value is False:
        return ""
    if isinstance(value, tuple):
        return " ".join(_value(each) for each in value)
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _texts(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring, of a dataclass and its bases."""
    texts = {}
    for base in reversed(kind.__mro__[:-1]):
        for statement, following in pairwise(_bodies(base.__module__).get(base.__name__, [])):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                texts[ast.unparse(statement.target)] = " ".join(text.split())
    return texts


@cache
def _bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Class -> the statements in it, for the classes of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {it.name: it.body for it in tree.body if isinstance(it, ast.ClassDef)}
