"""Selects the members of an archive: images and captions that are wanted, the last of each name."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from xlsd_cache.files.captions import CAPTION_BYTES, TOO_LARGE, NotRead
from xlsd_cache.files.folders import is_hidden
from xlsd_cache.files.uri import unreadable_member

_TEXTS_BYTES = 2**28  # limit of all captions together, where the archive itself is smaller
_SHOWN = 3
_MOST_BYTES = 2**62  # the largest size that our tables hold; an archive may claim more

Location = TypeVar("Location")


class MemberFilter(Protocol):
    """Decides by a member's name what it is."""

    def is_image(self, name: str) -> bool:
        """Whether it is a wanted image."""

    def is_caption(self, name: str) -> bool:
        """Whether it is a wanted caption, whose content is read."""

    def what_else(self, name: str) -> str:
        """What to count it as, if it is neither."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive."""

    name: str
    source: str  # see files/uri.py
    size: int  # bytes, inflated
    reason: str = ""  # an outcomes.Reason where the image cannot be read
    detail: str = ""


@dataclass
class ArchiveContents:
    """The selected members of an archive, in its order; `damage` says what could not be read."""

    members: list[Member] = field(default_factory=list)
    texts: dict[str, bytes | NotRead] = field(default_factory=dict)  # caption -> content
    passed_over: Counter[str] = field(default_factory=Counter)  # kind -> files that are not wanted
    damage: str = ""
    remarks: list[str] = field(default_factory=list)  # sentences


class Collector(Generic[Location]):
    """Collects the wanted members of one archive; the last member of a name counts.

    `nbytes` is the archive's size, which all its captions together may take in memory as well.
    """

    def __init__(self, wanted: MemberFilter, nbytes: int) -> None:
        self.contents, self.wanted = ArchiveContents(), wanted
        self.locations: dict[str, Location] = {}
        self._files, self._budget = 0, max(nbytes, _TEXTS_BYTES)
        self._repeated: dict[str, None] = {}
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)

    def add_file(self, name: str, location: Location) -> bool:
        """Note where a wanted file is; another is counted, and gives False."""
        self._files += 1
        if any(map(is_hidden, name.split("/"))):
            self.contents.passed_over["hidden"] += 1
        elif not (self.wanted.is_image(name) or self.wanted.is_caption(name)):
            self.contents.passed_over[self.wanted.what_else(name)] += 1
        else:
            if name in self.locations:
                self._repeated[name] = None
            self.locations[name] = location
            return True
        return False

    def add_folder(self, name: str) -> None:
        """A folder replaces a file of its name, as it does when the archive is unpacked."""
        if self.locations.pop(name, None) is not None:
            self._repeated[name] = None
            self.contents.texts.pop(name, None)

    def keep_text(self, name: str, nbytes: int, read: Callable[[], bytes | NotRead]) -> None:
        """Keep what `read` gives of a caption, unless it is too large."""
        text: bytes | NotRead = TOO_LARGE
        if nbytes <= min(CAPTION_BYTES, self._budget):
            self._budget -= nbytes
            text = read()
        self.contents.texts[name] = text

    def keep(self, name: str, source: str, size: int) -> None:
        """Keep an image; `source` as of files/uri.py, `size` in bytes."""
        self.contents.members.append(Member(name, source, size))

    def reject(self, archive: Path, name: str, size: int, reason: str, detail: str) -> None:
        """Keep an image that cannot be read, with the reason."""
        source = unreadable_member(archive, reason, printable(name))
        member = Member(name, source, min(size, _MOST_BYTES), reason, detail)
        self.contents.members.append(member)

    def leave_out(self, name: str, kind: str) -> None:
        """Report the member as left out, because it is `kind`."""
        self._left_out[kind].append(name)

    def result(self) -> ArchiveContents:
        """The members, with remarks on what is odd; call it once, after the last member."""
        contents = self.contents
        for name, text in contents.texts.items():
            if isinstance(text, NotRead):
                self.leave_out(name, text)
        for kind, names in self._left_out.items():
            verb = "is" if len(names) == 1 else "are"
            many = f"{len(names)} of {self._files} members {verb} {kind} and left out"
            contents.remarks.append(f"{many}: {_some(names)}")
        if self._repeated:
            members = "member occurs" if len(self._repeated) == 1 else "members occur"
            many = f"{len(self._repeated)} {members} more than once; the last counts"
            contents.remarks.append(f"{many}: {_some(self._repeated)}")
        if not self._files and not contents.damage:
            contents.remarks.append("it holds no files")
        return contents


def normal(name: str) -> str:
    """The name without empty and `.` parts: `./a//b` is `a/b`."""
    if "//" not in name and "./" not in name and not name.startswith("/"):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8 escaped, so that parquet can hold it."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return printable(", ".join(listed[:_SHOWN])) + (", ..." if len(listed) > _SHOWN else "")
