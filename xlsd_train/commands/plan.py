"""`xlsd-train plan`: memory and speed of each memory plan, and the largest batch of each."""

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from xlsd_cache.console.terminal import say, say_json
from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Bucket
from xlsd_train.config import sd15
from xlsd_train.config.adapt import adapt, chosen
from xlsd_train.config.inputs import DEFAULT_DATA
from xlsd_train.config.run_options import PlanConfig
from xlsd_train.data.mixture import open_mixture
from xlsd_train.memory.choose import asked, largest, memory_limit
from xlsd_train.memory.gpus import shown_cards
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, SLICES, WAYS, Asked, Planner, Prediction
from xlsd_train.memory.several_cards import Link, several_cards, table
from xlsd_train.step.backend import MemoryPlan, Way
from xlsd_train.training.setup_data import choose_samples
from xlsd_train.weights.locate import locate_model, locate_network, locate_text_encoder

VRAM = 24.0  # GB, without --vram
_ITEMS = ("weights", "gradients", "optimizer", "frozen weights", "activations", "workspaces")


def show(config: PlanConfig) -> None:
    """Print a table, or JSON. Raises UserError for a bad size or model."""
    config = replace(config, vram=config.vram or VRAM)
    limit = memory_limit(config.vram) or 0.0
    unet, text_encoder = _configs(config)
    size = largest(_buckets(config))
    planner = Planner(
        config.resolved(), unet, text_encoder, processes=config.cards, progress=not config.json
    )
    ask = asked(config)
    tries = {way: MemoryPlan(way, SLICES[0], ask.attention[0]) for way in WAYS}
    most = {way: planner.largest_asked(x, size, limit, ask) for way, x in tries.items()}
    auto = config.cards * max(1, most[ask.way or WAYS[-1]])
    batch = auto if config.batch == "auto" else config.batch
    share = ceil(batch / config.cards)
    plans = [_best(planner, ask._replace(way=way), share, size, limit) for way in WAYS]
    chosen = planner.fastest(share, size, limit, ask)
    results = {
        "phase": config.phase,
        "optimizer": config.optimizer,
        "precision": config.precision,
        "size": f"{8 * size[1]}x{8 * size[0]}",
        "tokens": text_encoder["max_position_embeddings"],
        "batch": batch,
        "vram_gb": config.vram,
        "limit_gib": limit / GIB,
        "plans": [_plan_json(plan, limit, most) for plan in plans],
        "chosen": _plan_json(chosen, limit, most) if chosen else None,
        "largest_batch": max(most.values()),
    }
    text = _table(results)
    if chosen and config.link:
        link = Link(config.cards, config.link)
        shared = several_cards(planner, plans, chosen, most, size, link, batch)
        results["sharing"], text = shared, f"{text}\n{table(shared)}"
    if config.json:
        say_json(results)
    else:
        for line in text.splitlines():
            say(line)


def _buckets(config: PlanConfig) -> dict[str, int]:
    """Bucket -> number of images, of the buckets to plan for."""
    for name in config.size:
        try:
            usable = not any(side % 64 for side in Bucket.parse(name))
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"--size {name} is not WIDTHxHEIGHT in multiples of 64, as 512x768 is")
    if config.size:
        return dict.fromkeys(config.size, 1)
    if config.data == DEFAULT_DATA and not Path(*DEFAULT_DATA).is_dir():
        return {"512x512": 1}
    with open_mixture(config.data) as store:
        if any(config.selected_tags()):
            fitted, _ = adapt(config.resolved(), store, chosen(config, ()), None)
            return choose_samples(fitted, store).selection.sizes
        return {name: len(rows) for name, rows in store.buckets.items() if len(rows)}


def _configs(config: PlanConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs of UNet and text encoder; without --model SD1.5's, which need no download."""
    unet, text_encoder = {"in_channels": 4, **sd15.UNET}, sd15.TEXT_ENCODER
    if config.model is not None:
        parts = locate_model(
            config.model, unet=config.unet, text_encoder=config.text_encoder, ema=config.model_ema,
            vae=False,
        )  # fmt: skip
        unet = parts.unet.config
        text_encoder = parts.text_encoder.config if parts.text_encoder else text_encoder
    else:
        if config.unet is not None:
            unet = locate_network("unet", config.unet, unet).config
        if config.text_encoder is not None:
            text_encoder = locate_text_encoder(config.text_encoder, text_encoder)[0].config
    if config.tokens is not None:
        text_encoder = {**text_encoder, "max_position_embeddings": config.tokens}
    return unet, text_encoder


def _best(planner: Planner, asked: Asked, batch: int, size: Size, limit: float) -> Prediction:
    """The fastest plan of one way that fits, else the one with the lowest peak."""
    fastest = planner.fastest(batch, size, limit, asked)
    tightest = MemoryPlan(
        asked.way or WAYS[-1], asked.micro_batch or 1, asked.attention[0], asked.momentum[-1]
    )
    return fastest or planner.predict(tightest, batch, size)


def _plan_json(it: Prediction, limit: float, most: dict[Way, int]) -> dict[str, Any]:
    return {
        "way": it.plan.way,
        "micro_batch": it.plan.micro_batch,
        "momentum": it.plan.momentum,
        "host_gib": it.host / GIB,
        "passes": it.passes,
        "peak_gib": it.peak / GIB,
        "items_gib": {name: nbytes / GIB for name, nbytes in it.items.items()},
        "fits": it.peak <= limit,
        "tflop": it.tflop,
        "flops_factor": it.factor,
        "images_per_s": {name: it.batch / s for name, s in it.seconds.items()},
        "largest_pass": most[it.plan.way],
    }


def _table(results: dict[str, Any]) -> str:
    """The results as text: items of the peak in GiB, images/s at some cards' peak FLOP/s."""
    cards = {name: f"  {name.removeprefix('RTX '):>5}" for name in shown_cards()}
    lines = [
        "{phase}, {optimizer}, {precision}, {size}, {tokens} tokens, batch {batch}; the run "
        "may use {limit_gib:.2f} GiB of {vram_gb:g} GB".format(**results),
        "Memory in GiB. largest: samples that fit in one pass. images/s: at 100% of each card",
        "",
        f"{'':24}{'peak':>7}" + "".join(f"{x.split()[0]:>12}" for x in _ITEMS)
        + f"{'FLOPs':>8}{'largest':>9}" + "".join(cards.values()),
    ]  # fmt: skip
    for row in results["plans"]:
        streamed = " *" if row["momentum"] == "streamed" else ""
        name = f"{row['way']} by {row['micro_batch']}{streamed}"
        items = "".join(f"{row['items_gib'].get(x, 0):12.2f}" for x in _ITEMS)
        speeds = "".join(f"{row['images_per_s'][x]:{len(to)}.1f}" for x, to in cards.items())
        lines.append(
            f"{name:<24}{row['peak_gib']:7.2f}{items}{row['flops_factor']:8.3f}"
            f"{row['largest_pass']:9}{speeds}" + ("" if row["fits"] else "  does not fit")
        )
    chosen = results["chosen"]
    if chosen is None:
        lines.append(f"\nno plan fits; the largest batch that fits is {results['largest_batch']}")
    else:
        lines.append(
            f"\nthe run would use: {chosen['way']} by {chosen['micro_batch']}, "
            + ("streamed momentum, " if chosen["momentum"] == "streamed" else "")
            + f"{chosen['passes']} passes, {chosen['peak_gib']:.2f} GiB; the largest batch in one "
            f"pass is {results['largest_batch']}"
        )
    if host := max(row["host_gib"] for row in (*results["plans"], chosen or {"host_gib": 0})):
        lines.append(f"*: streamed momentum, {host:.2f} GiB of pinned CPU memory")
    return "\n".join(lines)
