import pytest

from xlsd_train.progress.time_left import TimeLeft


@pytest.mark.parametrize(("sample_s", "validate_s"), [(0.0, 0.0), (60.0, 0.0), (60.0, 200.0)])
def test_the_time_left_is_right_also_after_pauses(sample_s: float, validate_s: float) -> None:
    """A simulated run of 1,000 steps of 1 s and slow first ones, with pauses as scheduled."""
    last, every, now = 1000, {"sampling": 50, "validating": 120}, 0.0
    left, at, estimated = TimeLeft(last, every), dict[int, float](), dict[int, float]()
    for step in range(1, last + 1):
        step_s = 20.0 if step <= 2 else 1.0
        now += step_s
        line = {"step": step, "images_seen": 8 * step, "images_per_s": 8 / step_s}
        left.see(line)
        for what, seconds in (("sampling", sample_s), ("validating", validate_s)):
            if step % every[what] == 0 or step == last:
                now += seconds
                left.paused(what, seconds)
        left_s = left.after(step)
        at[step] = now
        if left_s is not None and step >= 120:  # each pause was measured once
            estimated[step] = left_s
    for step, left_s in estimated.items():
        assert left_s == pytest.approx(now - at[step], rel=0.2, abs=1e-6), step
