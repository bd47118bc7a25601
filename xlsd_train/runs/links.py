"""What lies in a run's folder must be the run's own: files and folders, and no link to another.

A run may come from anywhere. A link in it would have training write, prune and sweep where it
points to, and reports and exports show what lies there. The run's folder itself may be a link: that
its user has made.
"""

import stat
from pathlib import Path

from xlsd_cache.errors import UserError
from xlsd_train.runs.layout import BY_STEP, FILES, FOLDERS, STEP, TENSORS


def refuse_links(run: Path) -> None:
    """Raises UserError for the first link among what a run would use.

    And for what is neither file nor folder, or a file where a run has a folder, or the reverse. Of
    other names nothing is asked, and where there is no folder neither.
    """
    if not run.is_dir():
        return
    for name in FILES:
        _refuse(run / name, folder=False)
    for name in FOLDERS:
        _refuse(run / name, folder=True)
        for path in _below(run / name):
            _refuse(path, _kind(path) if path.parent == run / name else None)


def refuse_link(path: Path) -> None:
    """Raises UserError for what is a link, or there and no folder: a run among those of a sweep."""
    _refuse(path, folder=True)


def refuse_leading_out(path: Path) -> None:
    """Raises UserError for a model's file that is a link out of the model, and would be handed on.

    The hub's cache is made of links, of a repository into itself.
    """
    if not path.is_symlink():
        return
    hub = (it for it in path.absolute().parents if it.name.startswith("models--"))
    root = next(hub, path.absolute().parent.parent)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"{path} is a link to {path.readlink()}, outside of its model, and is not copied; put "
            f"the file itself there"
        )


def _kind(path: Path) -> bool | None:
    """Whether it is to be a folder by its name; None where that does not tell."""
    step = STEP.fullmatch(path.name.removesuffix(TENSORS))
    return BY_STEP.get(path.parent.name) if step else None


def _below(folder: Path) -> list[Path]:
    """All that lies in a folder, in it and further down; nothing is followed."""
    found, waiting = [], [folder]
    while waiting:
        at = waiting.pop()
        if at.is_symlink() or not at.is_dir():
            continue
        there = sorted(at.iterdir())
        found += there
        waiting += there
    return found


def _refuse(path: Path, folder: bool | None) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path} is a link to {path.readlink()}, and a run holds no links, for they could have "
            f"it read, write or delete elsewhere; put what is meant in its place, or remove it"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is neither a file nor a folder; remove it from the run")
    if folder is not None and folder != stat.S_ISDIR(mode):
        is_, has = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"{path} is {is_}, and a run has {has} of that name; move it elsewhere")
