"""Which weights train, or begin anew: chosen by patterns of their names.

A pattern is a part, `unet` or `text_encoder`, and after it components of a weight's dotted name
that must stand there in a row, anywhere: `unet.attn2` is every weight of the UNet with attn2 in its
dotted name, `unet.conv_in` its first convolution, `unet.up_blocks.1.attentions.*.proj_in` those of
one block. Within a component `*`, `?` and `[...]` are as a shell has them.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from xlsd_cache.errors import UserError

PARTS = {"unet": ("unet", "both"), "text_encoder": ("te", "both")}  # part -> phases that train it


def split(patterns: str, option: str, phase: str) -> list[str]:
    """The patterns of a comma-separated option.

    Raises UserError for none, and for one that names no part, or one that the phase freezes.
    """
    found = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not found:
        raise UserError(f"{option} {patterns!r} names nothing; give say unet.attn2,unet.conv_in")
    for pattern in found:
        part = pattern.partition(".")[0]
        if part not in PARTS:
            raise UserError(
                f"{option} {pattern} begins with neither unet nor text_encoder; write say "
                f"unet.{pattern}"
            )
        if phase not in PARTS[part]:
            raise UserError(
                f"{option} {pattern} is of a part that --phase {phase} does not train; leave it "
                f"out, or choose --phase {PARTS[part][0]} or both"
            )
    return found


def choose(names: Iterable[str], patterns: list[str], option: str) -> list[str]:
    """Those of the dotted names that any of the patterns matches, in their order.

    Raises UserError for a pattern that matches none, naming the nearest there are.
    """
    dotted = {name: name.split(".") for name in names}
    chosen: set[str] = set()
    for pattern in patterns:
        wanted = pattern.split(".")
        found = [name for name, components in dotted.items() if _matches(components, wanted)]
        if not found:
            raise UserError(f"{option} {pattern} matches no weight{_near(dotted, wanted)}")
        chosen.update(found)
    return [name for name in dotted if name in chosen]


def _matches(components: list[str], wanted: list[str]) -> bool:
    part, *row = wanted
    if components[0] != part:
        return False
    starts = range(1, len(components) - len(row) + 1)
    return any(
        all(fnmatchcase(components[start + i], want) for i, want in enumerate(row))
        for start in starts
    )


def _near(dotted: dict[str, list[str]], wanted: list[str]) -> str:
    """What a user may have meant: rows of as many components, most alike first."""
    part, *row = wanted
    rows = {
        ".".join(components[start : start + len(row)])
        for components in dotted.values()
        for start in range(1, len(components) - len(row) + 1)
        if components[0] == part
    }
    near = get_close_matches(".".join(row), sorted(rows), 3, 0.5)
    told = ", ".join(f"{part}.{name}" for name in near)
    return f"; did you mean {told}?" if near else "; look the names up in a checkpoint's weights"
