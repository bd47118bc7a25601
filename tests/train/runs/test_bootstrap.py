import numpy as np
import pytest

from xlsd_train.runs.bootstrap import (
    Losses,
    compare,
    gap,
    intervals,
    lowest,
    mean,
    overall,
    summary,
)


def drawn(seed: int, count: int = 200, mean: float = 1.0, spread: float = 0.5) -> Losses:
    return np.random.default_rng(seed).normal(mean, spread, (count, 10)).astype(np.float32)


def test_intervals_are_those_of_the_mean() -> None:
    """1.96 standard errors, for many samples of anything."""
    losses = drawn(0, 2000)
    found = intervals(losses)
    assert len(found) == 11
    each = losses.mean(axis=1, dtype=np.float64)
    error = 1.96 * each.std() / 2000**0.5
    assert found[0].mean == pytest.approx(each.mean())
    assert found[0].low == pytest.approx(each.mean() - error, abs=error / 10)
    assert found[0].high == pytest.approx(each.mean() + error, abs=error / 10)
    for band in range(10):
        assert found[band + 1].mean == pytest.approx(losses[:, band].mean(), rel=1e-5)


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    hits = 0
    for seed in range(200):
        found = intervals(drawn(seed, 100))[0]
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 199


def test_the_same_losses_give_the_same_bits() -> None:
    assert summary(drawn(0), drawn(1)) == summary(drawn(0), drawn(1))


def test_the_gap_is_held_out_minus_training() -> None:
    found = gap(drawn(0, mean=1.5), drawn(1))
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert found.low > 0.3
    assert gap(drawn(0), drawn(1)).low < 0 < gap(drawn(0), drawn(1)).high


def test_pairing_tells_apart_what_intervals_alone_do_not() -> None:
    """Images differ much more than checkpoints do; on the same images a small step shows."""
    hard = np.linspace(0, 5, 200, dtype=np.float32)[:, None]
    good = drawn(0, spread=0.05) + hard
    worse = drawn(1, spread=0.05) + hard + 0.02
    same = drawn(2, spread=0.05) + hard
    assert intervals(good)[0].high > intervals(worse)[0].mean
    found = compare({"good": good, "worse": worse, "same": same})
    assert found.best in {"good", "same"}
    assert found.tied == ["same" if found.best == "good" else "good"]
    one, other = overall(worse), overall(good)
    assert (one - other).interval.low > 0
    assert one.interval.low < other.value


def test_the_highest_is_the_lowest_of_negatives() -> None:
    scores = {name: mean(np.linspace(x, x + 1, 50)) for name, x in (("low", 0.0), ("high", 5.0))}
    found = lowest({name: -score for name, score in scores.items()})
    assert (found.best, found.tied, found.loss.mean) == ("high", [], -scores["high"].value)


def test_alone_it_is_best() -> None:
    found = compare({1: drawn(0)})
    assert (found.best, found.tied) == (1, [])
    assert str(found.loss).startswith(f"{drawn(0).mean():.5f} (")
