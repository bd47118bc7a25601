"""The memory plans that a run measures before its first step, and the one that it would take."""

from dataclasses import replace

from benchmarks.card_parts.bench import Bench, Results
from xlsd_train.memory.choose import memory_limit
from xlsd_train.memory.gpus import known_as
from xlsd_train.memory.measure import Measuring, fastest
from xlsd_train.memory.planner import REFERENCE, Planner
from xlsd_train.step.backend import MemoryPlan


def measured_plans(bench: Bench) -> Results:
    """Each plan as predicted and as measured under the limit, in the order of measuring."""
    settings, limit = replace(bench.settings, vram=bench.vram), memory_limit(bench.vram)
    assert limit is not None
    model, card = bench.bundle, known_as(bench.name) or REFERENCE
    networks = dict(model.unet.config), model.text_encoder.config.to_dict()
    planner = Planner(settings, *networks, workspaces=not bench.tiny)
    rows = Measuring(settings, networks, bench.device, limit).measure(
        planner, bench.batch, bench.size
    )
    results: Results = {}
    for row in rows:
        plan = MemoryPlan(*row["plan"])
        predicted = planner.predict(plan, bench.batch, bench.size)
        results[str(plan)] = {
            **{name: value for name, value in row.items() if name != "plan"},
            "predicted_images_per_s": bench.batch / predicted.seconds[card],
            "predicted_gib": predicted.peak / 2**30,
        }
    best = fastest(rows)
    return {**results, "chosen": MemoryPlan(*best["plan"]).flags() if best else None}
