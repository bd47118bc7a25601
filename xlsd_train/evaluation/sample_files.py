"""Pictures that `sample`, or a run, has drawn, read back: each model's, with what was asked for."""

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
class Drawn:
    """A picture's file, and what tells it from the others of its model."""

    prompt: str
    seed: int
    path: Path


def drawn_in(folders: tuple[Path, ...]) -> dict[str, list[Drawn]]:
    """Each model's pictures by the folder they lie in, all models' in the same order.

    Raises UserError where there are none, or they are not of the same prompts and seeds.
    """
    models: dict[str, list[Drawn]] = {}
    for given in folders:
        if not given.is_dir():
            raise UserError(f"{given} is no folder; give what `xlsd-train sample` made")
        inner = sorted(path for path in given.iterdir() if path.is_dir())
        for path in inner:
            _refuse_link(path)
        found = {str(folder): _pictures(folder) for folder in (given, *inner)}
        models |= {name: pictures for name, pictures in found.items() if pictures}
        if not any(found.values()):
            raise UserError(
                f"{given} holds no pictures, nor does a folder in it; give what `xlsd-train "
                f"sample` made"
            )
    first, *others = models
    for other in others:
        for one, two in ((first, other), (other, first)):
            lacking = _asked(models[one]) - _asked(models[two])
            if lacking:
                prompt, seed = min(lacking)
                raise UserError(
                    f"{one} has {prompt!r} of seed {seed} and {two} has not; score models on the "
                    f"same prompts and seeds, or one by one"
                )
    return models


def own_size(source: str) -> str | None:
    """WIDTHxHEIGHT of the samples of a run, given it or a checkpoint in it; None for another model.

    Where a prompt has a size of its own, it is that of the others. Of runs that older versions
    began it is looked up in a sample.
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


def _asked(pictures: list[Drawn]) -> Counter[tuple[str, int]]:
    return Counter((picture.prompt, picture.seed) for picture in pictures)


def _size(path: Path) -> str | None:
    """WIDTHxHEIGHT of a picture, by its header; None for what is none."""
    try:
        with Image.open(path) as image:
            return f"{image.width}x{image.height}"
    except Exception:  # whatever a file that is none has Pillow stumble over
        return None


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, and only pictures that lie there themselves are scored; put what "
            f"it points to in its place, or remove it"
        )


def _pictures(folder: Path) -> list[Drawn]:
    """Those in the folder itself. Raises UserError for one that does not say what was asked for."""
    found = []
    for path in sorted(folder.glob("*.png")):
        if path.name == GRID:  # which `sample` and runs leave beside them
            continue
        _refuse_link(path)
        try:
            with Image.open(path) as image:
                told = parse_json(image.info["xlsd"])
            found.append(Drawn(str(told["prompt"]), int(told["seed"]), path))
        except Exception as error:  # whatever a file that is none has Pillow stumble over
            raise UserError(
                f"{path} does not say what was asked for ({type(error).__name__}: {error}); give "
                f"only pictures that `xlsd-train sample` drew, as it wrote them"
            ) from error
    return sorted(found)
