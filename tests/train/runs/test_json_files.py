"""Any JSON file gives a value or one error, in bounded memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import JSON_BYTES, read_json
from xlsd_train.config.recipes import Recipe
from xlsd_train.config.sd15 import SCHEDULER, TEXT_ENCODER, UNET, VAE
from xlsd_train.evaluation.images import Picture
from xlsd_train.evaluation.prompts import read_pictures
from xlsd_train.report.page import page
from xlsd_train.runs.history import histories
from xlsd_train.runs.json_files import CHUNK, LINE_NBYTES, misfit, read_log
from xlsd_train.runs.record import FIELDS, read_record, read_state, record_to_resume
from xlsd_train.weights.network import (
    KINDS,
    check_shapes,
    checked_config,
    network_of,
    read_latents_json,
)
from xlsd_train.weights.prediction_type import file_scheduler, known_scheduler

CONFIGS = {"unet": UNET, "text_encoder": TEXT_ENCODER, "vae": VAE}
few = settings(max_examples=40)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples overwrite each other."""
    return tmp_path_factory.mktemp("odd")


def sentence(work: Any, *given: Any) -> Any:
    """What it returns, or None where it raises one sentence."""
    try:
        return work(*given)
    except UserError:
        return None


def record_of(names: dict[str, Any]) -> dict[str, Any]:
    store = {"path": "x", "fingerprint": "f", "generation": 1, "images": 1, "selected": 1}
    return {"settings": {}, "config": {}, "stores": [store], **names}


@few
@given(st.dictionaries(st.sampled_from([*FIELDS]), values, max_size=3))
def test_any_config_json_makes_a_page_or_a_sentence(folder: Path, names: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(record_of(names)))
    if (record := sentence(read_record, folder)) is not None:
        page(histories([folder]), folder / "report.html")
        sentence(record_to_resume, folder, record.to_json())


@few
@given(values)
def test_any_state_json_is_a_state_or_a_sentence(folder: Path, value: Any) -> None:
    (folder / "state.json").write_text(json.dumps(value))
    sentence(read_state, folder)
    (folder / "latents.json").write_text(json.dumps(value))
    sentence(read_latents_json, folder / "latents.json")


@few
@given(
    st.lists(
        st.binary(max_size=30)
        | st.fixed_dictionaries(
            {"step": scalars, "weights": scalars, "loss": values, "epoch": scalars}
        ).map(lambda x: json.dumps(x).encode())
    )
)
def test_any_log_makes_a_page(folder: Path, lines: list[bytes]) -> None:
    (folder / "config.json").write_text(json.dumps(record_of({})))
    for name in ("metrics.jsonl", "validation.jsonl"):
        (folder / name).write_bytes(b"\n".join([*lines, b""]))
    page(histories([folder]), folder / "report.html")
    for name in ("metrics.jsonl", "validation.jsonl"):
        (folder / name).unlink()


@few
@given(st.sampled_from(KINDS), st.data())
def test_any_config_of_a_part_is_a_network_or_a_sentence(kind: Any, data: st.DataObject) -> None:
    told = CONFIGS[kind] | ({"_class_name": "AutoencoderKL"} if kind == "vae" else {})
    name = data.draw(st.sampled_from([*told, "auto_map", "model_type"]))
    config = sentence(checked_config, kind, {**told, name: data.draw(values)}, "x")
    assert config is None or "auto_map" not in config
    if config is not None and name != "block_out_channels":  # a network takes a while
        return
    if config is not None and (part := sentence(network_of, kind, config, {}, "x")):
        sentence(check_shapes, part)


@few
@given(st.sampled_from([*SCHEDULER]), values)
def test_any_scheduler_is_one_or_a_sentence(name: str, value: Any) -> None:
    sentence(known_scheduler, {**SCHEDULER, name: value}, "x")


@few
@given(st.binary(max_size=60) | values.map(lambda x: json.dumps(x).encode()))
def test_any_text_file_is_read_or_a_sentence(folder: Path, data: bytes) -> None:
    """Prompts, a recipe, and NAME.yaml."""
    for name in ("x.txt", "x.toml", "x.yaml"):
        (folder / name).write_bytes(data)
    default = Picture("", "", 0, 1, 1.0, 64, 64)
    sentence(read_pictures, folder / "x.txt", "--prompts", default)
    sentence(Recipe.read, str(folder / "x.toml"))
    sentence(file_scheduler, folder / "x.safetensors", {}, {}, None, None)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "a: &a [x]\n" * 30_000, "? {a: b}\n: c", "!!python/object:os.system {}",
             "a: 2001-99-99", "=: ="],
)  # fmt: skip
def test_a_yaml_that_means_harm_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises((UserError, yaml.YAMLError)):
        assert file_scheduler(tmp_path / "x.safetensors", {}, {}, None, None) or "=" not in text
        raise UserError("a value")


def test_files_are_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, told in (("[" * 10**5, "too deep"), ("", "Expecting"), ("\ufeff", "Expecting")):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_json(path)
    os.truncate(path, JSON_BYTES + 1)
    with pytest.raises(OSError, match="are more than"):
        read_json(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "pipe")


def test_a_log_is_read_in_order_whatever_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [b"{}\n", b"x" * (3 * LINE_NBYTES) + b"\n", b'{"step": 1}\n', b" " * 999 + b"[]\n"]
    path.write_bytes(b"".join(lines * 3) + b'{"torn')
    found = [each for some in read_log(path) for each in some]
    assert [line for line, _ in found] == [lines[0], b"", *lines[2:]] * 3
    assert [told for _, told in found] == [{}, None, {"step": 1}, None] * 3
    assert CHUNK >= LINE_NBYTES


def test_shapes() -> None:
    shape = {"a!": int, "b": [float], "c": [str, int], "d": {str: (None, str)}}
    assert misfit({"a": 1, "b": [1, 2.5], "c": ["x", 1], "d": {"x": None}, "e": []}, shape) is None
    for value, told in (
        ({}, "a is missing"),
        ({"a": True}, "a has the wrong type"),
        ({"a": 2**60}, "a has the wrong type"),
        ({"a": 1, "b": ["x"]}, "b[0] has the wrong type"),
        ({"a": 1, "c": ["x"]}, "c has the wrong type"),
        ({"a": 1, "d": {"x": 1}}, "d.x has the wrong type"),
        ([], "it has the wrong type"),
    ):
        assert told in str(misfit(value, shape))
