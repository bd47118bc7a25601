"""`build --ray` on a cluster of three nodes, of which one is killed, as is the driver.

    python benchmarks/cache/ray_cluster.py                 2,000 images; needs pip install '.[ray]'
    python benchmarks/cache/ray_cluster.py --images 200

The nodes are processes of this machine. The store must end as a build without Ray leaves it, byte
for byte, and only the batches in progress may be encoded twice. Encodes are counted where they
happen, in the workers' processes: by a hash of each image's pixels.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a file

import numpy as np
import psutil
from PIL import Image

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script

ROOT = Path(__file__).parents[2]
COUNTS = "XLSD_ENCODES"  # environment: a folder, a file for each process
PAUSE_S = 0.1  # in each call, as a larger VAE would take, so that kills hit workers at work
DRIVER = """
import sys
from functools import partial
import ray
from xlsd_cache.cli import main
hook = "benchmarks.cache.ray_cluster.count_encodes"
ray.init = partial(ray.init, runtime_env={"worker_process_setup_hook": hook})
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class RayConfig(JsonOption):
    """Kill a node and the driver of a build on Ray."""

    images: int = 2000
    """Pictures of 64x64."""

    rows_per_shard: int = 32
    """Images of a unit."""

    batch: int = 4
    """Images of a call of the VAE."""

    vae: Path = ROOT / "benchmarks/demo/vae"
    """As in xlsd-cache build."""

    node_killed_at: float = 0.25
    """When to kill a node, as a share of the images. A new node joins."""

    driver_killed_at: float = 0.55
    """When to kill the driver. The same command is started again."""


def count_encodes() -> None:
    """In a worker's process: append a line for every image that it encodes."""
    from xlsd_cache.encoding.encoder import Encoder

    encode, path = Encoder.encode, Path(os.environ[COUNTS]) / str(os.getpid())
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counting(self: Encoder, pixels: Any) -> Any:
        lines = [hashlib.sha256(image.tobytes()).hexdigest() + "\n" for image in pixels]
        os.write(file, "".join(lines).encode())
        time.sleep(PAUSE_S)
        return encode(self, pixels)

    Encoder.encode = counting  # type: ignore[method-assign]


def main(config: RayConfig, command: Sequence[str]) -> None:
    """Print what happened, and whether the targets are met."""
    report = Report("benchmarks/cache/ray_cluster.py", command, machine("ray", "torch"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "images", config.images)
        (folder / "encodes").mkdir()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        here = {"PYTHONPATH": path, COUNTS: str(folder / "encodes"), "OMP_NUM_THREADS": "1"}
        os.environ.update(here, RAY_USAGE_STATS_ENABLED="0")
        begun = time.perf_counter()
        subprocess.run([*built(config, folder, "local")], check=True, stdout=subprocess.DEVNULL)
        report.fact("without Ray", f"{time.perf_counter() - begun:.0f} s")
        drive(config, folder, report)
        judge(config, folder, report)
    report.write(config.json)


def drive(config: RayConfig, folder: Path, report: Report) -> None:
    """Build on a cluster, killing as configured."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    victim, _ = [cluster.add_node(**node) for _ in range(2)]
    begun = time.perf_counter()

    def say(what: str, images: int) -> None:
        seconds = time.perf_counter() - begun
        print(f"{seconds:6.1f} s  {images:>5} images  {what}", flush=True)
        report.add("event", what=what, images=images, seconds=seconds)

    def starts() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", DRIVER, *built(config, folder, "ray")[3:]]
        with_ray = [*words, "--ray", cluster.address, "--json"]
        return subprocess.Popen(with_ray, stdout=subprocess.PIPE, text=True)

    try:
        driver = starts()
        for images in progress(driver):
            all_work = len([*(folder / "encodes").iterdir()]) >= 3
            if victim and all_work and images >= config.node_killed_at * config.images:
                kill_node(victim)
                say("a node killed, another joins", images)
                cluster.remove_node(victim, allow_graceful=False)
                cluster.add_node(**node)
                victim = None
            elif not victim and images >= config.driver_killed_at * config.images:
                break
        driver.kill()
        driver.wait()
        say("the driver killed, and started again", images)
        driver = starts()
        before = config.images - max(progress(driver), default=0)
        assert driver.wait() == 0
        say(f"done; {before} were there when the second driver began", config.images)
    finally:
        cluster.shutdown()


def progress(driver: subprocess.Popen[str]) -> Iterator[int]:
    """Images that a driver reports as encoded."""
    assert driver.stdout is not None
    for line in driver.stdout:
        told = json.loads(line)
        if told["event"] == "progress":
            yield told["images"]


def kill_node(node: Any) -> None:
    """SIGKILL to all processes of a node, as when its power fails."""
    (raylet,) = node.all_processes["raylet"]
    daemon = psutil.Process(raylet.process.pid)
    for process in (*daemon.children(recursive=True), daemon):
        process.kill()


def built(config: RayConfig, folder: Path, name: str) -> list[str]:
    """The command that builds a store."""
    options = (
        "--out", folder / name, "--vae", config.vae, "--resolution", 64, "--captions", "none",
        "--rows-per-shard", config.rows_per_shard, "--batch", config.batch, "--workers", 1,
    )  # fmt: skip
    return [sys.executable, "-m", "xlsd_cache", "build", *map(str, (folder / "images", *options))]


def judge(config: RayConfig, folder: Path, report: Report) -> None:
    """Compare the stores and count the encodes."""
    stores = [contents(folder / name) for name in ("local", "ray")]
    for part in ("latents.zarr", "manifest/commit", "manifest/plan", "index.arrow"):
        ours, theirs = ({k: v for k, v in store.items() if k.startswith(part)} for store in stores)
        same = sum(ours[path] == theirs.get(path) for path in ours)
        report.target(
            f"{part}: files equal to a local build's, of {len(theirs)}", same, least=len(ours)
        )
    lines = [line for path in (folder / "encodes").iterdir() for line in path.read_text().split()]
    times = Counter(lines)
    report.target("images encoded", len(times), least=config.images)
    # One worker was lost with its node, three with the driver; each had one batch in progress.
    again, twice = len(lines) - len(times), sum(n > 1 for n in times.values())
    report.add(
        "again", encodings=again, images=twice, processes=len([*(folder / "encodes").iterdir()])
    )
    report.target("encodings beyond one of each image", again, most=4 * config.batch)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_pictures(folder: Path, count: int) -> None:
    """Smooth random pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")


if __name__ == "__main__":
    run_script(main, RayConfig, __doc__)
