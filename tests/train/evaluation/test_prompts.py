import codecs
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from xlsd_cache.errors import UserError
from xlsd_train.config.model_options import SampleConfig, size_of
from xlsd_train.evaluation.images import Picture
from xlsd_train.evaluation.prompts import read_pictures, remarks

DEFAULT = Picture("", "", 0, 20, 7.5, 512, 512)


def asked(tmp_path: Path, text: str | bytes, default: Picture = DEFAULT) -> list[Picture]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_pictures(path, "--prompts", default)


def test_lines_take_the_defaults_and_consecutive_seeds(tmp_path: Path) -> None:
    default = Picture("", "text", 7, 3, 2.0, 64, 72, "euler")
    text = "# our prompts\na cat\n\n  # and\na well--known dog #1 -- at home\r\n"
    first, second = asked(tmp_path, text, default)
    assert first == Picture("a cat", "text", 7, 3, 2.0, 64, 72, "euler")
    assert (second.prompt, second.seed) == ("a well--known dog #1 -- at home", 8)


@pytest.mark.parametrize(
    "line",
    [
        "a cat, solo --steps 30 --negative blurry, text --seed 5 --size 512x768 --guidance 4.5",
        "a cat, solo --n blurry, text --w 512 --h 768 --d 5 --l 4.5 --s 30",  # kohya's
        "a cat, solo --H 768 --seed=5 --l=4.5 --STEPS 30 --n blurry, text",
    ],
)
def test_a_line_may_carry_its_own_settings_in_any_order(tmp_path: Path, line: str) -> None:
    assert asked(tmp_path, line) == [Picture("a cat, solo", "blurry, text", 5, 30, 4.5, 512, 768)]


def test_a_setting_may_be_empty_or_all_there_is(tmp_path: Path) -> None:
    default = Picture("", "text", 0, 20, 7.5, 512, 512)
    (empty,) = asked(tmp_path, "x --negative --d 4", default)
    assert (empty.negative, empty.seed) == ("", 4)
    assert asked(tmp_path, "--seed 3") == [Picture("", "", 3, 20, 7.5, 512, 512)]


@pytest.mark.parametrize(
    "text",
    ["über\n".encode(), codecs.BOM_UTF8 + "über".encode(), "über\r\n".encode("utf-16")],
)
def test_files_of_every_editor_are_read(tmp_path: Path, text: bytes) -> None:
    assert [picture.prompt for picture in asked(tmp_path, text)] == ["über"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat --ar 16:9", "prompt 2: --ar is not supported; a line takes --seed"),
        ("a cat --am 0.8", "prompt 2: --am is not supported"),  # kohya's, but of networks
        ("a cat --ctrl x.png", "prompt 2: --ctrl is not supported"),
        ("a cat --ss euler_a", "prompt 2: --ss is not supported"),
        ("a cat --w,512", "prompt 2: --w,512 is not supported"),
        ("a cat --seed x", "prompt 2: --seed 'x' is not a whole number"),
        ("a cat --s 20 steps", "prompt 2: --s '20 steps' is not a whole number"),
        ("a cat --w 512.5", "prompt 2: --w '512.5' is not a whole number"),
        ("a cat --l 7,5", "prompt 2: --l '7,5' is not a number"),
        ("a cat --d 1 --seed 2", "prompt 2: --seed sets the seed a second time"),
        ("a cat --w 64 --size 64x64", "prompt 2: --size and --w or --h both set the size"),
        ("a cat --steps 0", "prompt 2: --steps 0"),
        ("a cat --s 5000", "prompt 2: --steps 5000 is not from 1 to 1000"),
        ("a cat --guidance -1", "--guidance -1 is not from 0 to 1000"),
        ("a cat --guidance nan", "--guidance nan is not from 0 to 1000"),
        ("a cat --guidance inf", "--guidance inf is not from 0 to 1000"),
        ("a cat --l 1e999", "--guidance inf is not from 0 to 1000"),
        ("a cat --seed -1", "prompt 2: --seed -1 is not from 0 to"),
        (f"a cat --seed {2**63}", "prompt 2: --seed 9223372036854775808 is not from 0 to"),
        ("a cat --size 100x100", "prompt 2: '100x100' is not WIDTHxHEIGHT in multiples of 8"),
        ("a cat --w 500", "prompt 2: '500x512' is not WIDTHxHEIGHT in multiples of 8"),
        (
            "a cat --h 80000",
            "prompt 2: '512x80000' is not WIDTHxHEIGHT in multiples of 8, up to 4096",
        ),
        ("a cat --h -64", "prompt 2: '512x-64' is not WIDTHxHEIGHT"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        asked(tmp_path, f"fine\n# no prompt\n{line}\n")


def test_impossible_flags_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size: 'big' is not WIDTHxHEIGHT"):
        size_of("big", "--size")
    for text in ("\n", "# none\n"):
        with pytest.raises(UserError, match="--prompts .* is empty"):
            asked(tmp_path, text)
    with pytest.raises(UserError, match="line 1: not valid UTF-8"):
        asked(tmp_path, b"a caf\xe9\n")
    with pytest.raises(UserError, match="cannot read --prompts"):
        read_pictures(tmp_path / "gone", "--prompts", DEFAULT)
    with pytest.raises(UserError, match="write the prompts to a text file"):  # kohya takes them
        read_pictures(tmp_path / "prompts.json", "--prompts", DEFAULT)
    with pytest.raises(UserError, match="no model is given"):
        SampleConfig((), tmp_path / "gone", tmp_path / "out")


def test_truncated_and_weighted_prompts_are_reported_once(model: Path) -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(model / "tokenizer")
    long = " ".join(["cat"] * 80)

    def told(*prompts: str, negative: str = "", tokens: int = 77) -> list[str]:
        pictures = [Picture(prompt, negative, 0, 20, 7.5, 64, 64) for prompt in prompts]
        return remarks(pictures, tokenizer, tokens)

    assert told("a cat", " ".join(["cat"] * 75), r"cat \(animal\), (a dog)") == []
    (cut,) = told("a cat", long)
    assert cut.startswith("prompt 2 has 82 tokens and is truncated to the text encoder's 77: ")
    assert told(long, tokens=248) == []
    (cut,) = told("a cat", "a dog", negative=long)  # every prompt has it
    assert cut.startswith("the negative prompt of prompt 1 has 82 tokens")
    for prompt in ("(cat:1.2)", "((cat))", "[cat:dog:0.5]", "a cat <lora:x:1>"):
        (literal,) = told("a cat", prompt, f"{prompt} again")
        assert literal.startswith("prompt 2 has A1111's prompt syntax")
    many = told(*(f"{long} {i}" for i in range(20)))
    assert len(many) == 9
    assert many[-1] == "12 more prompts are truncated to 77 tokens"
