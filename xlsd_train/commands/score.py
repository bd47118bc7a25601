"""`xlsd-train score`: pictures that `sample` drew, against their prompts and real images."""

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
from xlsd_train.evaluation.image_metrics import LEAST, Sample, clip_scores, cmmd
from xlsd_train.evaluation.sample_files import Drawn, drawn_in
from xlsd_train.runs.bootstrap import NARROW, Estimate, lowest, mean

FEW = 300  # where CMMD's interval is about a quarter of 0.4 to either side
NAMED = 20  # rejected images that are told by name
TITLES = {"clip_score": "CLIP score", "cmmd": "CMMD"}


@dataclass(frozen=True)
class Real:
    """The real images: how many were there, which were taken, and why some are not scored."""

    folder: Path
    found: int
    taken: list[Path]


def score(config: ScoreConfig) -> None:
    """Print a table, or JSON. Raises UserError for what cannot be scored, before CLIP is loaded."""
    device = device_of(config.device)
    precision = set_precision("fp32")
    models = drawn_in(config.folders)
    pictures = next(iter(models.values()))
    _enough(len(pictures), f"pictures in {next(iter(models))}", 2)
    real = _real(config.real, config.most, len(pictures)) if config.real else None
    clip = load_clip(config.clip, device)
    prompts = [picture.prompt for picture in pictures]
    texts = clip.texts(prompts)
    embedded = {name: _embedded(clip, name, drawn) for name, drawn in models.items()}
    measured = {"clip_score": {name: mean(clip_scores(x, texts)) for name, x in embedded.items()}}
    told: dict[str, Any] = {
        "clip": config.clip,
        "precision": precision,
        "pictures": len(pictures),
        "prompts_cut": {"tokens": clip.tokens, "prompts": clip.too_long(prompts)},
    }
    if real:
        images, rejected = clip.files(real.taken, "real images")
        told["real"] = _accounts(real, rejected)
        _enough(len(images), f"readable images in {real.folder}")
        reference = Sample.of(images, "bootstrap real")
        measured["cmmd"] = {name: cmmd(Sample.of(x), reference) for name, x in embedded.items()}
    told["models"] = {
        name: {kind: found[name].interval._asdict() for kind, found in measured.items()}
        for name in models
    }
    told["best"] = {kind: _best(kind, found) for kind, found in measured.items()}
    if config.json:
        say_json(told)
    else:
        for line in _table(told):
            say(line)


def _best(kind: str, found: dict[str, Estimate]) -> dict[str, Any]:
    """Of CLIP scores the highest, of CMMD the lowest; and which might as well be."""
    signed = {name: -each if kind == "clip_score" else each for name, each in found.items()}
    verdict = lowest(signed)
    return {"model": verdict.best, "not_told_apart": verdict.alike}


def _real(folder: Path, most: int, pictures: int) -> Real:
    _enough(pictures, "pictures a model", LEAST, " with --real")
    if not folder.is_dir():
        raise UserError(f"--real {folder} is no folder; name one of images")
    there = image_files(folder)
    _enough(len(there), f"images in {folder}")
    order = draw.permutation(0, "real images", len(there))[: most or len(there)]
    return Real(folder, len(there), [there[i] for i in sorted(order.tolist())])


def _enough(count: int, what: str, least: int = LEAST, how: str = "") -> None:
    if count < least:
        raise UserError(f"{count} {what} are too few to score{how}; give {least}, better hundreds")


def _embedded(clip: Clip, name: str, pictures: list[Drawn]) -> Embeddings:
    found, rejected = clip.files([picture.path for picture in pictures], name)
    for path, why in rejected.items():
        raise UserError(f"{path} is {why.reason} ({why.detail}); draw it again")
    return found


def _accounts(real: Real, rejected: dict[Path, Rejected]) -> dict[str, Any]:
    return {
        "found": real.found,
        "not_taken": real.found - len(real.taken),
        "rejected": dict(Counter(why.reason for why in rejected.values())),
        "compared": len(real.taken) - len(rejected),
        "files": {
            path.relative_to(real.folder).as_posix(): asdict(why) for path, why in rejected.items()
        },
    }


def _table(told: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"{told['pictures']} pictures a model, judged by {told['clip']}"]
    if cut := told["prompts_cut"]["prompts"]:
        tokens = told["prompts_cut"]["tokens"]
        lines.append(f"of {cut} prompts it reads the first {tokens} tokens and not the rest")
    if real := told.get("real"):
        lines += _of_real(real)
    width = max(map(len, told["models"]))
    kinds = list(told["best"])
    heads = "".join(f"{TITLES[kind] + ' (95%)':<29}" for kind in kinds).rstrip()
    lines += ["", f"{'':<{width}}  {heads}"]
    for name, found in told["models"].items():
        cells = ["{mean:.4f} ({low:.4f} to {high:.4f})".format(**found[kind]) for kind in kinds]
        lines.append(f"{name:<{width}}  " + "".join(f"{cell:<29}" for cell in cells).rstrip())
    lines.append("")
    for kind, best in told["best"].items() if len(told["models"]) > 1 else ():
        alike = ", ".join(best["not_told_apart"])
        also = f"; not told apart from it: {alike}" if alike else ""
        lines.append(f"best {TITLES[kind]}: {best['model']}{also}")
    if told["pictures"] < NARROW:
        lines.append(
            f"{told['pictures']} pictures are few: intervals of fewer than {NARROW} are narrower "
            f"than 95%"
        )
    if real and (few := min(told["pictures"], real["compared"])) < FEW:
        lines.append(
            f"{few} images are few for CMMD, which wants {FEW} or more of either kind, of many "
            f"subjects; its intervals hold for pictures of just these"
        )
    return lines


def _of_real(real: dict[str, Any]) -> list[str]:
    """Where every real image went."""
    where = {"compared": real["compared"], **real["rejected"], "not taken": real["not_taken"]}
    sums = " + ".join(f"{count} {what}" for what, count in where.items())
    files = list(real["files"].items())
    lines = [f"{real['found']} real images = {sums}"]
    lines += [f"  {name}: {why['reason']}: {why['detail']}" for name, why in files[:NAMED]]
    if len(files) > NAMED:
        lines.append(f"  and {len(files) - NAMED} more, which --json names")
    return lines
