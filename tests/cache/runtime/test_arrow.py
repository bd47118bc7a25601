import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.runtime.arrow import (
    last_lines,
    last_per_key,
    lookup,
    lookup_rows,
    merge_rows,
    take_or_null,
    unique_or_null,
)

NAMES = st.lists(st.none() | st.sampled_from("abcde"), max_size=9)
PAIRS = st.lists(st.tuples(st.none() | st.sampled_from("abc"), st.integers(0, 2)), max_size=9)


def table(rows: list[tuple[str | None, int]], chunk: int = 4) -> pa.Table:
    """In several chunks, as what is read from several files is."""
    parts = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
    columns = (pa.chunked_array([[row[i] for row in part] for part in parts], kind)
               for i, kind in enumerate([pa.string(), pa.int64()]))  # fmt: skip
    return pa.table(dict(zip(["a", "b"], columns, strict=True)))


@given(NAMES, NAMES)
def test_a_lookup_finds_what_a_dictionary_would(
    wanted: list[str | None], have: list[str | None]
) -> None:
    last = {name: i for i, name in enumerate(have) if name is not None}
    found = lookup(pa.array(wanted, pa.string()), pa.chunked_array([have], pa.string()))
    assert found.tolist() == [last.get(name, -1) if name else -1 for name in wanted]


@given(PAIRS, PAIRS)
def test_a_lookup_of_rows_finds_the_first_with_all_columns_equal(
    wanted: list[tuple[str | None, int]], have: list[tuple[str | None, int]]
) -> None:
    first = {row: i for i, row in reversed(list(enumerate(have))) if row[0] is not None}
    found = lookup_rows(table(wanted), table(have), ["a", "b"])
    assert found.tolist() == [first.get(row, -1) for row in wanted]
    names = take_or_null(table(have)["a"], found).to_pylist()
    assert names == [row[0] if row in first else None for row in wanted]


@given(PAIRS)
def test_the_last_row_of_each_key_is_what_a_dictionary_would_keep(
    rows: list[tuple[str | None, int]],
) -> None:
    pairs = {row: i for i, row in enumerate(rows)}
    assert last_per_key(table(rows), ["a", "b"]).tolist() == sorted(pairs.values())
    firsts = {row[0]: i for i, row in enumerate(rows)}
    assert last_per_key(table(rows), ["a"]).tolist() == sorted(firsts.values())
    kept = last_lines(table(rows), ["a", "b"])
    assert list(zip(*kept.to_pydict().values(), strict=True)) == [
        rows[i] for i in sorted(pairs.values())
    ]


def test_the_last_lines_of_a_log_may_have_more_text_than_one_array_holds() -> None:
    """As eleven million captions of 200 bytes have. The chunks are one in memory."""
    texts = pa.chunked_array([pa.array(["x" * 8000] * 6000)] * 45)
    assert texts.nbytes > 2**31
    log = pa.table({"key": np.arange(len(texts)) % 7, "text": texts})
    assert last_lines(log, ["key"])["key"].to_pylist() == [(len(texts) + i) % 7 for i in range(7)]


@given(NAMES)
def test_a_value_that_occurs_twice_becomes_null(names: list[str | None]) -> None:
    kept = unique_or_null(pa.array(names, pa.string())).to_pylist()
    assert kept == [name if names.count(name) == 1 else None for name in names]


@given(st.permutations(range(7)), st.integers(0, 7))
def test_merged_rows_stand_where_they_were_asked_to(order: list[int], cut: int) -> None:
    values = pa.table({"value": order})
    parts = [values.slice(0, cut), values.slice(cut)]
    positions = [part["value"].to_numpy() for part in parts]
    assert merge_rows(parts, positions)["value"].to_pylist() == list(range(7))
