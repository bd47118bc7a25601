from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_cache.files.captions import value_text
from xlsd_cache.tables.arrow_tables import column_texts

# Every kind of white space and control character that Python knows, among others.
TEXTS = st.text(
    st.sampled_from("ab, \t\r\n\0\x0b\x1c\x85\xa0\u2028\u2029\u3000\u200b写"), max_size=6
)


@given(st.lists(st.none() | TEXTS))
def test_a_column_of_texts_is_what_its_values_are_one_by_one(values: list[str | None]) -> None:
    texts, remarks = column_texts(pa.array(values, pa.string()))
    single = [value_text(value) for value in values]
    assert texts.to_pylist() == [text or None for text, _ in single]
    assert remarks == Counter(what for _, said in single for what in said)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.list_(pa.string()), pa.int64()])
def test_columns_of_other_types_are_read_too(kind: pa.DataType) -> None:
    value = {"large_string": " a  b", "list<item: string>": ["a", "b"], "int64": 7}[
        str(kind).replace("element", "item")
    ]
    texts, remarks = column_texts(pa.array([value, None], kind))
    assert texts.to_pylist() == [value_text(value)[0], None]
    assert remarks == {"missing": 1}
