"""Reference pages that mkdocs builds from the code: command line, recipes, error messages."""

import ast
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from xlsd_cache.console.option_checks import option_of

ROOT = Path(__file__).parents[1]
CLI = """# Command line

Generated from the options' dataclasses, as each command's `--help` is. `xlsd-train` without a
command is `xlsd-train train`.
"""
RECIPES = """# Recipes

A recipe gives defaults; command-line flags override it. Every value says where it comes from.
`xlsd-train recipes NAME` prints one, to start your own from.
"""
ERRORS = """# Error messages

Every error that a user can cause, generated from the code. Words in braces stand for values.
[Troubleshooting](../troubleshooting.md) groups them by kind.
"""
Kind = type[Any]


def pages() -> dict[str, str]:
    """Page -> its Markdown, of the pages that have no file under docs/."""
    return {
        "reference/cli.md": command_line(),
        "reference/recipes.md": recipes(),
        "reference/errors.md": errors(),
    }


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the generated pages, and the picture that README shows too."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    picture = ROOT / "benchmarks" / "results" / "demo.png"
    files.append(File.generated(config, "demo.png", content=picture.read_bytes()))
    return files


def command_line() -> str:
    """Every option of every command, from the dataclasses that the parsers are made of."""
    cache = import_module("xlsd_cache.cli").COMMANDS
    train = import_module("xlsd_train.cli").COMMANDS
    commands = {f"xlsd-cache {name}": _options_class(entry) for name, entry in cache.items()}
    commands |= {f"xlsd-train {name}": _options_class(entry) for name, entry in train.items()}
    run = commands.pop("xlsd-train run")
    lines = [CLI]
    for name, kind in commands.items():
        lines.append(f"## {name}\n\n{_plain(inspect.getdoc(kind) or '')}\n")
        inherits = kind is not run and issubclass(kind, run)
        if inherits:
            lines.append("All options of [training](#xlsd-train-train), and:\n")
        groups: dict[str, list[str]] = {}
        for group, field, hint in _fields(kind):
            if (row := _row(kind, field, hint)) and not (group and inherits):
                groups.setdefault(group, []).append(row)
        for group, rows in groups.items():
            head = [f"### {group}\n"] if group else []
            lines += [*head, "| option | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _options_class(entry: Any) -> Kind:
    """The dataclass of a command, whether its table has it alone or first of several."""
    kind = entry[0] if isinstance(entry, tuple) else entry
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise TypeError(f"{kind!r} is not a command's dataclass")
    return kind


def _fields(kind: Kind) -> Iterator[tuple[str, Field[Any], Any]]:
    """(group, field, type) of a dataclass's options; the group is the class that declares it."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        owner = next(each for each in kind.__mro__ if field.name in each.__annotations__)
        group = "" if owner is kind else (inspect.getdoc(owner) or "").partition(".")[0]
        yield group, field, hints[field.name]


def _row(kind: Kind, field: Field[Any], hint: Any) -> str:
    """One option of a table; empty for one that the command line hides."""
    if "Suppress" in str(hint):
        return ""
    option, about = option_of(field.name, hint), _docstrings(kind).get(field.name, "")
    default = "required" if field.default is MISSING and field.default_factory is MISSING else "-"
    if field.default not in (MISSING, None, (), ""):
        value = field.default
        default = f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"
    if field.default is True or field.default is False:
        option, default = f"{option}, --no-{option[2:]}", "on" if field.default else "off"
    return f"| `{option}` {_values(hint)} | {default} | {_plain(about, line=True)} |"


def _values(hint: Any) -> str:
    """The values that an option takes, in words."""
    if get_origin(hint) is Annotated:
        return _values(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in {Union, UnionType}:
        return " or ".join(filter(None, (_values(each) for each in get_args(hint))))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"{_values(inner[0])}..." if inner[-1] is Ellipsis else " ".join(map(_values, inner))
    return {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "", NoneType: ""}.get(hint, "")


def _docstrings(kind: Kind) -> dict[str, str]:
    """Field -> the string below it, of a class and those it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not is_dataclass(each):
            continue
        (parsed,) = ast.parse(inspect.getsource(each)).body
        body = parsed.body if isinstance(parsed, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _plain(text: str, *, line: bool = False) -> str:
    """Markdown that shows a docstring's characters as they are."""
    for mark in ("\\", "*", "_", "<", "|"):
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return " ".join(text.split()) if line else text


def recipes() -> str:
    """Every shipped recipe as it is."""
    found = sorted((ROOT / "xlsd_train" / "config" / "recipes").glob("*.toml"))
    shown = [f"## {path.stem}\n\n```toml\n{path.read_text()}```\n" for path in found]
    return "\n".join([RECIPES, *shown])


def errors() -> str:
    """Every message of a UserError, by room, with the values left open."""
    lines = [ERRORS]
    rooms: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("xlsd_*/**/*.py")):
        room = "/".join(path.relative_to(ROOT).with_suffix("").parts[:2])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError"):
                text = _template(node.args[0]) if node.args else ""
                if text.count(" ") > 3:
                    rooms.setdefault(room, []).append(f"- `` {text} ``")
    for room, texts in rooms.items():
        lines += [f"## {room}\n", *dict.fromkeys(texts), ""]
    return "\n".join(lines)


def _template(node: ast.expr) -> str:
    """The text of an f-string, its values in braces by name, or as dots where that is long."""
    if isinstance(node, ast.Constant):
        return " ".join(str(node.value).split())
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    if not isinstance(node, ast.JoinedStr):
        return "..."
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue):
            name = ast.unparse(part.value)
            plain = name.replace(".", "").isidentifier()
            text += f"{{{name.rpartition('.')[2]}}}" if plain else "{...}"
    return " ".join(text.split())
