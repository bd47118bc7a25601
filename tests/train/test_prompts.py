from pathlib import Path
from typing import Any

import pytest

from xlsd_cache import UserError
from xlsd_train.model_commands import SampleConfig
from xlsd_train.picture import Picture
from xlsd_train.prompts import pictures


def asked(tmp_path: Path, text: str, **settings: Any) -> list[Picture]:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return pictures(SampleConfig(("model",), path, tmp_path / "out", **settings))


def test_lines_take_the_flags_and_consecutive_seeds(tmp_path: Path) -> None:
    settings = {"seed": 7, "steps": 3, "guidance": 2.0, "negative": "text", "size": "64x72"}
    first, second = asked(tmp_path, "a cat\n\na well--known dog -- at home\n", **settings)
    assert first == Picture("a cat", "text", 7, 3, 2.0, 64, 72, "dpm++")
    assert (second.prompt, second.seed) == ("a well--known dog -- at home", 8)


def test_a_line_may_carry_its_own_settings_in_any_order(tmp_path: Path) -> None:
    line = "a cat, solo --steps 30 --negative blurry, text --seed 5 --size 512x768 --guidance 4.5"
    assert asked(tmp_path, line) == [Picture("a cat, solo", "blurry, text", 5, 30, 4.5, 512, 768)]
    assert asked(tmp_path, "x --negative", negative="text")[0].negative == ""
    assert asked(tmp_path, "--seed 3")[0] == Picture("", "", 3, 20, 7.5, 512, 512)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat --ar 16:9", "prompt 2: --ar is none of --seed"),
        ("a cat --seed x", "prompt 2: invalid literal"),
        ("a cat --steps 0", "prompt 2: --steps 0"),
        ("a cat --guidance -1", "--guidance -1 cannot be drawn"),
        ("a cat --guidance nan", "--guidance nan cannot be drawn"),
        ("a cat --guidance inf", "--guidance inf cannot be drawn"),
        ("a cat --seed -1", "prompt 2: --seed -1 is not from 0 to"),
        (f"a cat --seed {2**63}", "prompt 2: --seed 9223372036854775808 is not from 0 to"),
        ("a cat --size 100x100", "prompt 2: '100x100' is no size in multiples of 8"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_named(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        asked(tmp_path, f"fine\n{line}\n")


def test_impossible_flags_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size: 'big' is no size"):
        asked(tmp_path, "a cat", size="big")
    with pytest.raises(UserError, match="--prompts .* is empty"):
        asked(tmp_path, "\n")
    with pytest.raises(UserError, match="cannot read --prompts"):
        pictures(SampleConfig(("model",), tmp_path / "gone", tmp_path / "out"))
    with pytest.raises(UserError, match="no model is named"):
        SampleConfig((), tmp_path / "gone", tmp_path / "out")
