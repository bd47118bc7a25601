"""Options of caption columns, and of `xlsd-cache captions`."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from xlsd_cache.console.option_checks import CheckedOptions
from xlsd_cache.errors import UserError
from xlsd_cache.files.captions import Column
from xlsd_cache.options.store import StoreArgument
from xlsd_cache.vocabulary import RESERVED

Columns = Annotated[str, arg(metavar="COLUMNS")]


@dataclass(frozen=True)
class CaptionColumnOptions(CheckedOptions):
    """Captions."""

    captions: Columns = "auto"
    """Caption columns, comma-separated: the suffix of the text files next to the images (txt),
    json:FIELD of the .json next to them, jsonl:FIELD, csv:FIELD or parquet:FIELD of a table's row,
    or none. auto: txt, or the text or caption field of tables, whichever most images have."""

    @property
    def caption_columns(self) -> tuple[str, ...] | None:
        """Names of the caption columns; None for auto."""
        return None if self.captions == "auto" else columns_or_none(self.captions)


@dataclass(frozen=True)
class CaptionsOptions(StoreArgument):
    """Add caption columns to a store, or replace them. Latents are not touched.

    A caption file belongs to the image next to it, a table's row to the image that it names.
    Captions from another place are matched with the store's images by path in the source, URL, or
    a file name that only one image has. `build` replaces a column that it reads too.
    """

    source: Annotated[tuple[str, ...], arg(name="from", metavar="SOURCE ...")]
    """Where the captions are: folders, archives and tables, as for `build`."""

    columns: Columns
    """Columns, comma-separated, as in build --captions: txt, json:FIELD, jsonl:FIELD, ..."""

    clear_missing: bool = False
    """Remove a column's caption from images that have none in these sources."""

    dry_run: bool = False
    """Print what would change, and write nothing."""

    def check(self) -> None:
        """Raise UserError for what cannot be a column."""
        check_columns("--columns", self.caption_columns)

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Names of the caption columns."""
        return split_columns(self.columns)


def columns_or_none(captions: str) -> tuple[str, ...]:
    """The column names in --captions, where `none` means no column."""
    return () if captions == "none" else split_columns(captions)


def split_columns(columns: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once."""
    return tuple(dict.fromkeys(column.strip().lstrip(".") for column in columns.split(",")))


def check_columns(option: str, columns: tuple[str, ...]) -> None:
    """Raise UserError for a name that cannot be a caption column."""
    for column in columns:
        try:
            if column in RESERVED:
                raise ValueError(column)
            Column.parse(column)
        except ValueError:
            raise UserError(
                f"{option} {column!r} cannot be a caption column; use the suffix of the text files "
                f"next to the images (txt), or json:FIELD, jsonl:FIELD, parquet:FIELD"
            ) from None
