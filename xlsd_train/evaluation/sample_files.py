"""Finds the images that `sample` or a run wrote, and reads their prompts and seeds back."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import parse_json, read_json
from xlsd_cache.runtime.own_files import is_run
from xlsd_train.runs.layout import CONFIG, GRID, SAMPLES, run_of, steps_in
from xlsd_train.runs.record import read_record


@dataclass(frozen=True, order=True)
class SampleFile:
    """An image file with its prompt and seed."""

    prompt: str
    seed: int
    path: Path


def samples_by_model(folders: tuple[Path, ...]) -> dict[str, list[SampleFile]]:
    """Folder of a model -> its images, in the same order for all models.

    Raises UserError if there are none, or if prompts and seeds differ between models.
    """
    models: dict[str, list[SampleFile]] = {}
    for given in folders:
        if not given.is_dir():
            raise UserError(f"{given} is not a folder; give what `xlsd-train sample` wrote")
        inner = sorted(path for path in given.iterdir() if path.is_dir())
        for path in inner:
            _refuse_link(path)
        samples = {str(folder): _samples_in(folder) for folder in (given, *inner)}
        models |= {name: files for name, files in samples.items() if files}
        if not any(samples.values()):
            raise UserError(
                f"{given} and its subfolders have no images; give what `xlsd-train sample` wrote"
            )
    first, *others = models
    for other in others:
        for one, two in ((first, other), (other, first)):
            missing = _prompts_and_seeds(models[one]) - _prompts_and_seeds(models[two])
            if missing:
                prompt, seed = min(missing)
                raise UserError(
                    f"{one} has {prompt!r} with seed {seed} and {two} does not; score models on "
                    f"the same prompts and seeds, or one by one"
                )
    return models


def own_size(source: str) -> str | None:
    """WIDTHxHEIGHT of a run's samples, given the run or a checkpoint in it; None for other models.

    Prompts with a size of their own do not count. Older runs do not record the size: it is that of
    their first sample.
    """
    folder = Path(source).expanduser()
    for run in (folder, run_of(folder)):
        try:
            record = read_json(run / CONFIG)
        except (OSError, ValueError):
            continue
        if not is_run(record):
            continue
        record = read_record(run)
        if record.samples:
            return record.samples["size"]
        for folder in steps_in(run / SAMPLES).values():
            if (path := folder / "00.png").is_file():
                return _size(path)
    return None


def _prompts_and_seeds(samples: list[SampleFile]) -> Counter[tuple[str, int]]:
    return Counter((sample.prompt, sample.seed) for sample in samples)


def _size(path: Path) -> str | None:
    """WIDTHxHEIGHT by an image's header; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return f"{image.width}x{image.height}"
    except Exception:  # a damaged file may raise anything in Pillow
        return None


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, and links are not scored; replace it by the file it points to, or "
            f"remove it"
        )


def _samples_in(folder: Path) -> list[SampleFile]:
    """The images directly in a folder, sorted. Raises UserError for one without our metadata."""
    samples = []
    for path in sorted(folder.glob("*.png")):
        if path.name == GRID:  # written next to them by `sample` and runs
            continue
        _refuse_link(path)
        try:
            with Image.open(path) as image:
                metadata = parse_json(image.info["xlsd"])
            samples.append(SampleFile(str(metadata["prompt"]), int(metadata["seed"]), path))
        except Exception as error:  # a damaged file may raise anything in Pillow
            raise UserError(
                f"{path} has no prompt and seed in its metadata ({type(error).__name__}: {error}); "
                f"give only images that `xlsd-train sample` or a run wrote"
            ) from error
    return sorted(samples)
