import json
from pathlib import Path

import pytest

from xlsd_train.config.optimization import Optimizer
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.plateau import WINDOW, Plateau, PlateauWatch

Line = dict[str, float]


def run(ds: list[float], lr: float = 1.0) -> list[Line]:
    return [{"step": i + 1, "d": d, "lr_effective": d * lr} for i, d in enumerate(ds)]


def first_plateau(lines: list[Line], d_max: float | None = None) -> Plateau | None:
    watch = PlateauWatch(d_max)
    return next(filter(None, map(watch.next, lines)), None)


START = [1e-6 * 1.05**i for i in range(60)]  # 18-fold


def test_the_first_plateau_and_the_rate_it_suggests() -> None:
    creeping = [START[-1] * 1.0001**i for i in range(1, 150)]
    lines = run(START + creeping, lr=0.5)
    plateau = first_plateau(lines)
    assert plateau is not None
    assert (plateau.step, plateau.seen_at) == (60, 60 + WINDOW)
    assert plateau.d == creeping[WINDOW - 1]
    assert plateau.lr == 0.5 * plateau.d
    assert f"--optimizer lion --lr {plateau.lr:.2g}" in str(plateau)


def test_later_growth_does_not_move_it() -> None:
    again = [START[-1]] * 150 + [START[-1] * 1.05**i for i in range(50)] + [1.0] * 300
    assert first_plateau(run(START + again)) == first_plateau(run(START + [START[-1]] * 150))


@pytest.mark.parametrize(
    "ds",
    [
        [1e-6] * 500,  # it has not begun to grow
        [1e-6 * 1.02**i for i in range(100)] + [1e-6 * 1.02**100] * 300,  # not tenfold
        [1e-6 * 1.01**i for i in range(900)],  # always growing
        START + [START[-1]] * (WINDOW - 1),  # not long enough
    ],
)
def test_none(ds: list[float]) -> None:
    assert first_plateau(run(ds)) is None


def test_a_limit_is_no_plateau() -> None:
    lines = run(START + [START[-1]] * 150)
    assert first_plateau(lines, d_max=START[-1]) is None
    assert first_plateau(lines, d_max=1.0) is not None


def test_a_run_says_it_once_however_often_it_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, lines = tmp_path / "metrics.jsonl", run(START + [START[-1]] * 300)
    config = TrainConfig(phase="unet", optimizer="dlion")
    caplog.set_level("INFO", "xlsd")
    said: list[int] = []
    for first in range(0, len(lines), 45):
        watch = PlateauWatch.of_run(config, metrics)
        for line in lines[first : first + 45]:
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            watch.see(line)
            said += [int(line["step"])] * caplog.text.count("first plateau")
            caplog.clear()
    assert said == [60 + WINDOW]


def test_only_dlion_is_watched(tmp_path: Path) -> None:
    lines = run(START + [START[-1]] * 150)
    expected: dict[Optimizer, bool] = {"dlion": True, "adamw": False, "lion": False}
    for optimizer, found in expected.items():
        config = TrainConfig(phase="unet", optimizer=optimizer)
        watch = PlateauWatch.of_run(config, tmp_path / "metrics.jsonl")
        assert any(watch.next(line) for line in lines) == found
    assert first_plateau([{"step": step, "lr_effective": 1e-6} for step in range(300)]) is None
