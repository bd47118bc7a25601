import pytest
import torch

from xlsd_cache.encoding.finite import bad_values, is_finite, not_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_one_bad_number_is_found_in_every_dtype(bad: float, dtype: torch.dtype) -> None:
    for shape in ((1,), (3, 5), (40, 41, 3, 3)):
        value = torch.zeros(shape)
        value.view(-1)[-1] = bad
        assert not_finite({"a": torch.ones(2, dtype=dtype), "b": value.to(dtype)}) == ["b"]
        assert bad_values(value.to(dtype)).startswith("1 of ")
        assert not is_finite(value.to(dtype))


def test_huge_numbers_whose_norm_overflows_are_finite() -> None:
    huge = torch.full((1000,), 3e38)
    assert not_finite({"a": huge, "b": torch.full((9,), 6e4, dtype=torch.float16)}) == []
    mixed = {"a": huge, "n": torch.tensor([1.0, float("nan")])}
    assert not_finite(mixed) == ["n"]


def test_integers_empty_and_strided_tensors_are_no_trouble() -> None:
    strided = torch.zeros(4, 6, 3, 3).to(memory_format=torch.channels_last)
    held = {
        "i": torch.arange(3),
        "e": torch.zeros(0),
        "s": strided,
        "n": torch.tensor(float("nan")),
    }
    assert not_finite(held) == ["n"]
    strided[2, 3, 1, 1] = float("inf")
    assert not_finite(held) == ["s", "n"]
    assert not_finite({}) == []
