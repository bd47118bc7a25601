from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from tests.support import cache, files, metrics, printed, train
from tests.support.sessions import Open
from xlsd_cache.dataset import rng as draw
from xlsd_cache.errors import UserError
from xlsd_train.data.caption_edits import CaptionEdits
from xlsd_train.data.captions import CaptionColumns, Captions


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(model / "tokenizer")


def test_tokens_are_the_tokenizers_own(tokenizer: CLIPTokenizer) -> None:
    texts = ["cat, solo", "", "a word it has never seen: photosynthesis"]
    ids = Captions(tokenizer, 77, 0, 0.0).tokenize(texts)
    expected = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.input_ids)


def test_long_captions_are_cut_and_end_as_they_should(tokenizer: CLIPTokenizer) -> None:
    ids = Captions(tokenizer, 77, 0, 0.0).tokenize(["cat, " * 200])
    assert ids.shape == (1, 77)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.eos_token_id


def test_a_special_token_spelt_out_is_no_special_token(tokenizer: CLIPTokenizer) -> None:
    captions = Captions(tokenizer, 77, 0, 0.0)
    spelt = captions.tokenize(["a <|endoftext|> cat<|startoftext|>"])
    assert torch.equal(spelt, captions.tokenize(["a   cat "]))
    assert (spelt[0] == tokenizer.bos_token_id).sum() == 1


def test_each_line_is_an_alternative_chosen_by_position(tokenizer: CLIPTokenizer) -> None:
    captions, positions = Captions(tokenizer, 77, 0, 0.0), np.arange(3000)
    chosen = captions.choose(["one\ntwo\nthree"] * 3000, positions)
    for line in ("one", "two", "three"):
        assert 900 < chosen.count(line) < 1100
    assert captions.choose(["one\ntwo\nthree"] * 10, positions[50:60]) == chosen[50:60]
    assert captions.choose([None, ""], positions[:2]) == ["", ""]


def test_dropout_drops_as_often_as_said(tokenizer: CLIPTokenizer) -> None:
    positions = np.arange(3000)
    for rate, least, most in ((0.0, 0, 0), (0.1, 240, 360), (1.0, 3000, 3000)):
        chosen = Captions(tokenizer, 77, 0, rate).choose(["words"] * 3000, positions)
        assert least <= chosen.count("") <= most


def test_parts_are_drawn_by_position_alone(tokenizer: CLIPTokenizer) -> None:
    text, positions = ", ".join(f"tag{i}" for i in range(20)), np.arange(200)
    parts = CaptionEdits(shuffle=True, dropout=0.2, most=8)
    captions = Captions(tokenizer, 77, 5, 0.1, parts)
    chosen = captions.choose([text] * 200, positions)
    assert len(set(chosen)) > 150
    assert all(len(caption.split(", ")) <= 8 for caption in chosen)
    assert chosen[60:70] == captions.choose([text] * 10, positions[60:70])
    assert chosen == Captions(tokenizer, 77, 5, 0.1, parts).choose([text] * 200, positions)
    assert chosen != Captions(tokenizer, 77, 6, 0.1, parts).choose([text] * 200, positions)
    lines = captions.lines([text] * 200, positions)  # the same, none of them left out
    assert all(got in ("", line) and line for got, line in zip(chosen, lines, strict=True))


@pytest.mark.parametrize(
    ("settings", "becomes"),
    [
        ({}, "old_hat,cat, old_hat , 猫"),
        ({"tags": True}, "old_hat, cat, 猫"),
        ({"drop_tags": "cat"}, "old_hat, 猫"),
        ({"underscores_to_spaces": True}, "old hat, cat, 猫"),
        ({"max_tags": 2}, "old_hat, cat"),
        ({"tag_dropout": 1.0}, ""),
        ({"tag_dropout": 1.0, "keep_first": 1}, "old_hat"),
        ({"shuffle": "sentences"}, "old_hat,cat, old_hat , 猫."),
        ({"caption_dropout": 1.0}, ""),
    ],
)
def test_every_option_has_its_effect(
    open_run: Open, settings: dict[str, Any], becomes: str
) -> None:
    captions = open_run(**settings).source.captions
    assert captions.choose(["old_hat,cat, old_hat , 猫"], np.arange(1)) == [becomes]


def test_columns_are_mixed_by_weight_among_those_that_a_sample_has() -> None:
    words = draw.words(0, "caption column", np.arange(4000))
    columns = CaptionColumns(("txt", "wd", "unseen"), (3.0, 1.0, 0.0))
    mixed = columns.mix([["a"] * 4000, ["b"] * 4000, ["c"] * 4000], words)
    assert 2900 < mixed.count("a") < 3100
    assert mixed.count("a") + mixed.count("b") == 4000
    assert columns.mix([[None, "", None], ["b", "b", None], ["c"] * 3], words[:3]) == [
        "b", "b", None
    ]  # fmt: skip
    assert CaptionColumns(("txt",), (1.0,)).mix([["a", None]], words[:2]) == ["a", None]


def test_a_mix_is_written_name_equals_weight() -> None:
    there = ["txt", "jsonl:wd", "json:a=2", "jsonl:3"]

    def parse(given: str) -> dict[str, float]:
        columns = CaptionColumns.parse(given, there, "latents")
        return dict(zip(columns.names, columns.weights, strict=True))

    assert parse("txt") == {"txt": 1}
    assert parse("txt=3, jsonl:wd") == {"txt": 3, "jsonl:wd": 1}
    assert parse("txt=0.5,jsonl:3=0") == {"txt": 0.5, "jsonl:3": 0}
    assert parse("json:a=2") == {"json:a=2": 1}  # a column's whole name is that column
    assert parse("json:a=2=4,jsonl:3") == {"json:a=2": 4, "jsonl:3": 1}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("moon", "no caption column 'moon' \\(it has txt, wd\\)"),
        ("txt=3,moon=1", "no caption column 'moon'"),
        ("txt=many", "'many' is no weight"),
        ("txt=-1", "'-1' is no weight"),
        ("txt=nan", "'nan' is no weight"),
        ("txt=inf", "'inf' is no weight"),
        ("txt,txt=2", "has txt twice"),
        ("txt=0,wd=0", "no weight above 0"),
        ("", "no caption column ''"),
        (None, "has the caption columns txt, wd; choose one"),
    ],
)
def test_what_is_no_mix_is_refused(given: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        CaptionColumns.parse(given, ["txt", "wd"], "latents")


@pytest.mark.slow
def test_a_run_with_everything_random_about_captions_resumes_to_the_bit(
    photos: Path, vae: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixed columns, selection, shuffle, dropout of tags and captions, limits: all together."""
    data = tmp_path / "latents"
    build = ("--out", data, "--vae", vae, "--resolution", 128, "--captions", "txt,title")
    assert cache("build", photos, *build) == 0
    given = [
        "--phase", "te", "--batch", 2, "--accum", 2, "--data", data, "--model", model,
        "--steps", 8, "--save-every", 3, "--sample-every", 4, "--sample-steps", 2, "--lr", 1e-3,
        "--warmup", 0, "--threads", 1, "--caption", "txt=3,title=1", "--require-tags", "solo",
        "--forbid-tags", "wide", "--shuffle", "tags", "--tag-dropout", 0.2, "--max-tags", 3,
        "--keep-first", 1, "--drop-tags", "portrait", "--underscores-to-spaces",
        "--caption-dropout", 0.2, "--clip-skip", 1,
    ]  # fmt: skip
    assert train(*given, "--out", tmp_path / "whole") == 0
    assert "3 of 8 images are selected by tags" in printed(capsys)
    for stop in (1, 4, 8):
        assert train(*given, "--out", tmp_path / "parts", "--stop-after", stop) == 0
    last = "checkpoints/step-00000008/*"
    assert files(tmp_path / "parts", last) == files(tmp_path / "whole", last)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert (
        metrics(tmp_path / "whole")[-1]["epoch"]
        == metrics(tmp_path / "whole")[-1]["images_seen"] / 3
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--caption-dropout", 0.5), ("--require-tags", "solo"), ("--forbid-tags", "wide"),
        ("--tags", None), ("--drop-tags", "solo"), ("--underscores-to-spaces", None),
        ("--shuffle", "tags"), ("--tag-dropout", 0.5), ("--max-tags", 2), ("--clip-skip", 1),
        ("--tokens", 248),
    ],
)  # fmt: skip
def test_a_resume_with_other_captions_is_refused(
    model: Path, store: Path, tmp_path: Path, option: str, value: object,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--phase", "unet", "--batch", 2, "--data", store, "--model", model, "--steps", 2]
    given += ["--sample-every", 0, "--out", tmp_path / "run"]
    assert train(*given, "--stop-after", 1) == 0
    assert train(*given, option, *([] if value is None else [value])) == 1
    said = capsys.readouterr().err
    assert "was started with " in said
    assert f"{option} " in said
