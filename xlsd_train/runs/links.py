"""Refuses symbolic links in a run's folder.

A run may come from anywhere. Through a link in it, training would write and delete elsewhere, and
reports and exports would publish files from there. The run's folder itself may be a link, which its
user made.
"""

import stat
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_train.runs.layout import BY_STEP, FILES, FOLDERS, STEP, TENSORS, WANDB, WANDB_ID


def refuse_links(run: Path) -> None:
    """Raises UserError for the first link in a run, special file, or mistaken file or folder.

    Only names that a run uses are checked.
    """
    if not run.is_dir():
        return
    for name in FILES:
        _refuse(run / name, folder=False)
    _refuse(run / WANDB, folder=True)  # in it, wandb makes links of its own, which nothing follows
    _refuse(run / WANDB_ID, folder=False)
    for name in FOLDERS:
        _refuse(run / name, folder=True)
        for path in _below(run / name):
            _refuse(path, _kind(path) if path.parent == run / name else None)


def refuse_links_to(run: Path, path: Path) -> None:
    """Raises UserError if a path in a run, given relative to it, leads through a link."""
    for part in (path, *path.parents[:-1]):
        _refuse(run / part, folder=part != path)


def refuse_link(path: Path) -> None:
    """Raises UserError for a run of a sweep that is a link or a file."""
    _refuse(path, folder=True)


def refuse_leading_out(path: Path) -> None:
    """Raises UserError for a model's file that links out of the model, before it is copied.

    The hub's cache consists of links within a repository.
    """
    if not path.is_symlink():
        return
    hub = (it for it in path.absolute().parents if it.name.startswith("models--"))
    root = next(hub, path.absolute().parent.parent)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"{path} is a link to {path.readlink()}, outside of its model, and is not copied; "
            f"replace it by the file"
        )


def _kind(path: Path) -> bool | None:
    """Whether its name is that of a folder; None if unknown."""
    step = STEP.fullmatch(path.name.removesuffix(TENSORS))
    return BY_STEP.get(path.parent.name) if step else None


def _below(folder: Path) -> list[Path]:
    """Everything in a folder, recursively; links are not followed."""
    paths, waiting = [], [folder]
    while waiting:
        parent = waiting.pop()
        if parent.is_symlink() or not parent.is_dir():
            continue
        children = sorted(parent.iterdir())
        paths += children
        waiting += children
    return paths


def _refuse(path: Path, folder: bool | None) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path} is a link to {path.readlink()}; a run with links could read, write or delete "
            f"elsewhere; replace the link by its target, or remove it"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is neither a file nor a folder; remove it from the run")
    if folder is not None and folder != stat.S_ISDIR(mode):
        is_, has = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"{path} is {is_}, and a run has {has} of that name; move it elsewhere")
