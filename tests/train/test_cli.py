import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.support import cache, printed, train
from xlsd_cache import __version__
from xlsd_cache.console.suggestions import options_of
from xlsd_train.cli import COMMANDS, main
from xlsd_train.config.aliases import NAMES

# and `rates`, which the command line calls --lr
POSITIONAL = {"checkpoint", "out", "models", "store", "run", "runs", "rates", "name", "folders"}
Out = pytest.CaptureFixture[str]


def help_of(*words: str, capsys: Out) -> str:
    with pytest.raises(SystemExit) as exit_code:
        main([*words, "--help"])
    assert exit_code.value.code == 0
    return printed(capsys)


def test_without_a_command_it_trains(capsys: Out) -> None:
    plain = help_of(capsys=capsys)
    assert "Train the UNet, the text encoder, or both" in plain
    for name in ("train", "run"):
        assert help_of(name, capsys=capsys).replace(f"xlsd-train {name}", "xlsd-train") == plain
    for words in ((), ("train",), ("run",)):
        assert train(*words, "--phase", "te", "--batch", 0) == 1
        assert "--batch 0" in capsys.readouterr().err


def test_help_lists_every_other_command(capsys: Out) -> None:
    listed = help_of(capsys=capsys)
    for name in COMMANDS:
        assert f"xlsd-train {name} " in listed or name in {"run", "train"}


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
    options = {name for kind, _ in COMMANDS.values() for name in options_of(kind)}
    for name, meant in NAMES.items():
        assert not meant.startswith("--") or meant.split()[0] in options, name


@pytest.mark.parametrize("kind", list(dict.fromkeys(kind for kind, _ in COMMANDS.values())))
def test_every_option_that_a_help_shows_is_known(kind: type[Any], capsys: Out) -> None:
    name = next(name for name, (found, _) in COMMANDS.items() if found is kind)
    own = re.findall(r"^│ (--?[a-z].*)", help_of(name, capsys=capsys), re.MULTILINE)
    shown = {option for line in own for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)}
    assert shown - {"-h", "--help"} <= options_of(kind).keys()


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


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"run", "train"}])
def test_each_commands_help_teaches_every_option(name: str, capsys: Out) -> None:
    shown = help_of(name, capsys=capsys)
    for field in fields(COMMANDS[name][0]):
        option = f"--{field.name.replace('_', '-')}"
        assert option in shown or field.name in POSITIONAL


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
    assert f"{run} is complete: step 1 of 1 planned" in told.out
    assert "Traceback" not in told.err
