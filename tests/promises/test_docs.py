"""README and docs: commands parse, snippets run, links and paths exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro
import yaml  # type: ignore[import-untyped]

import xlsd_cache.cli
import xlsd_train.cli
from tests.support import train
from xlsd_cache.console.suggestions import check_words
from xlsd_cache.errors import UserError
from xlsd_cache.outcomes import Reason
from xlsd_train.config.recipes import parse, shipped

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))
LANGUAGES = {"bash", "python", "text", "toml"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:benchmarks|docs|tests|xlsd_cache|xlsd_train)/[\w./-]*")
OTHERS = set("--no-half-vae --learning-rate --against --check --max-restarts".split())
KOHYAS = set("--d --s --l --w --h --n".split())  # of a line of prompts, with our own five
PROMPTS = set("--seed --steps --guidance --size --negative".split())


def load_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = {*xlsd_cache.cli.COMMANDS, *xlsd_train.cli.COMMANDS}
GENERATED: dict[str, str] = load_hooks().pages()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = [Block(page, *groups) for page in PAGES for groups in BLOCK.findall(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command of a bash block, and of those within sentences."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield from ((named(block.page), words) for words in split(line))
    for page in PAGES:
        for code in CODE.findall(prose(page)):
            if re.match(r"xlsd-(cache|train) .", code):
                yield from ((named(page), words) for words in split(code))


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without redirections and comments."""
    words: list[str] = []
    line = re.sub(r"\$SLURM_\w+_ID/\$SLURM_\w+_COUNT", "0/8", line)
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in {"||", "&&", "|", ";"}:
            if words and words[0].endswith("sbatch"):  # also job=$(sbatch
                yield from split(words[words.index("--wrap") + 1] if "--wrap" in words else "")
            elif words:
                yield words
            words = []
        else:
            words.append(word)


COMMANDS = sorted({(page, shlex.join(words)) for page, words in shell_commands()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the one file that commands of the docs read when parsed."""
    (tmp_path / "mine.toml").write_text(shipped()["phase1-unet"].read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_command(words: list[str]) -> None:
    """Parse a command as the program would. Raises what the program refuses it with."""
    for redirection in (">", "2>"):
        if redirection in words:
            words = words[: words.index(redirection)]
    program, *rest = words[1:] if words[0] in {"until", "do"} else words
    if rest[1:] in ([], ["--json"]) and rest[0] in NAMES:
        return  # the command's name within a sentence
    if program in {"torchrun", "accelerate"}:
        program, *rest = rest[rest.index("-m") + 1 :]
        program = program.replace("_", "-")
    if program == "xlsd-cache":
        kind = xlsd_cache.cli.COMMANDS[rest[0]].options
        check_words(rest[1:], kind, {})
        tyro.cli(kind, args=rest[1:])
    elif program == "xlsd-train":
        name = rest[0] if rest[0] in xlsd_train.cli.COMMANDS else "train"
        kind = xlsd_train.cli.COMMANDS[name].options
        parse(kind, rest[rest[0] == name :], "xlsd-train")
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert rest == "install -c constraints.txt .".split()
    else:
        shell = {"touch", "export", "rsync", "sleep", "done"}
        assert program in {*shell, ".venv/bin/pre-commit"}, f"{program} is not checked"


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_possible(page: str, line: str, folder: Path) -> None:
    try:
        check_command(shlex.split(line))
    except (UserError, SystemExit, KeyError) as error:
        pytest.fail(f"{page}: {line}: {error}")


def test_options_in_sentences_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    there = set(re.findall(r"--[a-z][\w-]*", GENERATED["reference/cli.md"])) | KOHYAS | PROMPTS
    there |= {"--help", "--version"} | OTHERS
    for page in PAGES:
        for code in CODE.findall(prose(page)):
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - there
            assert not unknown or code.startswith(("pip", "torchrun", "mypy", "ray")), (
                f"{page}: {code}"
            )


def test_every_block_says_what_it_is() -> None:
    assert {(named(b.page), b.language) for b in blocks() if b.language not in LANGUAGES} == set()
    assert len(blocks("bash")) > 30
    assert len(COMMANDS) > 50


def test_python_snippets_run(
    photos: Path, model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, there in (("latents", store), ("photos", photos), ("model", model)):
        (tmp_path / name).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in PAGES:
        names: dict[str, Any] = {}  # the blocks of a page follow one another
        for block in blocks("python"):
            if block.page == page:
                exec(compile(block.text, named(page), "exec"), names)
                ran += 1
    assert ran >= 5


def test_the_ten_line_reader_needs_none_of_our_code(store: Path, tmp_path: Path) -> None:
    page = DOCS / "concepts" / "store-format.md"
    code, live = (block.text for block in blocks("python") if block.page == page)
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 10
    (tmp_path / "latents").symlink_to(store)
    alone = (
        "import sys; sys.modules.update(dict.fromkeys(['xlsd_cache', 'xlsd_train', 'torch']))\n"
        f"{code}{live}assert rows.tolist() == there['row'].to_pylist()\n"
        "assert latents.shape[:2] == (len(captions), 4) and all(captions), captions\n"
        "print(len(samples))"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 8


def test_the_documented_plan_is_what_the_command_prints(tmp_path: Path) -> None:
    page = DOCS / "concepts" / "memory-plan.md"
    shown = re.compile(r"```bash\n(xlsd-train plan .*)\n```\n\n```text\n(.*?)^```$", BLOCK.flags)
    ((command, output),) = shown.findall(page.read_text())
    program, *words = command.split()
    done = subprocess.run(
        [sys.executable, "-m", program.replace("-", "_"), *words], cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == output, f"replace the block in {named(page)} by what `{command}` prints"


def anchors(text: str) -> set[str]:
    """What mkdocs calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def test_links_lead_somewhere() -> None:
    checked = 0
    for page in PAGES:
        for link in LINK.findall(prose(page)):
            assert not re.match(r"https?://(?!arxiv)", link), f"{page}: {link}"
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            inside = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else ""
            text = GENERATED.get(inside)
            assert text is not None or target.exists() or inside == "demo.png", f"{page}: {link}"
            if anchor and target.suffix != ".webp":  # a picture's is its colour scheme
                text = text if text is not None else target.read_text()
                assert anchor in anchors(text), f"{page}: {link}"
            checked += 1
    assert checked > 80


def test_paths_in_sentences_exist() -> None:
    generated = {"benchmarks/results/CARD.json"}
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue  # which also names what is gone
        for path in PATH.findall(prose(page)):
            there = (ROOT / path.rstrip(".")).exists() or path in generated
            assert there or "latents" in path, f"{named(page)}: {path}"


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def files(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        values = nav.values() if isinstance(nav, dict) else nav
        return [file for value in values for file in files(value)]

    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(files(site["nav"])) == sorted(written | set(GENERATED))
    assert site["theme"]["font"] is False


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_reason_for_rejecting_an_image_has_a_remedy() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.count("|") == 4)
    assert {reason for reason in get_args(Reason) if f"`{reason}`" not in rows} == set()


def test_the_architecture_page_has_every_room() -> None:
    page = (DOCS / "concepts" / "architecture.md").read_text()
    for package in ("xlsd_cache", "xlsd_train"):
        section = page.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
        rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == rooms


def test_the_reference_has_every_public_name() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    public = [f"{it.__name__}.{name}" for it in (xlsd_cache, xlsd_train) for name in it.__all__]
    assert sorted(names) == sorted(name for name in public if not name.endswith("__"))


def test_the_reference_has_every_option_with_what_it_means() -> None:
    rows = [line for line in GENERATED["reference/cli.md"].splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == []
    for option in ("--lr", "--vae", "--scaling-factor", "--sigma-rel"):
        assert any(row.startswith(f"| `{option} ") for row in rows)
    assert set(
        re.findall(r"^## ([\w-]+)$", GENERATED["reference/recipes.md"], re.MULTILINE)
    ) == set(shipped())


def test_the_reference_has_the_messages_that_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("report", tmp_path / "run") == 1
    said = capsys.readouterr().err
    known = re.findall(r"^- `` (.*) ``$", GENERATED["reference/errors.md"], re.MULTILINE)
    assert len(known) > 200
    patterns = [re.sub(r"\\\{.*?\\\}", ".*", re.escape(text)) for text in known]
    assert any(re.search(pattern, said) for pattern in patterns), said
