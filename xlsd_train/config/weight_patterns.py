"""Selects parameters by patterns of their names, for --train and --reinit.

A pattern is a network, `unet` or `text_encoder`, followed by consecutive components of a dotted
parameter name, anywhere in it: `unet.attn2` is every weight of the UNet with attn2 in its
dotted name, `unet.conv_in` its first convolution, `unet.up_blocks.1.attentions.*.proj_in` those of
one block. Within a component `*`, `?` and `[...]` are as a shell has them.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from xlsd_cache.errors import UserError

NETWORKS = {"unet": ("unet", "both"), "text_encoder": ("te", "both")}  # -> phases that train it


def split(patterns: str, option: str, phase: str) -> list[str]:
    """The patterns of a comma-separated option.

    Raises UserError for no pattern, and for one of no network, or of a frozen one.
    """
    found = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not found:
        raise UserError(f"{option} {patterns!r} is empty; give e.g. unet.attn2,unet.conv_in")
    for pattern in found:
        part = pattern.partition(".")[0]
        if part not in NETWORKS:
            raise UserError(
                f"{option} {pattern} does not start with unet or text_encoder; give e.g. "
                f"unet.{pattern}"
            )
        if phase not in NETWORKS[part]:
            raise UserError(
                f"{option} {pattern} is in a network that --phase {phase} does not train; leave it "
                f"out, or use --phase {NETWORKS[part][0]} or both"
            )
    return found


def choose(names: Iterable[str], patterns: list[str], option: str) -> list[str]:
    """The dotted names that match any of the patterns, in order.

    Raises UserError for a pattern without a match, with the nearest names.
    """
    dotted = {name: name.split(".") for name in names}
    chosen: set[str] = set()
    for pattern in patterns:
        wanted = pattern.split(".")
        found = [name for name, components in dotted.items() if _matches(components, wanted)]
        if not found:
            raise UserError(f"{option} {pattern} matches no parameter{_near(dotted, wanted)}")
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
    """Suggestions: as many consecutive components, the nearest first."""
    part, *row = wanted
    rows = {
        ".".join(components[start : start + len(row)])
        for components in dotted.values()
        for start in range(1, len(components) - len(row) + 1)
        if components[0] == part
    }
    near = get_close_matches(".".join(row), sorted(rows), 3, 0.5)
    told = ", ".join(f"{part}.{name}" for name in near)
    return f"; did you mean {told}?" if near else "; see the names in a checkpoint's weights"
