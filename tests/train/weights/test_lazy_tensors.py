import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xlsd_cache.errors import UserError
from xlsd_train.weights.lazy_tensors import (
    compare_tensors,
    in_memory,
    open_tensors,
    read_tensors,
    write_tensors,
)

MIXED = {
    "b": torch.randn(3, 5),
    "a": torch.arange(7),
    "half": torch.randn(2, 3, 1, 1).half(),
    "brain": torch.randn(9).bfloat16(),
    "nothing": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "turned": torch.randn(4, 6).T,
    "nan": torch.tensor([float("nan"), float("inf")]),
}


def stored() -> dict[str, object]:
    return {name: in_memory(value) for name, value in MIXED.items()}


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, stored(), {"format": "pt", "über": "ß"})  # type: ignore[arg-type]
    read = load_file(path)
    assert read.keys() == MIXED.keys()
    for name, value in MIXED.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].nan_to_num(7), value.nan_to_num(7))
    with safe_open(path, "pt") as file:
        assert file.metadata()["über"] == "ß"
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    for name, about in header.items():
        if name != "__metadata__":  # memory-mapped readers want each at its own size's multiple
            assert about["data_offsets"][0] % MIXED[name].element_size() == 0
    compare_tensors(path, stored())  # type: ignore[arg-type]


def test_a_file_that_was_spoilt_is_not_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, stored(), {})  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="is not what was written"):
        compare_tensors(path, stored())  # type: ignore[arg-type]
    fewer = {name: it for name, it in stored().items() if name != "b"}
    with pytest.raises(RuntimeError, match="other names"):
        compare_tensors(path, fewer)  # type: ignore[arg-type]


def test_tensors_are_read_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4, 2), "b": torch.ones(3).half()}, path, {"format": "pt"})
    tensors, metadata = open_tensors(path)
    assert metadata == {"format": "pt"}
    assert {name: (it.shape, it.dtype) for name, it in tensors.items()} == {
        "a": ((4, 2), torch.float32), "b": ((3,), torch.float16)
    }  # fmt: skip
    was, fives = path.stat(), torch.full((4, 2), 5.0)
    with path.open("r+b") as file:  # as if it had been so all the time
        file.write(path.read_bytes().replace(bytes(32), fives.numpy().tobytes()))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert torch.equal(tensors["a"].read(), fives)


def test_a_file_that_was_replaced_meanwhile_is_not_read_as_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    stored, _ = open_tensors(path)
    assert torch.equal(stored["b"].read(), torch.ones(2, dtype=torch.bfloat16))
    save_file({"c": torch.ones(9)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(OSError, match="was replaced while it was read"):
        stored["a"].read()


def test_a_pickle_of_bare_tensors_is_read_as_its_state_dict(tmp_path: Path) -> None:
    held = {"global_step": 7, "state_dict": {"x": torch.ones(2), "y": 3}}
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.ckpt"
        torch.save(held, path, _use_new_zipfile_serialization=not legacy)
        tensors, _ = open_tensors(path)
        assert list(tensors) == ["x"]
        assert torch.equal(tensors["x"].read(), torch.ones(2))


class Runs:
    """What an attacker pickles: loading it opens a file for writing."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_runs_no_code(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "was here"
    held = {"state_dict": {"x": torch.ones(2), "y": Runs(trace)}}
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    for name in ("evil.ckpt", "evil.safetensors"):  # whatever it calls itself
        with pytest.raises(UserError, match=r"it holds _?io\.open, so loading it could run code"):
            open_tensors(path.rename(tmp_path / name))
        path = tmp_path / name
    assert not trace.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)["state_dict"]["y"].close()
    assert trace.exists()  # it is a real one


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"", "no .safetensors file"),
        (b"\x10", "no .safetensors file"),
        (b"garbage" * 99, "no .safetensors file"),
        (b"PK\x03\x04 and then nothing", "pickle of more than weights: it is damaged"),
    ],
)
def test_a_file_of_another_format_is_identified(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_says_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"describes {size} bytes and the file has {size - 30}"):
        open_tensors(path)


def test_too_large_a_number_for_half_is_an_error_and_infinity_is_not() -> None:
    large = in_memory(torch.tensor([1e5]))
    with pytest.raises(OverflowError, match="^its bias, 1 of 1 value, the largest 100000$"):
        large.to(torch.float16, "its bias").read()
    assert large.to(torch.bfloat16).read().isfinite().all()
    assert in_memory(torch.tensor([float("inf")])).to(torch.float16).read().isinf().all()
    whole = in_memory(torch.arange(3))
    assert whole.to(torch.float16) is whole


def header(text: bytes, claimed: int | None = None) -> bytes:
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text


def entry(**other: object) -> bytes:
    about = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **other}
    return json.dumps({"a": about}).encode()


@pytest.mark.parametrize(
    "content",
    [
        header(b'{"a"', 2**40),
        header(b'{"a"', 2**64 - 1),
        header(b"{" + b" " * 2**25 + b"}", 2**25 + 2),
        header(b'{"a":' * 100_000),
        header(b'{"a":' + b"[" * 100_000),
        header(entry(data_offsets=[0, 2**62])) + bytes(4),
        header(entry(data_offsets=[4, 0])) + bytes(4),
        header(entry(shape=[-1])) + bytes(4),
        header(entry(shape=[2**40, 2**40])) + bytes(4),
        header(entry(dtype="F33")) + bytes(4),
        header(entry(dtype="F4")) + bytes(4),
        header(entry()[:-1] + b"," + entry(data_offsets=[4, 8])[1:]) + bytes(8),
    ],
)
def test_a_header_that_lies_is_refused_and_little_is_read(tmp_path: Path, content: bytes) -> None:
    """Also of a file whose size is no bytes on the disk."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for size in (len(content), 3 * 2**30):
        os.truncate(path, size)
        with pytest.raises(UserError, match="cannot read") as error:
            open_tensors(path)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="."):
            read_tensors(path)


def test_a_pickle_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Torch packs nothing; and what it saved stays on the disk until it is read."""
    path = tmp_path / "model.ckpt"
    torch.save({"x": torch.zeros(2**20)}, path)
    assert torch.equal(open_tensors(path)[0]["x"].read(), torch.zeros(2**20))
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(UserError, match="more than weights: it is damaged"):
        open_tensors(tmp_path / "packed.ckpt")
    torch.save({"x": torch.ones(2, 2).to_sparse()}, path)
    with pytest.raises(UserError, match="x is not a plain tensor"):
        open_tensors(path)


@settings(max_examples=60)
@given(st.binary(max_size=60), st.integers(0, 80), st.sampled_from(["zip", "old", "safetensors"]))
def test_any_change_to_a_file_of_weights_ends_in_weights_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, kind: str
) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.ckpt"
    if kind == "safetensors":
        save_file({"a": torch.ones(2)}, path)
    else:
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    with suppress(UserError):
        tensors, _ = open_tensors(path)
        for stored in tensors.values():
            stored.read()
