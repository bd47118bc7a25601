"""What is taken of an archive: the members asked for, the last of each name, and what is told."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from xlsd_cache.files.captions import CAPTION_BYTES, TOO_LARGE, LeftOut
from xlsd_cache.files.folders import is_hidden
from xlsd_cache.files.uri import no_place

_TEXTS_BYTES = 2**28  # of all captions of an archive, if that is more than the archive itself
_NAMED = 3  # of several names
_MOST = 2**62  # bytes that a table of ours can tell; an archive may claim more

Place = TypeVar("Place")


class Asked(Protocol):
    """Tells members by their names."""

    def is_image(self, name: str) -> bool:
        """Whether it is an image that is asked for."""

    def is_caption(self, name: str) -> bool:
        """Whether its content is asked for."""

    def what_else(self, name: str) -> str:
        """What to count it as, if it is neither."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive."""

    name: str
    source: str  # see locate.py
    size: int  # bytes, inflated
    reason: str = ""  # of outcomes.REASONS where it is known already that it is no image to be read
    detail: str = ""


@dataclass
class Members:
    """What an archive holds, in its order; `damage` says what of it could not be read."""

    members: list[Member] = field(default_factory=list)
    texts: dict[str, bytes | LeftOut] = field(default_factory=dict)  # name -> content, if asked for
    passed_over: Counter[str] = field(default_factory=Counter)  # kind -> files not asked for
    damage: str = ""
    remarks: list[str] = field(default_factory=list)  # sentences


class Roll(Generic[Place]):
    """The names in an archive: where the last member of each is that is asked for.

    `nbytes` is the archive's size: its captions may take as much memory, or some MiB.
    """

    def __init__(self, asked: Asked, nbytes: int) -> None:
        self.found, self.asked = Members(), asked
        self.places: dict[str, Place] = {}
        self._files, self._budget = 0, max(nbytes, _TEXTS_BYTES)
        self._repeated: dict[str, None] = {}
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)

    def put(self, name: str, place: Place) -> bool:
        """Note where a file is, if it is asked for; counts it if not."""
        self._files += 1
        if any(map(is_hidden, name.split("/"))):
            self.found.passed_over["hidden"] += 1
        elif not (self.asked.is_image(name) or self.asked.is_caption(name)):
            self.found.passed_over[self.asked.what_else(name)] += 1
        else:
            if name in self.places:
                self._repeated[name] = None
            self.places[name] = place
            return True
        return False

    def put_folder(self, name: str) -> None:
        """A folder takes the place of a file of that name, as it does when unpacked."""
        if self.places.pop(name, None) is not None:
            self._repeated[name] = None
            self.found.texts.pop(name, None)

    def keep_text(self, name: str, nbytes: int, read: Callable[[], bytes | LeftOut]) -> None:
        """Keep what `read` gives of a caption, if it is not of the size to fill the memory."""
        text: bytes | LeftOut = TOO_LARGE
        if nbytes <= min(CAPTION_BYTES, self._budget):
            self._budget -= nbytes
            text = read()
        self.found.texts[name] = text

    def keep(self, name: str, source: str, size: int) -> None:
        """Keep an image."""
        self.found.members.append(Member(name, source, size))

    def reject(self, archive: Path, name: str, size: int, reason: str, detail: str) -> None:
        """Keep an image that cannot be read."""
        source = no_place(archive, reason, printable(name))
        self.found.members.append(Member(name, source, min(size, _MOST), reason, detail))

    def leave_out(self, name: str, kind: str) -> None:
        """Tell of the member that it is `kind`, and not used for that."""
        self._left_out[kind].append(name)

    def told(self) -> Members:
        """All of it, once every member has been seen."""
        for name, text in self.found.texts.items():
            if isinstance(text, LeftOut):
                self.leave_out(name, text)
        for kind, names in self._left_out.items():
            verb = "is" if len(names) == 1 else "are"
            many = f"{len(names)} of {self._files} members {verb} {kind} and left out"
            self.found.remarks.append(f"{many}: {_some(names)}")
        if self._repeated:
            members = "member occurs" if len(self._repeated) == 1 else "members occur"
            many = f"{len(self._repeated)} {members} more than once; the last counts"
            self.found.remarks.append(f"{many}: {_some(self._repeated)}")
        if not self._files and not self.found.damage:
            self.found.remarks.append("it holds no files")
        return self.found


def normal(name: str) -> str:
    """The name without parts that say nothing: `./a//b` is `a/b`."""
    if "//" not in name and "./" not in name and not name.startswith("/"):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def printable(text: str) -> str:
    """A name that is not UTF-8 still needs a key that parquet can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return printable(", ".join(listed[:_NAMED])) + (", ..." if len(listed) > _NAMED else "")
