"""The store's log: parquet files of what is planned, removed, captioned, damaged and committed.

Each file is written once. A *generation* is one change of the store: it exists when
`plan/<generation>.parquet` does, which gives each new or changed image its bucket and row, or the
reason why it has none. Reading the log up to a generation gives the store as it was then.
"""

import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlsd_cache.errors import UserError, one_line
from xlsd_cache.runtime.arrow import filtered, last_lines
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.runtime.bounded_files import require_regular
from xlsd_cache.schema import CAPTIONS, COMMIT, DAMAGED, LATER, MOST_ROWS, PLAN, REMOVED
from xlsd_cache.vocabulary import Bucket

_FIELDS = {field.name: field for table in (PLAN, COMMIT, CAPTIONS) for field in table}
_NEEDED = frozenset("key bucket row status column text".split())
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
        return _numbers(self.root / "manifest" / "plan", r"(\d+)\.parquet")

    def committed(self) -> set[ShardId]:
        """The shards that have a commit record."""
        folder = self.root / "manifest" / "commit"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
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
            (self._file("manifest/removed", generation), gone),
            (self._captions(generation), captions),
            (self._file("manifest/damaged", generation), given_up),
        ):
            if table.num_rows:
                write_parquet(path, table, self.staging)
            else:
                path.unlink(missing_ok=True)  # left by a killed process
        write_parquet(self._file("manifest/plan", generation), plan, self.staging)

    def live(self, generation: int) -> pa.Table:
        """PLAN of a generation's images: the last line of each key, without removed keys."""
        table = self.plan_lines(generation)
        table = last_lines(table, ["key"])
        return filtered(table, pc.is_valid(table["row"]))  # removed keys have nothing else

    def planned(self, generation: int) -> pa.Table:
        """PLAN of every row ever assigned up to a generation, its image live or not."""
        numbers = [n for n in self.generations() if n <= generation]
        tables = [read_log(self._file("manifest/plan", n), PLAN.names) for n in numbers]
        table = pa.concat_tables([PLAN.empty_table(), *tables])
        return table.filter(pc.greater_equal(table["row"], 0))

    def damaged(self, generation: int) -> pa.Table:
        """DAMAGED rows that `check --repair` found, up to a generation."""
        numbers = [n for n in self.generations() if n <= generation]
        paths = [self._file("manifest/damaged", n) for n in numbers]
        tables = [read_log(path, DAMAGED.names) for path in paths if path.exists()]
        return pa.concat_tables([DAMAGED.empty_table(), *tables])

    def commits(self, units: set[ShardId], columns: Sequence[str] = COMMIT.names) -> pa.Table:
        """The commit records of `units` as one table, with the bucket as first column."""
        empty = COMMIT.empty_table().select(columns)
        tables = [empty.add_column(0, "bucket", pa.nulls(0, pa.string()))]
        for unit in sorted(units):
            table = read_log(self.commit(unit), columns)
            bucket = pa.repeat(pa.scalar(unit.bucket, pa.string()), table.num_rows)
            tables.append(table.add_column(0, "bucket", bucket))
        return pa.concat_tables(tables)

    def captions(self, generation: int) -> pa.Table:
        """CAPTIONS at a generation: the last text of each key and column, unless empty."""
        read = [read_log(path, CAPTIONS.names) for path in self._caption_files(generation)]
        table = pa.concat_tables([CAPTIONS.empty_table(), *read])
        table = last_lines(table, ["key", "column"])
        return filtered(table, pc.not_equal(table["text"], ""))

    def plan_lines(self, generation: int, columns: Sequence[str] = PLAN.names) -> pa.Table:
        """All lines of PLAN up to a generation, in order; a removal has a key and nulls.

        Reading column by column, a log may be larger than the memory.
        """
        kept = [PLAN.empty_table().select(columns)]
        for n in (n for n in self.generations() if n <= generation):
            gone = self._file("manifest/removed", n)
            if gone.exists():
                kept.append(read_log(gone, REMOVED.names))
            path = self._file("manifest/plan", n)
            kept.append(read_log(path, columns))
        return pa.concat_tables(kept, promote_options="default").select(columns)

    def caption_columns(self, generation: int) -> list[str]:
        """The name of every caption column that ever had a text, sorted."""
        names: set[str] = set()
        for path in self._caption_files(generation):
            names.update(pc.unique(read_log(path, ["column"])["column"]).to_pylist())
        return sorted(names - _FIELDS.keys() | names & {"text", "column"})

    def caption_lines(self, generation: int, column: str, field: str) -> pa.ChunkedArray:
        """The keys or texts of all lines of a caption column, in order."""
        chunks = []
        for path in self._caption_files(generation):
            with _readable(path):
                require_regular(path)
                batches = pq.ParquetFile(path).iter_batches(1 << 17, columns=["column", field])
                values = [b[field].filter(pc.equal(b["column"], column)) for b in batches]
                pa.chunked_array(values, pa.string()).validate(full=True)
                chunks += values
        return pa.chunked_array(chunks, pa.string())

    def files(self, generation: int) -> list[Path]:
        """The files of the log up to a generation, without commit records."""
        return [
            path
            for n in self.generations()
            if n <= generation
            for path in (
                self._file("manifest/removed", n),
                self._file("manifest/damaged", n),
                self._file("manifest/plan", n),
                self._captions(n),
            )
            if path.exists()
        ]

    def _caption_files(self, generation: int) -> list[Path]:
        numbers = (n for n in self.generations() if n <= generation)
        return [path for path in map(self._captions, numbers) if path.exists()]

    def _file(self, folder: str, generation: int) -> Path:
        return self.root / folder / f"{generation:06d}.parquet"

    def _captions(self, generation: int) -> Path:
        name = f"delta-{generation:06d}.parquet" if generation else "base.parquet"
        return self.root / "captions" / name


def read_log(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of one of the log's tables. Raises UserError where it is unreadable or invalid."""
    with _readable(path):
        require_regular(path)
        file = pq.ParquetFile(path)
        present = set(file.schema_arrow.names)
        table = file.read([name for name in columns if name in present])
        for name in LATER.intersection(columns) - present:
            table = table.append_column(PLAN.field(name), pa.nulls(table.num_rows, pa.int64()))
        table = table.select(list(columns))
        table = table.cast(pa.schema([_FIELDS[name] for name in columns]))
        _check(table)
    return table


def _check(table: pa.Table) -> None:
    """Raise ValueError for bucket names and rows that no store has."""
    table.validate(full=True)
    for column in table.column_names:
        if column in _NEEDED and table[column].null_count:
            raise ValueError(f"its {column} is missing in some rows")
    if "bucket" in table.column_names:
        for name in pc.unique(table["bucket"]).to_pylist():
            if name:
                Bucket.parse(name)
    if "row" in table.column_names and table.num_rows:
        ends = pc.min_max(table["row"]).as_py()
        if not -1 <= ends["min"] <= ends["max"] < MOST_ROWS:
            raise ValueError(f"its rows are from {ends['min']} to {ends['max']}")


def is_bucket(name: str) -> bool:
    """Whether a bucket, and its folder, can have this name."""
    try:
        return bool(Bucket.parse(name))
    except ValueError:
        return False


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        store = path.parents[1 if path.parent.name == "captions" else 2]
        raise UserError(
            f"cannot read {path}, a part of the store's log: {one_line(error)}; "
            f"`xlsd-cache check {store} --repair` repairs what can be repaired"
        ) from error


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, and the links to folders."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _link_error(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is {what}, and nothing is written through it; replace it by what it points to, "
        f"or remove it"
    )


def _numbers(folder: Path, pattern: str) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)
