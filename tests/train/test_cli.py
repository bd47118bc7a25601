import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tests.support import cache, printed, train
from xlsd_cache import __version__
from xlsd_cache.console.help import option_groups
from xlsd_cache.console.suggestions import check_words, options_of
from xlsd_train.cli import COMMANDS, main
from xlsd_train.config.aliases import NAMES
from xlsd_train.config.recipes import parse

Out = pytest.CaptureFixture[str]


def help_of(*words: str, capsys: Out) -> str:
    assert main([*words, "--help"]) == 0
    return printed(capsys)


def test_without_a_command_it_trains(capsys: Out) -> None:
    plain = help_of(capsys=capsys)
    assert "Train the UNet, the text encoder, or both" in plain
    for name in ("train", "run"):
        usage, page = help_of(name, capsys=capsys).split("\n", 1)
        assert usage == f"usage: xlsd-train {name} --phase {{unet,te,both}} [OPTION ...]"
        assert page == plain.split("\n", 1)[1]
    for words in ((), ("train",), ("run",)):
        assert train(*words, "--phase", "te", "--batch", 0) == 1
        assert "--batch 0" in capsys.readouterr().err


def test_help_lists_every_other_command(capsys: Out) -> None:
    listed = help_of(capsys=capsys)
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", listed, re.MULTILINE) or name in {"run", "train"}


@pytest.mark.parametrize("words", [["--version"], ["sample", "--version"]])
def test_both_programs_say_their_version(words: list[str], capsys: Out) -> None:
    assert train(*words) == cache(*words[-1:]) == 0
    assert printed(capsys).splitlines() == [
        f"xlsd-train {__version__}",
        f"xlsd-cache {__version__}",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("exprt", "runs/a", "out"), "'exprt' is not a command of xlsd-train; did you mean export"),
        (("build", "photos"), "build is a command of the other program: xlsd-cache build"),
        (("runs/a",), "'runs/a' is not a command of xlsd-train"),
        (("--learning-rate", "1e-4"), "--learning-rate is called --lr here"),
        (("--learning_rate=1e-4",), "--learning_rate is called --lr here"),
        (("sweep", "--learning-rate", "1,2"), "--learning-rate is called --lr here"),
        (("--batch-size", 4), "--batch-size is called --batch here"),
        (("train", "--train_batch_size", 4), "--train_batch_size is called --batch here"),
        (("--output-dir", "x"), "--output-dir is called --out here"),
        (("--outputdir", "x"), "no option --outputdir; --output-dir is called --out here"),
        (("--max_train_steps", 10), "--max_train_steps is called --steps here"),
        (("--pretrained_model_name_or_path", "x"), "is called --model here"),
        (("--resolution", 512), "`xlsd-cache build --resolution 512`"),
        (("--network_dim", 8), "networks such as LoRA are not trained here"),
        (("--snr_gamma", 5), "--snr_gamma is called --min-snr-gamma here"),
        (("--validate-evry", 5), "no option --validate-evry; did you mean --validate-every?"),
        (("-lr", 5), "there is no option -lr; did you mean --lr?"),
        (("sample", "m", "--num_inference_steps", 5), "is called --steps here"),
        (("export", "m", "o", "--batch-size", 5), "there is no option --batch-size"),
        (("--phase", "te", "--out", "My", "run"), "unexpected 'run' after --out, which takes 1"),
        (("recipes", "a", "b"), "unexpected 'b'"),
        (("--phase", "te", "--betas", 0.9), "--betas needs 2 values"),
        (("--phase", "te", "--batch", "all"), "--batch 'all' is not a whole number or auto"),
    ],
)
def test_words_that_it_does_not_take_are_one_sentence(
    words: tuple[object, ...], told: str, capsys: Out
) -> None:
    """Whatever else is missing, --phase say."""
    assert train(*words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xlsd-train: ")
    assert told in line


def test_every_other_name_leads_to_an_option_that_is_there() -> None:
    options = {name for command in COMMANDS.values() for name in options_of(command.options)}
    for name, meant in NAMES.items():
        assert not meant.startswith("--") or meant.split()[0] in options, name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_a_help_page_shows_every_option_and_no_other(name: str, capsys: Out) -> None:
    kind = COMMANDS[name].options
    entries = re.findall(r"^  (-.*?)(?:  |$)", help_of(name, capsys=capsys), re.MULTILINE)
    shown = {flag for entry in entries for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", entry)}
    switches = {f"--no-{flag[2:]}" for flag, taken in options_of(kind).items() if not taken}
    assert shown <= options_of(kind).keys()
    assert options_of(kind).keys() - switches <= shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_possible(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS[name].examples) == 2
    for example in COMMANDS[name].examples:
        program, command, *words = shlex.split(example.partition(" > ")[0])
        kind = COMMANDS[command].options
        assert (program, kind) == ("xlsd-train", COMMANDS[name].options)
        check_words(words, kind, {})
        assert isinstance(parse(kind, words, ""), kind)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_page_shows_first_are_its_options(name: str) -> None:
    command = COMMANDS[name]
    assert {*command.first} <= {field.name for field in fields(command.options)}
    assert option_groups(command).keys() >= {"Most used"} or not command.first


def test_help_with_a_recipe_shows_its_defaults(capsys: Out) -> None:
    shown = " ".join(help_of("train", "--recipe", "phase1-unet", capsys=capsys).split())
    assert "(default: dlion)" in shown
    assert "(default: 1000000)" in shown


def test_a_name_with_spaces_that_is_not_quoted_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    (tmp_path / "My new photos").mkdir()
    monkeypatch.chdir(tmp_path)
    told = "the name 'My new photos' contains spaces; quote it: \"My new photos\"\n"
    assert cache("build", "other", "My", "new", "photos") == 1
    assert train("--phase", "te", "--data", "My", "new", "photos:2") == 1
    assert train("--phase", "te", "--model=My", "new", "photos") == 1
    assert train("sample", "mine=My", "new", "photos", "--prompts", "p") == 1
    assert capsys.readouterr().err.count(told) == 4
    (tmp_path / "My").mkdir()
    assert cache("build", "My", "new", "--captions", "key") == 1
    assert "quote" not in capsys.readouterr().err


# Everything that these commands load, in one process; the store and the run are real ones.
LIGHT = """
import sys
from xlsd_cache.cli import main as cache
from xlsd_train.cli import main as train
store, run, page, *again = sys.argv[1:]
assert train(["--version"]) == cache(["--version"]) == 0
for command in (train, cache):
    try:
        command(["--help"])
    except SystemExit as done:
        assert done.code == 0
assert train(["recipes"]) == train(["recipes", "phase1-te"]) == 0
assert cache(["info", store]) == cache(["info", store, "--json"]) == 0
assert train(["tags", store]) == 0
assert train(["report", run, "--out", page]) == 0
assert train(again) == 0
assert train(["sweep", "--phase", "te", "--lr", "1"]) == train(["exprt"]) == 1
import xlsd_train.commands.sweep
heavy = {"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_what_only_reads_does_not_wait_for_torch(
    store: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--phase", "te", "--data", store, "--model", model, "--out", run, "--batch", 2]
    words += ["--steps", 1, "--validate-every", 1, "--validation-fraction", 0.3]
    words += ["--sample-every", 0, "--device", "cpu", "--threads", 1]
    assert train(*words) == 0
    page = tmp_path / "page.html"
    subprocess.run([sys.executable, "-c", LIGHT, store, run, page, *map(str, words)], check=True)
    assert page.exists()
    told = capfd.readouterr()
    assert f"{run} is already complete: step 1 of 1, checkpoint" in told.out
    assert "Traceback" not in told.err
