import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from tests.support import cache
from xlsd_cache.options.build import BuildOptions
from xlsd_cache.options.import_latents import ImportOptions


@pytest.mark.parametrize(
    ("command", "config", "positional", "told"),
    [
        ("build", BuildOptions, "source", "Encode images once"),
        ("import", ImportOptions, "cache", "Import latents cached by other programs"),
    ],
)
def test_help_teaches_every_option(
    command: str, config: type[Any], positional: str, told: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xlsd_cache", command, "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for field in fields(config):
        if field.name != positional:
            assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert told in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batch", 0), "--batch 0"),
        (("--workers", 0), "--workers 0"),
        (("--max-ratio", 0.5), "--max-ratio 0.5"),
        (("--shard", "2/2"), "--shard '2/2'"),
        (("--shard", "one"), "--shard 'one'"),
        (("--shard", "0/1", "--precision", "fp8"), "--precision 'fp8' is not fp32 or tf32 or bf16"),
        (("--batch", "many"), "--batch 'many' is not a whole number"),
        (("--batch", "--upscale"), "--batch needs a value"),
        (("--max-ratio=wide",), "--max-ratio 'wide' is not a number"),
        (("--captions", "key"), "--captions 'key'"),
        (("--captions", "jsonl:"), "--captions 'jsonl:'"),
        (("--captions", "tsv:tags"), "--captions 'tsv:tags'"),
        (("--rows-per-shard", 0), "--rows-per-shard 0"),
        (("--resolution", 100, "--vae", "none"), "--resolution 100"),
    ],
)
def test_impossible_options_are_one_sentence(
    options: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache("build", *options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xlsd-cache: ")
    assert told in line


def test_unknown_options_and_commands_exit_non_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cache() == 1
    assert "no command is given" in capsys.readouterr().err
    assert cache("build", "--nothing") == cache("nothing") == 1


def test_each_process_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BuildOptions().part == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert BuildOptions().part == (2, 4)  # as torchrun and accelerate launch say it
    assert BuildOptions(shard="1/3").part == (1, 3)
