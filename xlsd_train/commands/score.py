"""`xlsd-train score`: CLIP score and CMMD of images that `sample` or a run wrote."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xlsd_cache.console.terminal import say, say_json
from xlsd_cache.dataset import rng as draw
from xlsd_cache.errors import UserError
from xlsd_cache.files.folders import image_files
from xlsd_cache.outcomes import Rejected
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_train.config.model_options import ScoreConfig
from xlsd_train.evaluation.clip import Clip, Embeddings, load_clip
from xlsd_train.evaluation.image_metrics import LEAST, ImageSet, clip_scores, cmmd
from xlsd_train.evaluation.sample_files import SampleFile, samples_by_model
from xlsd_train.runs.bootstrap import NARROW, Estimate, lowest, mean

FEW = 300  # images; CMMD's interval is then about 0.1 to either side at 0.4
LISTED = 20  # rejected images that are listed by name
TITLES = {"clip_score": "CLIP score", "cmmd": "CMMD"}


@dataclass(frozen=True)
class RealImages:
    """The images of --real."""

    folder: Path
    count: int  # of all in the folder
    chosen: list[Path]


def score(config: ScoreConfig) -> None:
    """Print a table, or JSON. Raises UserError for unusable folders before CLIP is loaded."""
    device = device_of(config.device)
    precision = set_precision("fp32")
    models = samples_by_model(config.folders)
    samples = next(iter(models.values()))
    _require(len(samples), f"images in {next(iter(models))}", 2)
    real = _real_images(config.real, config.most, len(samples)) if config.real else None
    clip = load_clip(config.clip, device)
    prompts = [sample.prompt for sample in samples]
    texts = clip.embed_texts(prompts)
    images = {name: _embed(clip, name, files) for name, files in models.items()}
    metrics = {"clip_score": {name: mean(clip_scores(x, texts)) for name, x in images.items()}}
    results: dict[str, Any] = {
        "clip": config.clip,
        "precision": precision,
        "pictures": len(samples),
        "prompts_cut": {"tokens": clip.max_tokens, "prompts": clip.count_truncated(prompts)},
    }
    if real:
        embedded, rejected = clip.embed_files(real.chosen, "real images")
        results["real"] = _outcomes(real, rejected)
        _require(len(embedded), f"readable images in {real.folder}")
        reference = ImageSet.of(embedded, "bootstrap real")
        metrics["cmmd"] = {name: cmmd(ImageSet.of(x), reference) for name, x in images.items()}
    results["models"] = {
        name: {metric: scores[name].interval._asdict() for metric, scores in metrics.items()}
        for name in models
    }
    results["best"] = {metric: _best(metric, scores) for metric, scores in metrics.items()}
    if config.json:
        say_json(results)
    else:
        for line in _table(results):
            say(line)


def _best(metric: str, scores: dict[str, Estimate]) -> dict[str, Any]:
    """The model with the highest CLIP score, or lowest CMMD, and those statistically tied."""
    signed = {name: -score if metric == "clip_score" else score for name, score in scores.items()}
    verdict = lowest(signed)
    return {"model": verdict.best, "statistically_tied": verdict.tied}


def _real_images(folder: Path, most: int, samples: int) -> RealImages:
    _require(samples, "images per model", LEAST, " with --real")
    if not folder.is_dir():
        raise UserError(f"--real {folder} is not a folder; give a folder of images")
    files = image_files(folder)
    _require(len(files), f"images in {folder}")
    order = draw.permutation(0, "real images", len(files))[: most or len(files)]
    return RealImages(folder, len(files), [files[i] for i in sorted(order.tolist())])


def _require(count: int, what: str, least: int = LEAST, how: str = "") -> None:
    if count < least:
        raise UserError(
            f"{count} {what} are too few to score{how}; give at least {least}, better hundreds"
        )


def _embed(clip: Clip, name: str, samples: list[SampleFile]) -> Embeddings:
    embeddings, rejected = clip.embed_files([sample.path for sample in samples], name)
    for path, why in rejected.items():
        raise UserError(f"{path} is {why.reason} ({why.detail}); sample it again")
    return embeddings


def _outcomes(real: RealImages, rejected: dict[Path, Rejected]) -> dict[str, Any]:
    return {
        "found": real.count,
        "not_taken": real.count - len(real.chosen),
        "rejected": dict(Counter(why.reason for why in rejected.values())),
        "compared": len(real.chosen) - len(rejected),
        "files": {
            path.relative_to(real.folder).as_posix(): asdict(why) for path, why in rejected.items()
        },
    }


def _table(results: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [f"{results['pictures']} images per model, CLIP {results['clip']}"]
    if truncated := results["prompts_cut"]["prompts"]:
        tokens = results["prompts_cut"]["tokens"]
        lines.append(f"{truncated} prompts are truncated to CLIP's {tokens} tokens")
    if real := results.get("real"):
        lines += _real_lines(real)
    width = max(map(len, results["models"]))
    metrics = list(results["best"])
    heads = "".join(f"{TITLES[metric] + ' (95%)':<29}" for metric in metrics).rstrip()
    lines += ["", f"{'':<{width}}  {heads}"]
    for name, scores in results["models"].items():
        cells = ["{mean:.4f} ({low:.4f} to {high:.4f})".format(**scores[x]) for x in metrics]
        lines.append(f"{name:<{width}}  " + "".join(f"{cell:<29}" for cell in cells).rstrip())
    lines.append("")
    for metric, best in results["best"].items() if len(results["models"]) > 1 else ():
        tied = ", ".join(best["statistically_tied"])
        others = f"; statistically tied: {tied}" if tied else ""
        lines.append(f"best {TITLES[metric]}: {best['model']}{others}")
    if (count := results["pictures"]) < NARROW:
        lines.append(f"{count} images are few: 95% intervals of fewer than {NARROW} are too narrow")
    if real and (few := min(results["pictures"], real["compared"])) < FEW:
        lines.append(
            f"{few} images are few for CMMD, which needs {FEW} or more of either kind, of many "
            f"subjects; its intervals are valid only for these subjects"
        )
    return lines


def _real_lines(real: dict[str, Any]) -> list[str]:
    """The outcome of every real image."""
    outcomes = {"compared": real["compared"], **real["rejected"], "not used": real["not_taken"]}
    sums = " + ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    files = list(real["files"].items())
    lines = [f"{real['found']} real images = {sums}"]
    lines += [f"  {name}: {why['reason']}: {why['detail']}" for name, why in files[:LISTED]]
    if len(files) > LISTED:
        lines.append(f"  and {len(files) - LISTED} more; --json lists all")
    return lines
