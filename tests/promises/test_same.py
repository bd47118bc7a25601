"""`benchmarks/same.py` finds every difference between what two checkouts write."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_parts.cases import cases
from benchmarks.same_parts.files import differences, hashes, one_hash

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_checkout_writes_the_same_store_twice_and_a_changed_byte_is_found(tmp_path: Path) -> None:
    out = tmp_path / "same.json"
    options = ("--before", ROOT, "--after", ROOT, "--work", tmp_path, "--only", "store")
    done = subprocess.run(
        [sys.executable, "benchmarks/same.py", *map(str, options), "--json", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("machine: ")
    before, after = json.loads(out.read_text())["cases"]["store"].values()
    assert before == after
    row = ["store", str(len(before)), one_hash(before), one_hash(after), "yes"]
    assert lines[-2].split() == row
    assert lines[-1] == f"1 cases, {len(before)} files: 0 differ"

    shard = "latents/latents.zarr/128x128/c.0.0.0.0"
    latents = tmp_path / "after/store" / shard
    content = bytearray(latents.read_bytes())
    content[100] ^= 1
    latents.write_bytes(content)
    found = differences(before, hashes(tmp_path / "after/store"))
    assert [line.split(":")[0] for line in found] == [shard]


def test_what_is_left_out_of_the_comparison_is_no_more_than_told(tmp_path: Path) -> None:
    write_run(tmp_path / "before")
    before = hashes(tmp_path / "before")
    tensors, metadata = "w.safetensors tensors", "w.safetensors metadata"
    assert sorted(before) == sorted(["config.json", "metrics.jsonl", metadata, tensors])
    expected: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"wait_s": 2.0}, []),
        ({"date": "tomorrow"}, []),
        ({"command": ["another"]}, []),
        ({"loss": 0.25}, ["metrics.jsonl"]),
        ({"weight": 1.5}, [tensors]),
        ({"step": "2"}, [metadata]),
        ({"memory": "cheap"}, ["config.json"]),
    ]
    for changed, named in expected:
        write_run(tmp_path / "after", **changed)
        found = differences(before, hashes(tmp_path / "after"))
        assert [line.split(": ")[0] for line in found] == named
    (tmp_path / "after/FAILED").touch()
    failed = hashes(tmp_path / "after")
    assert [line.split(": ")[0] for line in differences(failed, failed)] == ["FAILED"]
    assert differences({}, {}) == ["no files"]


def write_run(folder: Path, **changed: Any) -> None:
    """Some files of a run, with values that are compared and values that are not."""
    value = {"wait_s": 1.0, "loss": 0.5, "date": "today", "step": "1", "weight": 1.0}
    value |= {"command": ["one"], "memory": "plain", **changed}
    folder.mkdir(exist_ok=True)
    config = {"command": value["command"], "config": {"memory": value["memory"]}}
    (folder / "config.json").write_text(json.dumps(config))
    metrics = {name: value[name] for name in ("loss", "wait_s")}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    metadata = {"modelspec.date": str(value["date"]), "xlsd.step": str(value["step"])}
    save_file({"w": torch.tensor([value["weight"]])}, folder / "w.safetensors", metadata)


def test_cases_begin_with_cases_that_exist() -> None:
    known = cases()
    for case in known.values():
        assert {*case.needs, case.of, case.equals} <= {*known, ""}
