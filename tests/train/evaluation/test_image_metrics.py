import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlsd_train.evaluation.clip import Embeddings
from xlsd_train.evaluation.image_metrics import ImageSet, clip_scores, cmmd
from xlsd_train.runs.bootstrap import mean


def on_sphere(seed: int, count: int, shift: float = 0.0, size: int = 6) -> Embeddings:
    found: Embeddings = np.random.default_rng(seed).normal(0, 0.5, (count, size))
    found[:, 0] += 1 + shift
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def as_written(x: Embeddings, y: Embeddings) -> float:
    """Gretton et al. 2012, equation 3, term by term."""

    def k(a: Embeddings, b: Embeddings) -> float:
        return float(np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * 10**2)))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * (xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m))


def test_cmmd_is_the_formula_written_out() -> None:
    x, y = on_sphere(0, 12, 0.3), on_sphere(1, 17)
    assert cmmd(ImageSet.of(x), ImageSet.of(y)).value == pytest.approx(as_written(x, y), abs=1e-9)


def test_cmmd_of_two_points_is_known() -> None:
    """Two sets of identical images with orthogonal embeddings: 2 - 2 exp(-2 / 200)."""
    x, y = np.eye(2)[[0] * 11], np.eye(2)[[1] * 13]
    found = cmmd(ImageSet.of(x), ImageSet.of(y, "real"))
    assert found.value == pytest.approx(2000 * (1 - np.exp(-0.01)), abs=1e-9)
    assert np.ptp(found.resampled) < 1e-9
    assert cmmd(ImageSet.of(x), ImageSet.of(x)).value == pytest.approx(0, abs=1e-9)


def test_the_papers_own_code_has_the_documented_bias() -> None:
    x, y = on_sphere(0, 30, 0.3), on_sphere(1, 40)
    ours, theirs = cmmd(ImageSet.of(x), ImageSet.of(y)).value, 0.0
    for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
        distances = np.square(a[:, None] - b[None]).sum(axis=2)
        theirs += sign * 1000 * float(np.exp(-distances / 200).mean())
    bias = sum(1000 * (1 - ImageSet.of(a).within[0]) / len(a) for a in (x, y))
    assert theirs == pytest.approx(ours + bias, abs=1e-9)
    assert bias > 0.1


def test_more_rows_than_a_block_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = on_sphere(0, 33), on_sphere(1, 20)
    whole = cmmd(ImageSet.of(x), ImageSet.of(y))
    monkeypatch.setattr("xlsd_train.evaluation.image_metrics.BLOCK", 10)
    parts = cmmd(ImageSet.of(x), ImageSet.of(y))
    assert parts.value == pytest.approx(whole.value, abs=1e-9)
    assert np.allclose(parts.resampled, whole.resampled, atol=1e-9)


@given(st.integers(0, 1000), st.integers(10, 20), st.integers(10, 20))
def test_order_and_sides_do_not_matter(seed: int, n: int, m: int) -> None:
    x, y = on_sphere(seed, n, 0.2), on_sphere(seed + 1, m)
    found = cmmd(ImageSet.of(x), ImageSet.of(y)).value
    rng = np.random.default_rng(seed)
    mixed = cmmd(ImageSet.of(rng.permutation(x)), ImageSet.of(rng.permutation(y))).value
    assert mixed == pytest.approx(found, abs=1e-9)
    assert cmmd(ImageSet.of(y), ImageSet.of(x)).value == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_cmmd_is_unbiased_and_its_intervals_cover_the_truth(shift: float) -> None:
    """Also for two sets of one distribution, where intervals are wider than necessary."""
    big = [on_sphere(seed, 5000, each) for seed, each in ((0, shift), (1, 0.0))]
    truth = 0.0
    for a, b, sign in ((0, 0, 1), (1, 1, 1), (0, 1, -2)):
        kernel = np.exp((big[a] @ big[b].T - 1) / 100)
        if a == b:
            np.fill_diagonal(kernel, np.nan)
        truth += sign * 1000 * float(np.nanmean(kernel))
    values, hits = [], 0
    for seed in range(100):
        x, y = on_sphere(2 * seed + 10, 30, shift), on_sphere(2 * seed + 11, 40)
        found = cmmd(ImageSet.of(x), ImageSet.of(y, "real"))
        low, high = found.interval.low, found.interval.high
        hits += low <= truth <= high
        assert low <= found.value <= high
        values.append(found.value)
    assert hits >= 90
    assert np.mean(values) == pytest.approx(truth, abs=0.4 * float(np.std(values)))


def test_models_of_the_same_prompts_are_compared_in_pairs() -> None:
    """Two models that differ by less than the width of their intervals, in every pair alike."""
    real = ImageSet.of(on_sphere(1, 50), "real")
    one, other = (cmmd(ImageSet.of(on_sphere(0, 60, shift)), real) for shift in (0.4, 0.5))
    assert one.value < other.value < one.interval.high
    assert (other - one).interval.low > 0


def test_clip_scores_are_cosines_that_are_never_negative() -> None:
    images, texts = np.array([[1.0, 0], [0, 1], [0.6, 0.8]]), np.array([[1.0, 0], [0, -1], [0, 1]])
    assert clip_scores(images, texts).tolist() == pytest.approx([2.5, 0, 2])
    found = mean(clip_scores(on_sphere(0, 50), on_sphere(1, 50))).interval
    assert found.low < found.mean < found.high
