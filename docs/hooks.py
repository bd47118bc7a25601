"""Reference pages that mkdocs builds from the code: command line, recipes, error messages."""

import ast
import inspect
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from xlsd_cache.console.help import Command, Option, option_groups

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

Errors that a user can cause, generated from the code. Words in braces stand for values.
[Troubleshooting](../troubleshooting.md) groups them by kind.
"""


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


def commands() -> dict[str, Command]:
    """Program and command -> the command."""
    return {
        f"{program} {name}": command
        for program in ("xlsd-cache", "xlsd-train")
        for name, command in import_module(f"{program.replace('-', '_')}.cli").COMMANDS.items()
        if name != "run"  # another name of train
    }


def command_line() -> str:
    """Every option of every command, in the groups of its help page."""
    lines, found = [CLI], commands()
    training = found["xlsd-train train"].options
    for name, command in found.items():
        lines.append(f"## {name}\n\n{_plain(inspect.getdoc(command.options) or '')}\n")
        known: set[str] = set()
        if command.options is not training and issubclass(command.options, training):
            declared = inspect.get_annotations(command.options)
            known = {field.name for field in fields(training)} - set(declared)
            lines.append("All options of [training](#xlsd-train-train), and:\n")
        for title, group in option_groups(command).items():
            if rows := [_row(option) for option in group if option.name not in known]:
                lines += [f"### {title}\n", "| option | meaning |", "|---|---|", *rows, ""]
        lines += ["```bash", *command.examples, "```", ""]
    return "\n".join(lines)


def _row(option: Option) -> str:
    return f"| `{option.flags.replace('|', '/')}` | {_plain(option.text)} |"


def _plain(text: str) -> str:
    """Markdown that shows a docstring's characters as they are."""
    for mark in ("\\", "*", "_", "|"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;")


def recipes() -> str:
    """Every shipped recipe as it is."""
    found = sorted((ROOT / "xlsd_train" / "config" / "recipes").glob("*.toml"))
    shown = [f"## {path.stem}\n\n```toml\n{path.read_text()}```\n" for path in found]
    return "\n".join([RECIPES, *shown])


def errors() -> str:
    """Every message of a UserError, by room, with the values left open."""
    lines, rooms = [ERRORS], dict[str, list[str]]()
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
