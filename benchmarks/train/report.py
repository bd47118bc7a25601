"""The report of a long run: time and memory to build it, time to open it, and to scroll it.

The run is synthetic: the lines that a run of so many steps logs, losses of 200 held-out images at
200 steps, and samples of 512 x 512 pixels, which are photos with noise, with their thumbnails.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

from benchmarks.demo.photos import write_photos
from benchmarks.lib.browser import chromium
from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.errors import UserError
from xlsd_cache.pages.thumbnails import save_thumbnail
from xlsd_train.runs.bootstrap import summary
from xlsd_train.runs.layout import samples_of
from xlsd_train.runs.validation_log import save_losses

PROMPTS, IMAGES, VALIDATIONS = 8, 200, 200
MAIN = "CrRendererMain"  # the thread of a page's script and layout


@dataclass(frozen=True, kw_only=True)
class ReportBenchmark(JsonOption):
    """Measure the report of a long run."""

    steps: int = 1_000_000
    """Steps of the run."""

    samples: int = 2_000
    """Pictures, 8 a sampled step."""


def make_run(run: Path, steps: int, samples: int) -> None:
    """Write the folder of a run, as far as a report reads it."""
    run.mkdir()
    held_out = [f"image-{i}" for i in range(IMAGES)]
    store = {"path": "photos", "fingerprint": "f" * 64, "generation": 1, "images": 9e4}
    record = {
        "config": {"phase": "unet", "lr": 5e-6},
        "settings": {},
        "planned_steps": steps,
        "prompts": [f"prompt {i}, solo, photo, realistic" for i in range(PROMPTS)],
        "stores": [{**store, "images": 90_000, "selected": 90_000}],
        "validation": {"held_out": held_out, "training": held_out},
    }
    (run / "config.json").write_text(json.dumps(record))
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = (0.15 + 0.2 / (1 + 9 * step / steps)) * float(rng.lognormal(0, 0.4))
            line = {
                "step": step, "images_seen": 32 * step, "epoch": 32 * step / 90_000, "lr": 5e-6,
                "lr_effective": 5e-6, "wait_s": 1e-4 * loss, "loss": loss, "grad_norm": 2 * loss,
                "loss_smoothed": 0.15 + 0.2 / (1 + 9 * step / steps),
                "images_per_s": 20 + float(rng.normal()), "peak_gib": 21.53,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    _write_validation(run, steps, rng)
    _write_samples(run, steps, samples, rng)


def _write_validation(run: Path, steps: int, rng: Any) -> None:
    images = rng.normal(0.2, 0.05, (IMAGES, 10))
    with (run / "validation.jsonl").open("w") as file:
        for step in np.linspace(0, steps, min(VALIDATIONS, steps + 1)).astype(int).tolist():
            level = 0.15 / (1 + 9 * step / steps) + rng.normal(0, 0.002, (IMAGES, 10))
            losses = (images + level).astype(np.float32)
            save_losses(run, step, {"live/held_out": losses, "live/training": losses - 0.01})
            line = {"step": step, "weights": "live", **summary(losses, losses - 0.01)}
            file.write(json.dumps(line) + "\n")


def _write_samples(run: Path, steps: int, samples: int, rng: Any) -> None:
    """The first steps have pictures of their own, later ones links to these."""
    write_photos(run / "photos")
    photos = sorted((run / "photos").glob("*.*g"))
    sheets = max(1, samples // PROMPTS)
    drawn: list[Path] = []
    for step in np.linspace(0, steps, sheets).astype(int).tolist():
        folder = samples_of(run, step)
        folder.mkdir(parents=True)
        for i in range(PROMPTS):
            path = folder / f"{i:02d}.png"
            if len(drawn) < 8 * PROMPTS:
                photo = Image.open(photos[i % len(photos)]).convert("RGB").resize((512, 512))
                noisy = np.asarray(photo) + rng.normal(0, 8, (512, 512, 3))
                picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                picture.save(path)
                save_thumbnail(picture, path)
                drawn.append(path)
            else:
                one = drawn[(len(drawn) + step + i) % len(drawn)]
                path.hardlink_to(one)
                path.with_suffix(".webp").hardlink_to(one.with_suffix(".webp"))


def build(run: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, GiB) of `xlsd-train report`, in a process of its own."""
    command = [sys.executable, "-m", "xlsd_train", "report", str(run)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def browse(page: Path) -> dict[str, float]:
    """Seconds to open the page, and its longest task while scrolling, in ms."""
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.goto("about:blank")
        tab.goto(page.as_uri())
        opened = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        tab.wait_for_timeout(1000)
        categories = ["toplevel", "disabled-by-default-devtools.timeline", "devtools.timeline"]
        browser.start_tracing(page=tab, categories=categories)
        tab.mouse.move(1000, 450)
        for _ in range(60):  # down the page, and through the table of samples
            tab.mouse.wheel(0, 120)
            tab.wait_for_timeout(30)
        tab.locator(".film").scroll_into_view_if_needed()
        box = tab.locator(".film").bounding_box() or {"x": 0, "y": 0}
        tab.mouse.move(box["x"] + 300, box["y"] + 100)
        for i in range(120):
            tab.mouse.wheel(-300 if i < 60 else 1200, 0)
            tab.wait_for_timeout(30)
        for _ in range(30):
            tab.keyboard.press("ArrowLeft")
        trace = json.loads(browser.stop_tracing())["traceEvents"]
    threads = {it["tid"] for it in trace if it.get("args", {}).get("name") == MAIN}
    tasks = [it["dur"] / 1000 for it in trace if it.get("dur") and it["tid"] in threads]
    if not tasks:
        raise UserError("the trace has no task of the page's main thread")
    return {"open_s": opened, "longest_task_ms": max(tasks), "tasks": len(tasks)}


def main(config: ReportBenchmark, arguments: Sequence[str]) -> None:
    """Measure and print."""
    report = Report("benchmarks/train/report.py", arguments, machine("playwright", "pillow"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(run, config.steps, config.samples)
        took, cpu, gib = build(run)
        page = run / "report.html"
        found = browse(page)
        html = page.read_bytes()
    size = len(html) / 1e6
    beyond = size - sum(map(len, re.findall(rb"data:image[^\"]*", html))) / 1e6
    print(f"page: {size:.1f} MB; build: {cpu:.1f} s of the CPU")
    report.add("report", build_s=took, build_cpu_s=cpu, build_gib=gib, page_mb=size, **found)
    report.target("MB beyond the pictures", beyond, most=0.5)
    report.target("seconds to build", took, most=15)
    report.target("GiB to build", gib, most=0.5)
    report.target("seconds to open", found["open_s"], most=2)
    report.target("longest task while scrolling, ms", found["longest_task_ms"], most=200)
    report.write(config.json)


if __name__ == "__main__":
    run_script(main, ReportBenchmark, __doc__)
