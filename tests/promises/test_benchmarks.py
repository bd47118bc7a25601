"""Benchmarks cannot rot: each runs here for one iteration, the longer ones with -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.card import PARTS, found_before
from benchmarks.train.max_batch import nearest
from xlsd_cache.images.decode import FORMATS

ROOT = Path(__file__).parents[2]


def run(*args: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("phases", [("te",), pytest.param(("unet", "te"), marks=pytest.mark.slow)])
def test_throughput_measures_phases_with_and_without_the_store(phases: tuple[str, ...]) -> None:
    options = (
        "--phase", *phases, "--steps", "1", "--batch", "2", "--resolution", "64",
        "--threads", "1",
    )  # fmt: skip
    lines = run("benchmarks/throughput.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/throughput.py " + " ".join(options)
    assert lines[2].startswith("precision: fp32")
    assert "TFLOP/s" in lines[3]
    table = [line.split() for line in lines if line.split()[1:2] in (["memory"], ["store"])]
    assert [row[:2] for row in table] == [
        [phase, data] for phase in phases for data in ("memory", "store")
    ]
    for _, _, steps, images, tflop, rate, share, gib in table:
        assert float(images) == 2 * float(steps) or abs(float(images) / float(steps) - 2) < 0.01
        assert abs(float(tflop) * float(steps) / float(rate) - 1) < 0.01
        assert 0 < float(share) < 100
        assert 0.1 < float(gib) < 8
    assert sum("the loader's share" in line for line in lines) == len(phases)


@pytest.mark.slow
def test_export_measures_memory_and_time() -> None:
    options = ("--size", "nano", "--formats", "single-file", "--dtypes", "fp16")
    lines = run("benchmarks/train/export.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/train/export.py " + " ".join(options)
    ((form, dtype, _, before, peak, more, seconds, _),) = (line.split() for line in lines[4:])
    assert (form, dtype) == ("single-file", "fp16")
    assert abs(float(before) + float(more) - float(peak)) < 0.002
    assert 0 <= float(more) < 0.2
    assert float(seconds) > 0


def test_captions_measures_planning_captions_and_scanning() -> None:
    options = ("--rows", "5000", "--files", "120", "--workers", "2")
    lines = run("benchmarks/cache/captions.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/cache/captions.py " + " ".join(options)
    items = [line.split()[-5] for line in lines[3:]]
    assert items == ["5,000"] * 7 + ["120"] * 2


@pytest.mark.slow
def test_throughput_against_a_plain_loop_needs_no_store() -> None:
    lines = run(
        "benchmarks/throughput.py", "--phase", "te", "--steps", "1", "--batch", "1",
        "--resolution", "64", "--fake-data", "--precision", "bf16", "--memory", "cheap",
        "--against", "diffusers", "--channels-last",
    )  # fmt: skip
    table = {line[11:22].strip(): line.split() for line in lines if line.split()[0] == "te"}
    assert [*table] == ["memory", "ch. last", "plain", "plain+VAE"]
    images = {name: float(cells[-5]) for name, cells in table.items()}
    tflop = {name: float(cells[-4]) for name, cells in table.items()}
    # Checkpointing computes what is kept here, and the VAE comes on top of that.
    assert tflop["memory"] == tflop["ch. last"] < tflop["plain"] < tflop["plain+VAE"]
    said = [line.strip().removeprefix("images/s, ").split(": ") for line in lines[-5:]]
    assert len(said) == 5
    for names, ratio in said:
        ours, theirs = names.split(" / ")
        assert abs(float(ratio) / (images[ours] / images[theirs]) - 1) < 0.01


@pytest.mark.slow
def test_max_batch_predicts_what_the_allocator_holds() -> None:
    lines = run(
        "benchmarks/train/max_batch.py", "--model", "nano", "--check", "--phase", "te",
        "--size", "256x192", "--batch", "6", "--slices", "2", "--way", "plain", "sliced",
    )  # fmt: skip
    errors = [float(line.split()[-2].rstrip("%")) for line in lines if line.split()[-2][-1] == "%"]
    assert len(errors) == 3
    assert 0 < max(map(abs, errors)) <= 3
    assert verdicts(lines)[0].startswith("PASS  3 of 3")


@pytest.mark.slow
def test_max_batch_finds_the_largest_batch() -> None:
    options = ("--model", "nano", "--phase", "te", "--size", "64x64", "--way", "plain", "cheap")
    lines = run("benchmarks/train/max_batch.py", *options, "--vram", "2")
    assert lines[3].endswith("of which the run gets 1.00 GiB")
    if not torch.cuda.is_available():
        assert lines[4].startswith("predicted only")
    plain, cheap = (int(line.split()[5]) for line in lines[-2:])
    assert 100 < plain < cheap < 10_000


@pytest.mark.parametrize("most", [0, 1, 7, 64, 65, 90, 300])
@pytest.mark.parametrize("guess", [0, 1, 64, 70])
def test_the_search_finds_what_fits_from_any_guess(guess: int, most: int) -> None:
    asked = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= most

    assert nearest(fits, guess) == most
    assert 0 not in asked


def test_decoding_is_measured_by_format_route_and_guard() -> None:
    options = ("--megapixels", "0.8", "--repeats", "1", "--resolution", "64", "--children", "1")
    lines = run("benchmarks/cache/decode.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/cache/decode.py " + " ".join(options)
    rows = {line[:17].strip(): line[17:].split() for line in lines}
    assert {line.split()[0] for line in lines if line} >= set(FORMATS)
    assert float(rows["full"][1]) == float(rows["pillow, bare"][1]) == 0
    assert 0 < float(rows["as built"][1]) <= 1  # an 894x894 picture shrinks fourteenfold to 64x64
    assert all(float(rows[name][0]) > 0 for name in ("in this process", "in one child"))


@pytest.mark.slow
def test_cache_compares_build_with_bare_loops_and_peers() -> None:
    vae = Path("benchmarks") / "demo" / "vae"
    options = ("--vae", str(vae), "--images", "3", "--rounds", "1", "--resolution", "64")
    lines = run("benchmarks/cache/build.py", *options)
    table = {line[:22].strip(): line[22:].split() for line in lines[5:11]}
    assert [name.split(",")[0] for name in table] == [
        "bare", "bare", "xlsd-cache build", "as OneTrainer", "as a script", "as kohya"
    ]  # fmt: skip
    assert max(float(table[name][1]) for name in table if name.startswith("bare")) == 1
    assert lines[11].startswith("build's time: ")
    errors = dict(line.split() for line in lines[13:])
    assert 0 < float(errors["fp32"]) < 1e-4 < float(errors["bf16"]) < 0.1


def verdicts(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("PASS  ", "FAIL  "))]


def test_store_reads_the_same_rows_by_every_reader() -> None:
    """That they are the same rows the benchmark itself asserts, before it measures."""
    options = (
        "--samples", "48", "--rows-per-shard", "16", "--rounds", "1", "--cold-rounds", "1",
        "--batches", "1", "--batch", "8",
    )  # fmt: skip
    lines = run("benchmarks/cache/store.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/cache/store.py " + " ".join(options)
    table = [line.split() for line in lines if line.endswith("x")]
    assert len(table) == 2 * 11  # warm and cold
    for *_, wall, cpu, of_memmap, times in table:
        assert min(float(wall), float(cpu), float(of_memmap), float(times[:-1])) >= 0
    assert len(verdicts(lines)) == 6


@pytest.mark.slow
def test_scale_takes_every_step() -> None:
    """Its own assertions: tags are found where the captions have them."""
    options = ("--rows", "3000", "--rows-per-shard", "256", "--resume-at", "1000")
    lines = run("benchmarks/cache/scale.py", *options)
    assert lines[1] == "command: python benchmarks/cache/scale.py " + " ".join(options)
    steps = [line for line in lines[3:] if line and line not in verdicts(lines)][1:]
    assert len(steps) == 9
    assert "3000 images in" in steps[0]
    assert "3000 samples in 7 buckets" in steps[1]
    assert "3000 samples in 7 buckets" in steps[2]
    assert len(verdicts(lines)) == 5


@pytest.mark.slow
def test_overtrain_tells_every_checkpoint_and_the_best() -> None:
    lines = run(
        "benchmarks/train/overtrain.py", "--steps", "2", "--tiles", "20", "--held-out", "0.4"
    )
    assert lines[0].startswith("machine: ")
    assert (
        lines[1]
        == "command: python benchmarks/train/overtrain.py --steps 2 --tiles 20 --held-out 0.4"
    )
    assert "held out are measured" in lines[2]
    assert [line.split()[0] for line in lines[4:7]] == ["0", "1", "2"]
    assert lines[7].startswith("best on held-out images: step ")
    assert [line.split()[2] for line in lines[8:10]] == ["training", "held-out"]


def test_card_runs_every_part_without_a_card(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    names = [name for name in PARTS if name != "room"]
    lines = run("benchmarks/card.py", "--tiny", "--out", str(out), "--part", *names)
    assert lines[0].startswith("machine: ")
    assert lines[-1] == f"written: {out}"
    found = json.loads(out.read_text())
    parts = [name for name, value in found.items() if isinstance(value, dict)]
    assert parts == names
    assert not [name for name in parts if "failed" in found[name]]
    assert found["strict"]["strict"]
    exact = [x for x in found["determinism"].values() if isinstance(x, dict)]
    assert exact == [{"twice": True, "resumed": True}] * 2
    assert abs(found["peaks"]["plain by 2"]["error"]) < 0.03
    assert found["speed"]["sliced by 2"]["tflop"] > found["speed"]["plain by 2"]["tflop"]
    assert len(found["kernels"]["top"]) == 10
    table = out.with_suffix(".txt").read_text().splitlines()
    assert [line for line in table if line in parts] == parts
    here = found["machine"]
    assert found_before(out, here) == found  # of the same machine: a file may be made in parts
    assert found_before(out, f"not {here}") == found_before(tmp_path / "none", here) == {}


@pytest.mark.slow
def test_the_bits_of_a_first_step_are_compared_in_fresh_processes(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    run("benchmarks/card.py", "--tiny", "--out", str(out), "--part", "room")
    assert json.loads(out.read_text())["room"]["same"]
