"""Reads text files of users in the encodings that editors and shells write."""

import codecs
from pathlib import Path

from xlsd_cache.errors import UserError

MOST_BYTES = 2**26  # 64 MiB, about a million lines
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path, what: str) -> str:
    """The text of a file, with line ends as newlines; `what` describes the file in errors.

    UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one (PowerShell's `>` writes
    UTF-16). Raises UserError for a file that cannot be read or has another encoding.
    """
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {path}: {why}; give a text file") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{what} {path} is larger than 64 MiB; give a text file")
    mark, encoding = next((it for it in _MARKS if data.startswith(it[0])), (b"", "utf-8"))
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
        nul = text.find("\0")
    except UnicodeDecodeError as error:
        text, nul = data[: error.start].decode(encoding), error.start
    if nul >= 0:
        line = text[:nul].count("\n") + 1
        raise UserError(
            f"{what} {path}, line {line}: not valid {encoding[:6].upper().rstrip('-')}; save the "
            f"file as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file, stripped, without blank ones; `what` as in `read_text`."""
    return [line for each in read_text(path, what).splitlines() if (line := each.strip())]
