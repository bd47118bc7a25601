"""Lays out text for pictures: wrapped to a width, and cut where it has too many lines."""

from bisect import bisect_left

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
READ = 4096  # characters of a text that are laid out: more than a cell holds


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """At most `most` lines, each at most `width` pixels; the last ends in ... if there is more."""
    lines = [""]
    for word in text[:READ].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        if len(lines) > most:
            break
    if len(lines) > most or len(text) > READ:
        lines = lines[:most]
        lines[-1] += " ..."
    return [cut(line, font, width) for line in lines]


def cut(line: str, font: Font, width: int) -> str:
    """Shorten the line to fit: a single word may be wider than the cell."""
    if font.getlength(line) <= width:
        return line
    fits = bisect_left(
        range(len(line)), True, key=lambda n: font.getlength(f"{line[:n]}...") > width
    )
    return f"{line[: fits - 1]}..." if fits > 1 else ""
