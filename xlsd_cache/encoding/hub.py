"""The model hub: which names are its repositories, and their files from the cache or fetched.

What the local cache holds whole is used without asking the network, as is all with HF_HUB_OFFLINE.
"""

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from threading import Thread

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from xlsd_cache.errors import UserError, one_line

PREFIX = "hf://"  # before ORG/NAME: certainly the hub's, whatever folders are there
# ORG/NAME, as the hub's client lets it pass: no .. or --, no - or . at an end.
ID = re.compile(r"(?!.*(?:\.\.|--))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)
ANSWER_S = 5.0  # for connecting, and again for the answer
# No repository's name ends so, and many a file's does.
SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".gguf", ".onnx", ".zip",
            ".tar", ".sft", ".msgpack", ".yaml", ".txt"}  # fmt: skip
MANY = 10_000  # names of a folder that are compared
ALIKE = 0.8  # difflib's ratio; `modles` and `models` have 0.83


def repository_of(source: str) -> str | None:
    """The hub's ORG/NAME that is meant; None for what looks like a path, of which none is there.

    ORG/NAME is a path where a folder here has ORG's name or nearly so, unless the hub's cache has
    that repository; with hf:// before it, it never is.
    """
    name = source.removeprefix(PREFIX)
    if not ID.fullmatch(name) or (name == source and Path(name).suffix.lower() in SUFFIXES):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if name != source or folder.is_dir():
        return name
    alike = _alike(name.partition("/")[0], Path(), ALIKE)
    return None if any(Path(folder).is_dir() for folder in alike) else name


def no_such(source: str) -> str:
    """That a path is missing, and which one of a similar name is there."""
    found = nearest(Path(source.replace("\\", "/")).expanduser())
    told = f"{source}: no such file or directory"
    return f"{told} (did you mean {found}?)" if found else told


def nearest(path: Path) -> Path | None:
    """The path that is there and has the most similar names, part by part; None without one."""
    at, changed = Path(path.anchor), False
    for part in path.relative_to(at).parts:
        names = [part]
        if not (at / part).exists():
            names = _alike(part, at, 0.6)
            if not names:
                break
            changed = True
        at /= names[0]
    return at if changed else None


def _alike(name: str, folder: Path, ratio: float) -> list[str]:
    """Names in a folder that are like this one, the most similar first; case does not count."""
    try:
        there = {path.name.lower(): path.name for path in islice(folder.iterdir(), MANY)}
    except OSError:
        return []
    return [there[low] for low in get_close_matches(name.lower(), there, 3, ratio)]


def fetch(repository: str, files: Sequence[str], needed: Sequence[str], instead: str) -> Path:
    """The folder of a hub's repository with the files of these patterns in it.

    From the cache where that holds a file for each of `needed`, patterns with | between
    alternatives. Raises UserError within seconds where the hub does not answer or refuses, with
    `instead`, which says what to give in the repository's place.
    """
    if there := require(repository, files, needed, instead):
        return there
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except HfHubHTTPError as error:
        why = _of_status(error.response.status_code)
    except Exception as error:  # of the HTTP client, whichever the hub's client uses
        why = f"the download failed ({_short(error)})"
    raise _failed(repository, why, instead)


def require(
    repository: str, files: Sequence[str], needed: Sequence[str], instead: str
) -> Path | None:
    """The repository's folder in the cache; None where it is the hub's to give, and it answers.

    Raises UserError as `fetch` does, of which this is the quick half.
    """
    if there := cached(repository, files, needed):
        return there
    if constants.HF_HUB_OFFLINE:
        why = (
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold it whole"
        )
    else:
        why = _refusal(repository)
    if why:
        raise _failed(repository, why, instead)
    return None


def _failed(repository: str, why: str, instead: str) -> UserError:
    return UserError(f"cannot fetch {repository} from {constants.ENDPOINT}: {why}; {instead}")


def cached(repository: str, files: Sequence[str], needed: Sequence[str]) -> Path | None:
    """The repository's folder in the hub's cache, if all that is needed is there."""
    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=list(files), local_files_only=True)
        )
    except (OSError, ValueError):  # none, or not all of what the hub listed
        return None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    whole = all(
        any(fnmatch(name, pattern) for name in names for pattern in either.split("|"))
        for either in needed
    )
    return folder if whole and not _lacks_pieces(paths) else None


def _lacks_pieces(paths: list[Path]) -> bool:
    """Whether weights in several files lack one that their index lists."""
    indexes = [path for path in paths if path.name.endswith(".safetensors.index.json")]
    try:
        pieces = {
            path.parent / file
            for path in indexes
            for file in json.loads(path.read_bytes())["weight_map"].values()
        }
    except (OSError, ValueError, KeyError):
        return True
    return not pieces <= set(paths)


def _refusal(repository: str) -> str:
    """Why the hub does not give a repository, found out within seconds; empty where it does."""
    told: list[str] = []

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=ANSWER_S)
            told.append("")
        except HfHubHTTPError as error:
            told.append(_of_status(error.response.status_code))
        except Exception as error:  # of the HTTP client, whichever the hub's client uses
            told.append(f"it cannot be reached ({_short(error)})")

    # In a thread, for a name server that is silent has time limits of its own.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * ANSWER_S)
    return told[0] if told else f"it cannot be reached (no answer in {2 * ANSWER_S:g} s)"


def _of_status(status: int) -> str:
    if status in (401, 403):
        return (
            f"it answers {status}, so the repository does not exist, or is private or gated "
            f"(`hf auth login`, and accept its terms on its page)"
        )
    if status == 404:
        return "it has no such repository (404): check the name"
    return f"it answers with error {status}; try again later"


def _short(error: Exception) -> str:
    return one_line(error, 120) or type(error).__name__
