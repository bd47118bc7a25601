"""Every benchmark runs for one iteration; the longer ones only with -m slow."""

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card import PARTS, previous_results
from benchmarks.train.max_batch import nearest
from tests.support import train
from tests.support.browser import needed
from xlsd_cache.images.header import FORMATS

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "benchmarks/card.py", "benchmarks/card_parts/room.py", "benchmarks/costs.py",
    "benchmarks/same.py", "benchmarks/scale.py", "benchmarks/startup.py",
    "benchmarks/throughput.py",
    *(f"benchmarks/cache/{name}.py" for name in ("build", "captions", "decode", "store")),
    "benchmarks/cache/generations.py", "benchmarks/cache/planning.py",
    "benchmarks/cache/ray_cluster.py", "benchmarks/cache/watch.py",
    "benchmarks/train/lion.py",
    *(f"benchmarks/train/{name}.py" for name in ("equal", "export", "max_batch", "nodes")),
    "benchmarks/train/overtrain.py", "benchmarks/train/small_cards.py",
    "benchmarks/cache/report.py", "benchmarks/train/followed.py", "benchmarks/train/live.py",
    "benchmarks/train/report.py", "benchmarks/train/terminal.py",
]  # fmt: skip


def run(*args: str, cwd: Path = ROOT) -> list[str]:
    """The lines that a script prints."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


class Measured:
    """What a benchmark printed, and the JSON that it wrote."""

    def __init__(self, script: str, *options: str, out: Path) -> None:
        given = (*options, "--json", str(out / "report.json"))
        self.lines = run(f"benchmarks/{script}", *given)
        self.report = json.loads((out / "report.json").read_text())
        assert self.report["machine"]
        assert self.report["versions"]["torch"] == torch.__version__
        assert self.report["command"].startswith(f"python benchmarks/{script} {options[0]} ")
        for line, fact in zip(self.lines, ("machine", "command"), strict=False):
            assert line == f"{fact}: {self.report[fact]}"

    def rows(self, table: str) -> list[dict[str, Any]]:
        """The rows of one table."""
        return [row for row in self.report["rows"] if row["table"] == table]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_any_folder(script: str, tmp_path: Path) -> None:
    assert any("--" in line for line in run(str(ROOT / script), "--help", cwd=tmp_path))


@pytest.mark.parametrize("phases", [("te",), pytest.param(("unet", "te"), marks=pytest.mark.slow)])
def test_throughput_measures_phases_with_and_without_the_store(
    phases: tuple[str, ...], tmp_path: Path
) -> None:
    options = (
        "--phase", *phases, "--steps", "1", "--batch", "2", "--resolution", "64",
        "--threads", "1",
    )  # fmt: skip
    measured = Measured("throughput.py", *options, out=tmp_path)
    assert measured.report["precision"].startswith("fp32")
    assert "TFLOP/s" in measured.report["peak"]
    rows = measured.rows("step")
    assert [(row["phase"], row["data"]) for row in rows] == [
        (phase, data) for phase in phases for data in ("memory", "store")
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2 * row["steps_per_s"])
        assert row["tflop_per_step"] * row["steps_per_s"] == pytest.approx(row["tflop_per_s"])
        assert 0 < row["percent_of_peak"] < 100
        assert 0.1 < row["peak_gib"] < 8
    assert [row["phase"] for row in measured.rows("loader")] == [*phases]


def test_our_lion_equals_lion_pytorchs_in_fewer_calls_and_less_memory(tmp_path: Path) -> None:
    options = ("--size", "nano", "--steps", "1", "--threads", "1")
    rows = Measured("train/lion.py", *options, out=tmp_path).rows("optimizer")
    assert len({row["sha256"] for row in rows}) == 1
    theirs, ours, parts = rows
    assert 10 * ours["calls"] < theirs["calls"]
    assert 5 * parts["gradients_mib"] < ours["gradients_mib"] == theirs["gradients_mib"]
    assert parts["temporary_mib"] < ours["temporary_mib"]


def test_plans_for_small_cards_are_what_another_tracker_counts(tmp_path: Path) -> None:
    options = ("--model", "nano", "--vram", "1.1", "--size", "128x128", "--batch", "4")
    rows = Measured("train/small_cards.py", *options, out=tmp_path).rows("card")
    assert [row["momentum"] for row in rows] == ["resident", "streamed"]
    assert [row["chosen"] for row in rows] == [True, False]
    for row in rows:
        assert abs(row["error"]) < 1
        assert row["predicted_gib"] < 0.1
        assert bool(row["host_gib"]) == (row["momentum"] == "streamed")


@pytest.mark.slow
def test_sharing_is_timed_during_and_after_the_backward_pass(tmp_path: Path) -> None:
    options = ("--size", "nano", "--steps", "1", "--resolution", "64", "--batch", "1")
    rows = Measured("train/sharing.py", *options, out=tmp_path).rows("sharing")
    every = [(row["way"], row["order"], row["process"]) for row in rows]
    assert every == [*product(("plain", "sliced"), ("after", "during"), (0, 1))]
    assert all(row["waiting_s"] < row["step_s"] for row in rows)


@pytest.mark.slow
def test_startup_compares_two_checkouts(tmp_path: Path, store: Path, model: Path) -> None:
    run_folder = tmp_path / "run"
    options = ("--data", store, "--model", model, "--out", run_folder)
    assert train("--phase", "unet", *options, "--steps", 1, "--batch", 2, "--sample-every", 0) == 0
    given = ("--before", ROOT, "--after", ROOT, "--store", store, "--run", run_folder)
    rows = Measured("startup.py", *map(str, given), "--repeats", "1", out=tmp_path).rows("start")
    assert len(rows) == 12
    assert not any(row["torch"] for row in rows)


@pytest.mark.slow
def test_export_measures_memory_and_time(tmp_path: Path) -> None:
    options = ("--size", "nano", "--formats", "single-file", "--dtypes", "fp16")
    (row,) = Measured("train/export.py", *options, out=tmp_path).rows("export")
    assert (row["format"], row["dtype"]) == ("single-file", "fp16")
    assert row["gib_before"] + row["gib_more"] == pytest.approx(row["gib_peak"])
    assert 0 <= row["gib_more"] < 0.2
    assert row["seconds"] > 0


@pytest.mark.slow
def test_generations_measures_a_store_that_is_built_again_and_again(tmp_path: Path) -> None:
    options = ("--generations", "4", "--repeats", "1", "--rows-per-shard", "16")
    measured = Measured("cache/generations.py", *options, out=tmp_path)
    rows = measured.rows("generation")
    assert [row["generation"] for row in rows] == [1, 2, 4]
    assert all(row["rows_per_image"] == 16 for row in rows)  # two images, each in a bucket
    assert all(row["nothing_cpu_s"] > 0 for row in rows)
    assert measured.rows("target")[-1]["met"], "older generations must read as they did"


def test_captions_measures_planning_captions_and_scanning(tmp_path: Path) -> None:
    options = ("--rows", "5000", "--files", "120", "--workers", "2")
    rows = Measured("cache/captions.py", *options, out=tmp_path).rows("work")
    assert [row["items"] for row in rows] == [5000] * 7 + [120] * 2


@pytest.mark.slow
def test_planning_measures_the_memory_of_each_part(tmp_path: Path) -> None:
    measured = Measured("cache/planning.py", "--images", "300", "--workers", "1", out=tmp_path)
    peaks = {row["part"]: row["mib"] for row in measured.rows("peak")}
    assert 0 < peaks["libraries"] <= peaks["scan and plan"] <= peaks["process"]
    assert peaks["encode a unit"] <= peaks["process"] + 1


@pytest.mark.slow
def test_throughput_against_a_plain_loop_needs_no_store(tmp_path: Path) -> None:
    measured = Measured(
        "throughput.py", "--phase", "te", "--steps", "1", "--batch", "1",
        "--resolution", "64", "--fake-data", "--precision", "bf16", "--memory", "cheap",
        "--against", "diffusers", "--channels-last", out=tmp_path,
    )  # fmt: skip
    rows = {row["data"]: row for row in measured.rows("step")}
    assert [*rows] == ["memory", "ch. last", "plain", "plain+VAE"]
    tflop = {name: row["tflop_per_step"] for name, row in rows.items()}
    # Checkpointing recomputes what our step keeps; the VAE is added to that.
    assert tflop["memory"] == tflop["ch. last"] < tflop["plain"] < tflop["plain+VAE"]
    ratios = measured.rows("ratio")
    assert len(ratios) == 5
    for row in ratios:
        ours, theirs = (rows[row[key]]["images_per_s"] for key in ("of", "to"))
        assert row["images_per_s"] == pytest.approx(ours / theirs)


@pytest.mark.slow
def test_max_batch_predicts_what_the_allocator_holds(tmp_path: Path) -> None:
    measured = Measured(
        "train/max_batch.py", "--model", "nano", "--check", "--phase", "te",
        "--size", "256x192", "--batch", "6", "--slices", "2", "--way", "plain", "sliced",
        out=tmp_path,
    )  # fmt: skip
    errors = [abs(row["error"]) for row in measured.rows("check")]
    assert len(errors) == 3
    assert 0 < max(errors) <= 3
    (target,) = measured.rows("target")
    assert target["met"]
    assert target["value"] == max(errors)


@pytest.mark.slow
def test_max_batch_finds_the_largest_batch(tmp_path: Path) -> None:
    options = ("--model", "nano", "--phase", "te", "--size", "64x64", "--way", "plain", "cheap")
    measured = Measured("train/max_batch.py", *options, "--vram", "2", out=tmp_path)
    assert measured.report["limit"] == "1.00 GiB"
    plain, cheap = measured.rows("largest")
    assert (plain["way"], cheap["way"]) == ("plain", "cheap")
    assert 100 < plain["largest"] < cheap["largest"] < 10_000
    assert ("measured" in plain) == torch.cuda.is_available()


@pytest.mark.parametrize("most", [0, 1, 7, 64, 65, 90, 300])
@pytest.mark.parametrize("guess", [0, 1, 64, 70])
def test_the_search_finds_what_fits_from_any_guess(guess: int, most: int) -> None:
    asked = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= most

    assert nearest(fits, guess) == most
    assert 0 not in asked


@pytest.mark.slow
def test_equal_compares_every_plan_with_the_plain_step(tmp_path: Path) -> None:
    options = ("--model", "nano", "--phase", "te", "--resolution", "64", "--float64")
    rows = Measured("train/equal.py", *options, out=tmp_path).rows("plan")
    assert len(rows) == 7
    assert rows[0]["plan"] == "plain by 2"
    assert rows[0]["error_of_plain"] == 0
    assert rows[0]["bit_equal"] == rows[0]["parameters"] > 0
    for row in rows:
        assert row["error_of_plain"] < 1e-5
        assert 0 < row["error_of_float64"] < 1e-5


def test_decoding_is_measured_by_format_route_and_sandbox(tmp_path: Path) -> None:
    options = ("--megapixels", "0.8", "--repeats", "1", "--resolution", "64", "--children", "1")
    measured = Measured("cache/decode.py", *options, out=tmp_path)
    assert [row["format"] for row in measured.rows("format")] == [*FORMATS]
    worst = {row["route"]: row["worst_rms"] for row in measured.rows("route")}
    assert worst["full"] == worst["pillow, bare"] == 0
    assert 0 < worst["as built"] <= 1  # an 894x894 picture is reduced 14 times to 64x64
    assert [row["scale"] for row in measured.rows("margin")] == ["1/2", "1/4", "1/8"]
    rates = {row["where"]: row["images_per_s"] for row in measured.rows("sandbox")}
    assert all(rates[name] > 0 for name in ("in this process", "in one child"))


@pytest.mark.slow
def test_build_is_compared_with_bare_loops_and_peers(tmp_path: Path) -> None:
    vae = Path("benchmarks") / "demo" / "vae"
    options = ("--vae", str(vae), "--images", "3", "--rounds", "1", "--resolution", "64")
    measured = Measured("cache/build.py", *options, out=tmp_path)
    rates = measured.rows("rate")
    assert [row["loop"].split(",")[0] for row in rates] == [
        "bare", "bare", "xlsd-cache build", "as OneTrainer", "as a script", "as kohya"
    ]  # fmt: skip
    assert max(row["of_best_bare"] for row in rates if row["bare"]) == 1
    assert "encode" in measured.report["stages of build"]
    errors = {row["precision"]: row["relative_rms"] for row in measured.rows("error")}
    assert 0 < errors["fp32"] < 1e-4 < errors["bf16"] < 0.1


def test_store_reads_the_same_rows_by_every_reader(tmp_path: Path) -> None:
    """The benchmark itself asserts that they are the same rows, before it measures."""
    options = (
        "--samples", "48", "--rows-per-shard", "16", "--rounds", "1", "--cold-rounds", "1",
        "--batches", "1", "--batch", "8",
    )  # fmt: skip
    measured = Measured("cache/store.py", *options, out=tmp_path)
    warm, cold = measured.rows("warm"), measured.rows("cold")
    assert [row["reader"] for row in warm] == [row["reader"] for row in cold]
    assert len(warm) == 11
    for row in (*warm, *cold):
        assert row["us_per_latent"] > 0
        assert row["cpu_us_per_latent"] >= 0
    assert len(measured.rows("target")) == 6


@pytest.mark.slow
def test_scale_takes_every_step(tmp_path: Path) -> None:
    """Its own assertions: tags are found where the captions have them."""
    options = ("--rows", "300", "3000", "--rows-per-shard", "256", "--resume-at", "1000")
    measured = Measured("scale.py", *options, out=tmp_path)
    rows = measured.rows("step")
    assert [row["rows"] for row in rows] == [300] * 11 + [3000] * 11
    assert "3000 images" in rows[12]["details"]
    assert "3000 samples in 7 buckets" in rows[14]["details"]
    assert len(measured.rows("growth")) == 11
    assert len(measured.rows("target")) == 8


@pytest.mark.slow
def test_two_launchers_train_as_one_machine_and_are_restarted(tmp_path: Path) -> None:
    rows = Measured("train/nodes.py", "--loopback", "--steps", "24", out=tmp_path).rows("case")
    assert len(rows) == 7
    assert [row["what"] for row in rows if not row["met"]] == []


def test_the_costs_in_the_docs_are_those_of_the_results(tmp_path: Path) -> None:
    (row,) = Measured("costs.py", "--price", "3", out=tmp_path).rows("table")
    assert "\n".join(row["lines"]) in (ROOT / "docs" / "speed.md").read_text()


@pytest.mark.slow
def test_overtrain_reports_every_checkpoint_and_the_best(tmp_path: Path) -> None:
    options = ("--steps", "2", "--tiles", "20", "--held-out", "0.4")
    measured = Measured("train/overtrain.py", *options, out=tmp_path)
    checkpoints = measured.rows("checkpoint")
    assert [row["step"] for row in checkpoints] == [0, 1, 2]
    (best,) = measured.rows("best")
    means = {row["step"]: row["held_out"]["mean"] for row in checkpoints}
    assert best["held_out"]["mean"] == pytest.approx(means[best["step"]]) == min(means.values())
    assert [row["images"] for row in measured.rows("last minus best")] == ["training", "held_out"]


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
    rates = {name: value["of_best"] for name, value in found["encode"].items() if "," in name}
    assert [name for name in rates if "bare" not in name] == ["fp32, build"]
    assert max(share for name, share in rates.items() if "bare" in name) == 1
    assert found["encode"]["image"]["tflop"] > 0
    small = [x for x in found["small"].values() if isinstance(x, dict)]
    assert [x["chosen"] for x in small] == [True, False]
    assert small[0]["momentum"] == small[1]["momentum"]
    table = out.with_suffix(".txt").read_text().splitlines()
    assert [line for line in table if line in parts] == parts
    here = found["machine"]
    assert previous_results(out, here) == found  # of the same machine: a file may be made in parts
    assert previous_results(out, f"not {here}") == previous_results(tmp_path / "none", here) == {}


@pytest.mark.slow
def test_a_terminal_is_watched_from_the_start_to_the_end(tmp_path: Path) -> None:
    options = ("--size", "nano", "--steps", "4", "--sample-steps", "1")
    measured = Measured("train/terminal.py", *options, out=tmp_path)
    longest, *others = measured.rows("unchanged")
    assert 0 < others[-1]["seconds"] <= longest["seconds"]
    assert measured.rows("target")[0]["value"] == longest["seconds"]


@pytest.mark.slow
def test_the_bits_of_a_first_step_are_compared_in_fresh_processes(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    run("benchmarks/card.py", "--tiny", "--out", str(out), "--part", "room")
    assert json.loads(out.read_text())["room"]["same"]


@pytest.mark.slow
def test_the_report_of_a_long_run_is_built_and_opened(tmp_path: Path) -> None:
    needed("Chromium, which `apt-get install chromium` installs", bool(shutil.which("chromium")))
    options = ("--steps", "300", "--samples", "16")
    measured = Measured("train/report.py", *options, out=tmp_path)
    (row,) = measured.rows("report")
    assert row["page_mb"] < 2
    assert row["tasks"] > 10
    assert [it["what"].split()[0] for it in measured.rows("target")] == [
        "MB", "seconds", "GiB", "seconds", "longest",
    ]  # fmt: skip


@pytest.mark.slow
def test_what_following_a_run_costs_is_measured(tmp_path: Path) -> None:
    needed("Chromium, which `apt-get install chromium` installs", bool(shutil.which("chromium")))
    options = ("--steps", "100", "200", "--repeat", "2", "--refreshes", "10", "--events", "200")
    measured = Measured("train/live.py", *options, out=tmp_path)
    assert [row["steps"] for row in measured.rows("refresh")] == [100, 200]
    assert all(row["next_bytes"] > 0 for row in measured.rows("refresh"))
    assert len(measured.rows("target")) == 3
    measured = Measured("train/followed.py", "--blocks", "1", "--window", "40", out=tmp_path)
    rows = measured.rows("followed")
    assert [(row["beside"], row["pairs"]) for row in rows] == [("followed", 2), ("busy", 2)]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert all(0 < row["cores"] < 2 for row in rows)
    equal = measured.rows("target")[-1]
    assert equal["met"]
    assert equal["what"].startswith("files of weights")


@pytest.mark.slow
def test_a_watched_folder_is_compared_with_a_fresh_build(tmp_path: Path) -> None:
    options = ("--minutes", "0.5", "--per-second", "20", "--kills", "2")
    measured = Measured("cache/watch.py", *options, out=tmp_path)
    (row,) = measured.rows("equal")
    assert row["difference"] == ""
    assert row["sums"] == row["fresh"]
    assert row["exit_code"] == 0
