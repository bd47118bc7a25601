"""The store's log: parquet files of what is planned, removed, captioned, damaged and committed.

Each file is written once. A *generation* is one change of the store: it exists when
`plan/<generation>.parquet` does, which gives each new or changed image its bucket and row, or the
reason why it has none. Reading the log up to a generation gives the store as it was then.

A file goes by its name within the store: the log is listed often, and thousands of Paths take long.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.arrow import filtered, last_lines
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.runtime.bounded_files import require_regular
from xlsd_cache.schema import CAPTIONS, COMMIT, DAMAGED, PLAN, REMOVED
from xlsd_cache.store.log_files import Read, read_log, read_together, readable, write_fold
from xlsd_cache.vocabulary import Bucket

_FIELDS = {field.name for table in (PLAN, COMMIT, CAPTIONS) for field in table}
_FOLDERS = ("latents.zarr", "manifest", "captions", "staging", "stray")
_GENERATION = re.compile(r"(\d+)\.parquet")
_UNIT = re.compile(r"(\d+x\d+)\.(\d{1,10})", re.ASCII)


class ShardId(NamedTuple):
    """The name of one shard, which has one writer and one commit record."""

    bucket: str
    shard: int

    @property
    def name(self) -> str:
        """As in `manifest/commit/NAME.parquet` and `staging/NAME.part`."""
        return f"{self.bucket}.{self.shard}"

    @property
    def record(self) -> str:
        """The commit record's name within the store."""
        return f"manifest/commit/{self.name}.parquet"

    @classmethod
    def parse(cls, name: str) -> "ShardId":
        """The shard of this name. Raises ValueError for a name that no shard has."""
        match = _UNIT.fullmatch(name)
        if match is None or not is_bucket(match[1]):
            raise ValueError(f"{name!r} is not BUCKET.N")
        return cls(match[1], int(match[2]))


@dataclass(frozen=True)
class Manifest:
    """The log of the store in folder `root`."""

    root: Path

    @property
    def staging(self) -> Path:
        """The folder of temporary files, locks and journals."""
        return self.root / "staging"

    def array(self, bucket: str) -> Path:
        """The folder of a bucket's zarr array."""
        return self.root / "latents.zarr" / bucket

    def shard(self, unit: ShardId) -> Path:
        """The file of one shard."""
        return self.array(unit.bucket) / f"c.{unit.shard}.0.0.0"

    def commit(self, unit: ShardId) -> Path:
        """The commit record of one shard: with it, the shard is part of the store."""
        return self.root / unit.record

    def refuse_links(self) -> None:
        """Raise UserError where a link would make us write or delete outside the store.

        The store itself may be a link, but not its folders or the files written in place.
        """
        inside = [self.root / name for name in _FOLDERS]
        for folder in (self.root / "manifest", self.root / "latents.zarr", self.array("live")):
            inside += _folders(folder)
        inside += [self.root / "manifest" / "rehashed"]
        for path in inside:
            if path.is_symlink():
                raise _link_error(path, "a link")
        for path in self.staging.iterdir() if self.staging.is_dir() else ():
            with suppress(FileNotFoundError):  # another process may have removed it
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise _link_error(path, "not a regular file")

    def make_folders(self) -> None:
        """Create the folders of an empty store. Raises UserError as `refuse_links` does."""
        self.refuse_links()
        for kind in ("plan", "commit", "removed", "damaged"):
            (self.root / "manifest" / kind).mkdir(parents=True, exist_ok=True)
        for folder in ("latents.zarr", "captions", "staging"):
            (self.root / folder).mkdir(exist_ok=True)

    def generations(self) -> list[int]:
        """The generations that exist, oldest first."""
        names = _names(self.root / "manifest" / "plan")
        matches = map(_GENERATION.fullmatch, names)
        return sorted(int(match[1]) for match in matches if match)

    def committed(self) -> set[ShardId]:
        """The shards that have a commit record."""
        names = _names(self.root / "manifest" / "commit")
        matches = (_UNIT.fullmatch(it[:-8]) for it in names if it.endswith(".parquet"))
        return {ShardId(it[1], int(it[2])) for it in matches if it and is_bucket(it[1])}

    def write_plan(
        self,
        generation: int,
        plan: pa.Table,
        removed: list[str],
        captions: pa.Table,
        damaged: pa.Table | None = None,
    ) -> None:
        """Add a generation. It exists once its plan is written, which is last."""
        gone = pa.table({"key": sorted(removed)}, REMOVED)
        given_up = DAMAGED.empty_table() if damaged is None else damaged
        for kind, table in (("removed", gone), ("captions", captions), ("damaged", given_up)):
            path = self.root / _file_name(kind, generation)
            if table.num_rows:
                write_parquet(path, table, self.staging)
            else:
                path.unlink(missing_ok=True)  # left by a killed process
        write_parquet(self.root / _file_name("plan", generation), plan, self.staging)

    def live(self, generation: int) -> pa.Table:
        """PLAN of a generation's images: the last line of each key, without removed keys."""
        table = self.plan_lines(generation)
        table = last_lines(table, ["key"])
        return filtered(table, pc.is_valid(table["row"]))  # removed keys have nothing else

    def planned(self, generation: int) -> pa.Table:
        """PLAN of every row ever assigned up to a generation, its image live or not."""
        table = self.plan_lines(generation)
        return filtered(table, pc.greater_equal(table["row"], 0))

    def damaged(self, generation: int) -> pa.Table:
        """DAMAGED rows that `check --repair` found, up to a generation."""
        names = self._files(generation, "damaged")
        tables = [read_log(self.root / name, DAMAGED.names) for name in names]
        return pa.concat_tables([DAMAGED.empty_table(), *tables])

    def commits(self, units: set[ShardId], columns: Sequence[str] = COMMIT.names) -> pa.Table:
        """The commit records of `units` as one table, with the bucket as first column."""
        empty = COMMIT.empty_table().select(columns)
        empty = empty.add_column(0, "bucket", pa.nulls(0, pa.string()))
        names = [unit.record for unit in sorted(units)]
        tables = read_together(self.root, "commit", names, empty.column_names, _read_commit)
        return pa.concat_tables([empty, *tables])

    def captions(self, generation: int) -> pa.Table:
        """CAPTIONS at a generation: the last text of each key and column, unless empty."""
        table = pa.concat_tables(
            [CAPTIONS.empty_table(), *self._caption_tables(generation, CAPTIONS.names)]
        )
        table = last_lines(table, ["key", "column"])
        return filtered(table, pc.not_equal(table["text"], ""))

    def plan_lines(self, generation: int, columns: Sequence[str] = PLAN.names) -> pa.Table:
        """All lines of PLAN up to a generation, in order; a removal has a key and nulls.

        Reading column by column, a log may be larger than the memory.
        """
        names = self._files(generation, "removed", "plan")
        tables = read_together(self.root, "plan", names, columns, _read_plan)
        return pa.concat_tables([PLAN.empty_table().select(columns), *tables])

    def caption_columns(self, generation: int) -> list[str]:
        """The name of every caption column that ever had a text, sorted."""
        names: set[str] = set()
        for table in self._caption_tables(generation, ["column"]):
            names.update(pc.unique(table["column"]).to_pylist())
        return sorted(names - _FIELDS | names & {"text", "column"})

    def caption_lines(self, generation: int, column: str, field: str) -> pa.ChunkedArray:
        """The keys or texts of all lines of a caption column, in order."""

        def read(path: Path, columns: Sequence[str]) -> pa.Table:
            """By batches: a large file has the texts of several columns."""
            with readable(path):
                require_regular(path)
                batches = pq.ParquetFile(path).iter_batches(1 << 17, columns=list(columns))
                values = [b[field].filter(pc.equal(b["column"], column)) for b in batches]
                texts = pa.chunked_array(values, pa.string())
                texts.validate(full=True)
            return pa.table({field: texts})

        chunks = []
        for table in self._caption_tables(generation, ["column", field], read):
            values = table[field]
            if "column" in table.column_names:
                values = values.filter(pc.equal(table["column"], column))
            chunks += values.chunks
        return pa.chunked_array(chunks, pa.string())

    def files(self, generation: int) -> list[str]:
        """The files of the log up to a generation, without commit records; in the store."""
        return self._files(generation, "removed", "damaged", "plan", "captions")

    def fold(self) -> None:
        """Fold the log's small files, if many are new; the caller holds the plan lock."""
        newest = max(self.generations(), default=-1)
        commits = [unit.record for unit in sorted(self.committed())]
        for kind, names, columns, read in (
            ("plan", self._files(newest, "removed", "plan"), PLAN.names, _read_plan),
            ("captions", self._files(newest, "captions"), CAPTIONS.names, read_log),
            ("commit", commits, ["bucket", *COMMIT.names], _read_commit),
        ):
            write_fold(self.root, kind, names, columns, read)

    def _caption_tables(
        self, generation: int, columns: Sequence[str], read: Read = read_log
    ) -> Iterator[pa.Table]:
        names = self._files(generation, "captions")
        return read_together(self.root, "captions", names, columns, read)

    def _files(self, generation: int, *kinds: str) -> list[str]:
        """The files of these kinds up to a generation, by generation; plans though they lack."""
        numbers = [number for number in self.generations() if number <= generation]
        there = {_file_name("plan", number) for number in numbers}
        for kind in kinds:
            if kind != "plan":
                folder, _, _ = _file_name(kind, 0).rpartition("/")
                there.update(f"{folder}/{name}" for name in _names(self.root / folder))
        names = (_file_name(kind, number) for number in numbers for kind in kinds)
        return [name for name in names if name in there]


def _file_name(kind: str, generation: int) -> str:
    if kind != "captions":
        return f"manifest/{kind}/{generation:06d}.parquet"
    return f"captions/delta-{generation:06d}.parquet" if generation else "captions/base.parquet"


def _read_plan(path: Path, columns: Sequence[str]) -> pa.Table:
    """Lines of PLAN; of a file of removed keys, the keys and nulls."""
    if path.parent.name == "plan":
        return read_log(path, columns)
    tables = [PLAN.empty_table().select(columns), read_log(path, REMOVED.names)]
    return pa.concat_tables(tables, promote_options="default").select(columns)


def _read_commit(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of one commit record, the first of which is the bucket that its name gives."""
    table = read_log(path, columns[1:])
    bucket = pa.repeat(pa.scalar(path.name.partition(".")[0], pa.string()), table.num_rows)
    return table.add_column(0, "bucket", bucket)


@lru_cache
def is_bucket(name: str) -> bool:
    """Whether a bucket, and its folder, can have this name."""
    try:
        return bool(Bucket.parse(name))
    except ValueError:
        return False


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, and the links to folders."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _link_error(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is {what}, and nothing is written through it; replace it by what it points to, "
        f"or remove it"
    )


def _names(folder: Path) -> set[str]:
    """The names in a folder; none where it is missing."""
    return set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - many names
