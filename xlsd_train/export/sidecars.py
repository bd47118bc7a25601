"""Small files next to an exported model: model card, sample grid, NAME.yaml."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_bytes


@contextmanager
def withdrawing(files: list[Path]) -> Iterator[None]:
    """Remove these files again if the block fails, as the model they belong to was not written."""
    try:
        yield
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise


def write_sidecars(folder: Path, files: Mapping[str, bytes], written: list[Path]) -> None:
    """Write small files durably; appends each path to `written` before writing it."""
    for name, data in files.items():
        written.append(folder / name)
        write_bytes(folder / name, data)


def missing_config(out: Path, config: str | None) -> str | None:
    """The text to write as NAME.yaml; None if the file has it. Raises UserError for another text.

    Other programs would read that file with this model, whatever the model predicts.
    """
    path = out.with_suffix(".yaml")
    if not path.exists():
        return config
    if config is None or path.read_bytes() != config.encode():
        raise UserError(
            f"{path} exists already, and A1111 and Forge would read it as {out.name}'s; remove it "
            f"or give another name"
        )
    return None
