"""Hugging Face hub: resolves repository names, and finds or downloads their files.

A repository that is complete in the local cache is used without network access.
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

PREFIX = "hf://"  # before ORG/NAME: always a repository, even if there is such a folder
# ORG/NAME, as huggingface_hub accepts it: no .. or --, no - or . at an end.
ID = re.compile(r"(?!.*(?:\.\.|--))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)
ANSWER_S = 5.0  # for connecting, and again for the answer
# A name with one of these is a file's, not a repository's.
SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".gguf", ".onnx", ".zip",
            ".tar", ".sft", ".msgpack", ".yaml", ".txt"}  # fmt: skip
MANY = 10_000  # names in a folder, at most, that are compared
ALIKE = 0.8  # difflib's ratio; `modles` and `models` have 0.83


def repository_of(source: str) -> str | None:
    """The repository ORG/NAME that `source` means; None where it looks like a missing path.

    It is taken for a path where a folder here is called ORG, or nearly so, unless the repository
    is in the hub's cache or `source` begins with hf://.
    """
    name = source.removeprefix(PREFIX)
    if not ID.fullmatch(name) or (name == source and Path(name).suffix.lower() in SUFFIXES):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if name != source or folder.is_dir():
        return name
    similar = _similar_names(name.partition("/")[0], Path(), ALIKE)
    return None if any(Path(folder).is_dir() for folder in similar) else name


def no_such(source: str) -> str:
    """The message for a missing path, with a similar path that exists."""
    similar = nearest_path(Path(source.replace("\\", "/")).expanduser())
    message = f"{source}: no such file or directory"
    return f"{message} (did you mean {similar}?)" if similar else message


def nearest_path(path: Path) -> Path | None:
    """The existing path of the most similar names, part by part; None without one."""
    nearest, changed = Path(path.anchor), False
    for part in path.relative_to(nearest).parts:
        names = [part]
        if not (nearest / part).exists():
            names = _similar_names(part, nearest, 0.6)
            if not names:
                break
            changed = True
        nearest /= names[0]
    return nearest if changed else None


def _similar_names(name: str, folder: Path, ratio: float) -> list[str]:
    """Names in a folder similar to this one, the most similar first; case does not matter."""
    try:
        names = {path.name.lower(): path.name for path in islice(folder.iterdir(), MANY)}
    except OSError:
        return []
    return [names[low] for low in get_close_matches(name.lower(), names, 3, ratio)]


def fetch(repository: str, files: Sequence[str], needed: Sequence[str], instead: str) -> Path:
    """The local folder of a repository with the files of these patterns, downloaded if need be.

    Nothing is downloaded where the cache has a file for each of `needed`, patterns with | between
    alternatives. Raises UserError within seconds where the hub does not answer or refuses; the
    message ends with `instead`, what to give in place of the repository.
    """
    if folder := require(repository, files, needed, instead):
        return folder
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
    """The repository's folder in the cache; None where the hub would serve the download.

    The first half of `fetch`, within seconds; raises UserError as it does.
    """
    if folder := cached(repository, files, needed):
        return folder
    if constants.HF_HUB_OFFLINE:
        why = f"HF_HUB_OFFLINE is set, and it is not complete in the cache {constants.HF_HUB_CACHE}"
    else:
        why = _refusal(repository)
    if why:
        raise _failed(repository, why, instead)
    return None


def _failed(repository: str, why: str, instead: str) -> UserError:
    return UserError(f"cannot fetch {repository} from {constants.ENDPOINT}: {why}; {instead}")


def cached(repository: str, files: Sequence[str], needed: Sequence[str]) -> Path | None:
    """The repository's folder in the hub's cache, if all needed files are in it."""
    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=list(files), local_files_only=True)
        )
    except (OSError, ValueError):  # not cached, or not all files that the hub listed
        return None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    whole = all(
        any(fnmatch(name, pattern) for name in names for pattern in either.split("|"))
        for either in needed
    )
    return folder if whole and not _lacks_shards(paths) else None


def _lacks_shards(paths: list[Path]) -> bool:
    """Whether a file is missing that an index of sharded weights lists."""
    indexes = [path for path in paths if path.name.endswith(".safetensors.index.json")]
    try:
        shards = {
            path.parent / file
            for path in indexes
            for file in json.loads(path.read_bytes())["weight_map"].values()
        }
    except (OSError, ValueError, KeyError):
        return True
    return not shards <= set(paths)


def _refusal(repository: str) -> str:
    """Why the hub refuses a repository, known within seconds; empty where it does not."""
    answer: list[str] = []

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=ANSWER_S)
            answer.append("")
        except HfHubHTTPError as error:
            answer.append(_of_status(error.response.status_code))
        except Exception as error:  # of the HTTP client, whichever the hub's client uses
            answer.append(f"it cannot be reached ({_short(error)})")

    # In a thread: a silent name server has time limits of its own.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * ANSWER_S)
    return answer[0] if answer else f"it cannot be reached (no answer in {2 * ANSWER_S:g} s)"


def _of_status(status: int) -> str:
    if status in (401, 403):
        return (
            f"it answers {status}, so the repository does not exist, or is private or gated "
            f"(run `hf auth login` and accept the terms on its page)"
        )
    if status == 404:
        return "it has no such repository (404): check the name"
    return f"it answers with error {status}, try again later"


def _short(error: Exception) -> str:
    return one_line(error, 120) or type(error).__name__
