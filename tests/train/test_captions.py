from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from xlsd_train.captions import Captions


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
