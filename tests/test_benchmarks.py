"""Benchmarks cannot rot: each runs here for one iteration."""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.throughput import flop_counter
from xlsd_cache.decode import FORMATS

ROOT = Path(__file__).parent.parent


def run(*args: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_throughput_measures_every_phase_with_and_without_the_store() -> None:
    options = ("--steps", "1", "--batch", "2", "--resolution", "64", "--threads", "1")
    lines = run("benchmarks/throughput.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/throughput.py " + " ".join(options)
    assert lines[2].startswith("precision: fp32")
    assert "TFLOP/s" in lines[3]
    table = [line.split() for line in lines if line.split()[1:2] in (["memory"], ["store"])]
    assert [row[:2] for row in table] == [
        [phase, data] for phase in ("unet", "te", "both") for data in ("memory", "store")
    ]
    for _, _, steps, images, tflop, rate, share, gib in table:
        assert float(images) == 2 * float(steps) or abs(float(images) / float(steps) - 2) < 0.01
        assert abs(float(tflop) * float(steps) / float(rate) - 1) < 0.01
        assert 0 < float(share) < 100
        assert 0.1 < float(gib) < 8
    assert sum("the loader's share" in line for line in lines) == 3


def test_captions_measures_planning_captions_and_scanning() -> None:
    options = ("--rows", "5000", "--files", "120", "--workers", "2")
    lines = run("benchmarks/captions.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/captions.py " + " ".join(options)
    items = [line.split()[-5] for line in lines[3:]]
    assert items == ["5,000"] * 7 + ["120"] * 2


def test_throughput_of_one_batch_in_memory_needs_no_store() -> None:
    lines = run(
        "benchmarks/throughput.py", "--phase", "te", "--steps", "1", "--batch", "1",
        "--resolution", "64", "--fake-data", "--precision", "bf16", "--no-gradient-checkpointing",
    )  # fmt: skip
    assert [line.split()[:2] for line in lines[-1:]] == [["te", "memory"]]


def test_decoding_is_measured_by_format_route_and_guard() -> None:
    options = ("--megapixels", "0.8", "--repeats", "1", "--resolution", "64", "--children", "1")
    lines = run("benchmarks/decode.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/decode.py " + " ".join(options)
    rows = {line[:17].strip(): line[17:].split() for line in lines}
    assert {line.split()[0] for line in lines if line} >= set(FORMATS)
    assert float(rows["full"][1]) == float(rows["pillow, bare"][1]) == 0
    assert 0 < float(rows["as built"][1]) <= 1  # an 894x894 picture shrinks fourteenfold to 64x64
    assert all(float(rows[name][0]) > 0 for name in ("in this process", "in one child"))


def test_cache_compares_build_with_bare_loops_and_peers() -> None:
    vae = Path("benchmarks") / "demo" / "vae"
    options = ("--vae", str(vae), "--images", "3", "--rounds", "1", "--resolution", "64")
    lines = run("benchmarks/cache.py", *options)
    table = {line[:22].strip(): line[22:].split() for line in lines[5:11]}
    assert [name.split(",")[0] for name in table] == [
        "bare", "bare", "xlsd-cache build", "as OneTrainer", "as a script", "as kohya"
    ]  # fmt: skip
    assert max(float(table[name][1]) for name in table if name.startswith("bare")) == 1
    assert lines[11].startswith("build's time: ")
    errors = dict(line.split() for line in lines[13:])
    assert 0 < float(errors["fp32"]) < 1e-4 < float(errors["bf16"]) < 0.1


def test_attention_is_counted_on_the_cpu_too() -> None:
    """Two matrix products forward and five backward, one of them forward's again (Dao 2022)."""
    q, k, v = (torch.randn(1, 3, tokens, 8, requires_grad=True) for tokens in (64, 16, 16))
    with flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.autograd.backward(out.sum())
    assert counter.get_total_flops() == (2 + 5) * 2 * 3 * 64 * 16 * 8


def verdicts(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("PASS  ", "FAIL  "))]


def test_store_reads_the_same_rows_by_every_reader() -> None:
    """That they are the same rows the benchmark itself asserts, before it measures."""
    options = (
        "--samples", "48", "--rows-per-shard", "16", "--rounds", "1", "--cold-rounds", "1",
        "--batches", "1", "--batch", "8",
    )  # fmt: skip
    lines = run("benchmarks/store.py", *options)
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/store.py " + " ".join(options)
    table = [line.split() for line in lines if line.endswith("x")]
    assert len(table) == 2 * 11  # warm and cold
    for *_, wall, cpu, of_memmap, times in table:
        assert min(float(wall), float(cpu), float(of_memmap), float(times[:-1])) >= 0
    assert len(verdicts(lines)) == 6


def test_scale_takes_every_step() -> None:
    """Its own assertions: tags are found where the captions have them."""
    options = ("--rows", "3000", "--rows-per-shard", "256", "--resume-at", "1000")
    lines = run("benchmarks/scale.py", *options)
    assert lines[1] == "command: python benchmarks/scale.py " + " ".join(options)
    steps = [line for line in lines[3:] if line and line not in verdicts(lines)][1:]
    assert len(steps) == 8
    assert "3000 images in" in steps[0]
    assert "3000 samples in 7 buckets" in steps[1]
    assert "3000 samples in 7 buckets" in steps[2]
    assert len(verdicts(lines)) == 4


def test_overtrain_tells_every_checkpoint_and_the_best() -> None:
    lines = run("benchmarks/overtrain.py", "--steps", "2", "--tiles", "20", "--held-out", "0.4")
    assert lines[0].startswith("machine: ")
    assert lines[1] == "command: python benchmarks/overtrain.py --steps 2 --tiles 20 --held-out 0.4"
    assert "held out are measured" in lines[2]
    assert [line.split()[0] for line in lines[4:7]] == ["0", "1", "2"]
    assert lines[7].startswith("best on held-out images: step ")
    assert [line.split()[2] for line in lines[8:10]] == ["training", "held-out"]
