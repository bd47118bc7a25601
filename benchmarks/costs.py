"""Bytes, hours and money for a million images and more, from constants in `benchmarks/results`.

    python benchmarks/costs.py                      the table of docs/speed.md
    python benchmarks/costs.py --price 1.99         another price of a card for an hour

Hours on one card are measured rates times images. Those on several cards are hours on one divided
by cards: predictions, since only one card was measured. Builders of a store exchange nothing; what
training waits for gradients is added by `xlsd-train plan --cards N --link GB/s`.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a file

from benchmarks.lib.machine import machine
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_cache.store.shard import CRC_NBYTES

RESULTS = Path(__file__).parent / "results"
IMAGES, CARDS = (1_000_000, 12_000_000, 100_000_000), (1, 8, 64)
LATENT = 4 * 64 * 64 * 4 + CRC_NBYTES  # bytes: 512x512 in float32, with its checksum
BATCH = 32


@dataclass(frozen=True)
class CostsConfig(JsonOption):
    """Print the table."""

    price: float = 3.0
    """Of a card for an hour."""


def main(config: CostsConfig, arguments: Sequence[str]) -> None:
    """Print the constants with their sources, then the table as Markdown."""
    report = Report("benchmarks/costs.py", arguments, machine("numpy"))
    card = json.loads((RESULTS / "nvidia-h200.json").read_text())
    encoded, trained = (
        card["encode"]["build"]["images_per_s"],
        max(it["images_per_s"] for name, it in card["speed"].items() if " by " in name),
    )
    logged = log_nbytes((RESULTS / "scale.txt").read_text())
    report.fact("a latent", f"{LATENT} bytes, the format's; 512x512, float32")
    report.fact("log, index and tags", f"{logged:.0f} bytes an image: results/scale.txt")
    report.fact("build", f"{encoded:.2f} images/s in fp32, one H200: results/nvidia-h200.json")
    report.fact("training", f"{trained:.2f} images/s, UNet, fp32, within 24 GB, the same card")
    lines = table(config.price, logged, encoded, trained)
    print("\n".join(["", *lines]))
    report.add("table", lines=lines)
    hours = 1e6 * BATCH / trained / 3600
    print(f"\nA million steps of {BATCH} images on each card: {hours:,.0f} hours.")
    report.write(config.json)


def table(price: float, logged: float, encoded: float, trained: float) -> list[str]:
    """The lines of the table: bytes an image, and images/s of one card."""
    on = " / ".join(map(str, CARDS))
    lines = [
        f"| images | store | hours to build on {on} cards | hours an epoch | both, at {price:g} |",
        "|---|---|---|---|---|",
    ]
    for images in IMAGES:
        store = f"{images * (LATENT + logged) / 1e9:,.0f} GB"
        alone = [images / rate / 3600 for rate in (encoded, trained)]
        build, epoch = (" / ".join(f"{hours / cards:,.1f}" for cards in CARDS) for hours in alone)
        money = f"{price * sum(alone):,.0f}"
        lines.append(f"| {images // 10**6} M | {store} | {build} | {epoch} | {money} |")
    return lines


def log_nbytes(results: str) -> float:
    """Bytes an image of all but latents, of the largest store that scale.py measured last."""
    samples, index = re.findall(r"(\d+) samples in \d+ buckets, index ([\d.]+) GB", results)[-1]
    (*_, log), (*_, tags) = (
        re.findall(rf"{what} ([\d.]+) GB", results) for what in ("a log of", "tags, index")
    )
    return 1e9 * (float(index) + float(log) + float(tags)) / int(samples)


if __name__ == "__main__":
    run_script(main, CostsConfig, __doc__)
