"""The store's log: parquet files of what is planned, removed, captioned, damaged and committed.

Each file is written once. A *generation* is one change of the store: it exists when
`plan/<generation>.parquet` does, which gives each new or changed image its bucket and row, or the
reason why it has none. Reading the log up to a generation gives the store as it was then.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, order=True)
class ShardId:
    """The name of one shard, which has one writer and one commit record."""

    bucket: str
    shard: int

    @property
    def name(self) -> str:
        """As in `manifest/commit/NAME.parquet` and `staging/NAME.part`."""
        return f"{self.bucket}.{self.shard}"

    @classmethod
    def parse(cls, name: str) -> "ShardId":
        """The shard of this name. Raises ValueError for a name that no shard has."""
        match = re.fullmatch(r"(\d+x\d+)\.(\d{1,10})", name, re.ASCII)
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
        return self.root / "manifest" / "commit" / f"{unit.name}.parquet"

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
        matches = (re.fullmatch(r"(\d+)\.parquet", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def committed(self) -> set[ShardId]:
        """The shards that have a commit record."""
        names = _names(self.root / "manifest" / "commit")
        matches = (
            re.fullmatch(r"(\d+x\d+)\.(\d{1,10})\.parquet", name, re.ASCII) for name in names
        )
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
        for path, table in (
            (self._file("removed", generation), gone),
            (self._file("captions", generation), captions),
            (self._file("damaged", generation), given_up),
        ):
            if table.num_rows:
                write_parquet(path, table, self.staging)
            else:
                path.unlink(missing_ok=True)  # left by a killed process
        write_parquet(self._file("plan", generation), plan, self.staging)

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
        tables = [read_log(path, DAMAGED.names) for path in self._files(generation, "damaged")]
        return pa.concat_tables([DAMAGED.empty_table(), *tables])

    def commits(self, units: set[ShardId], columns: Sequence[str] = COMMIT.names) -> pa.Table:
        """The commit records of `units` as one table, with the bucket as first column."""
        empty = COMMIT.empty_table().select(columns)
        empty = empty.add_column(0, "bucket", pa.nulls(0, pa.string()))
        paths = [self.commit(unit) for unit in sorted(units)]
        tables = read_together(self._fold("commit"), paths, empty.column_names, _read_commit)
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
        paths = self._files(generation, "removed", "plan")
        tables = read_together(self._fold("plan"), paths, columns, _read_plan)
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

    def files(self, generation: int) -> list[Path]:
        """The files of the log up to a generation, without commit records."""
        return self._files(generation, "removed", "damaged", "plan", "captions")

    def fold(self) -> None:
        """Fold the log's small files, if many are new; the caller holds the plan lock."""
        newest = max(self.generations(), default=-1)
        commits = [self.commit(unit) for unit in sorted(self.committed())]
        for kind, paths, columns, read in (
            ("plan", self._files(newest, "removed", "plan"), PLAN.names, _read_plan),
            ("captions", self._files(newest, "captions"), CAPTIONS.names, read_log),
            ("commit", commits, ["bucket", *COMMIT.names], _read_commit),
        ):
            write_fold(self._fold(kind), paths, columns, read, self.staging)

    def _caption_tables(
        self, generation: int, columns: Sequence[str], read: Read = read_log
    ) -> Iterator[pa.Table]:
        paths = self._files(generation, "captions")
        return read_together(self._fold("captions"), paths, columns, read)

    def _files(self, generation: int, *kinds: str) -> list[Path]:
        """The files of these kinds up to a generation, by generation; plans though they lack."""
        found = []
        folders = [(kind, self._folder(kind), _names(self._folder(kind))) for kind in kinds]
        for number in self.generations():
            if number <= generation:
                for kind, folder, names in folders:
                    name = _file_name(kind, number)
                    if kind == "plan" or name in names:
                        found.append(folder / name)
        return found

    def _file(self, kind: str, generation: int) -> Path:
        return self._folder(kind) / _file_name(kind, generation)

    def _folder(self, kind: str) -> Path:
        return self.root / ("captions" if kind == "captions" else f"manifest/{kind}")

    def _fold(self, kind: str) -> Path:
        return self.root / "manifest" / "folded" / f"{kind}.parquet"


def _file_name(kind: str, generation: int) -> str:
    if kind != "captions":
        return f"{generation:06d}.parquet"
    return f"delta-{generation:06d}.parquet" if generation else "base.parquet"


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
