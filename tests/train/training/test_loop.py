import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import xlsd_train.optim.plateau
from tests.support import (
    cache,
    files,
    metrics,
    printed,
    spawn,
    together,
    torchrun,
    train,
    wait_for,
    write_images,
)
from tests.support.report_page import Page
from tests.support.sessions import Open, slow_train
from xlsd_cache.console.terminal import start
from xlsd_cache.dataset.batch_order import Slot
from xlsd_train.data.loader import Batch, BatchSource
from xlsd_train.runs.layout import checkpoints
from xlsd_train.runs.validation_log import read_losses
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.step import Step

Arguments = list[object]


@pytest.fixture
def arguments(model: Path, store: Path) -> Arguments:
    """A run of ten steps that samples, saves, drops captions and accumulates."""
    return [
        "--batch", 4, "--accum", 2, "--data", store, "--model", model, "--steps", 10,
        "--save-every", 3, "--sample-every", 4, "--sample-steps", 2, "--lr", 1e-3,
        "--warmup", "30%", "--caption-dropout", 0.2, "--threads", 1, "--keep", 2,
    ]  # fmt: skip


def left(run: Path) -> tuple[Any, ...]:
    """All that a run leaves and that must not depend on how often it was interrupted."""
    weights = files(run, "checkpoints/*/*")
    assert weights
    log = run / "validation.jsonl"
    measured = log.read_bytes() if log.exists() else b"", files(run, "validation/*")
    return weights, files(run, "ema/*"), files(run, "samples/**/*.png"), metrics(run), measured


@pytest.mark.parametrize(
    "phase", ["unet", *(pytest.param(x, marks=pytest.mark.slow) for x in ("te", "both"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    arguments: Arguments, tmp_path: Path, phase: str
) -> None:
    given = ["--phase", phase, *arguments]
    assert train(*given, "--out", tmp_path / "whole") == 0
    for stop in (1, 5, 10):
        assert train(*given, "--out", tmp_path / "parts", "--stop-after", stop) == 0
    assert files(tmp_path / "parts", "checkpoints/step-00000010/*") == files(
        tmp_path / "whole", "checkpoints/step-00000010/*"
    )
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    samples = files(tmp_path / "whole", "samples/step*/*.png")
    assert samples.items() <= files(tmp_path / "parts", "samples/step*/*.png").items()


@pytest.mark.parametrize("optimizer", ["dlion", "adamw"])
def test_every_optimizer_resumes_to_the_bit(
    arguments: Arguments, tmp_path: Path, optimizer: str
) -> None:
    """Also the optimizer's numbers outside tensors, the logged rate, and a falling LR scheduler."""
    given = ["--phase", "te", *arguments, "--optimizer", optimizer, "--sample-every", 0]
    given += ["--scheduler", "cosine", "--train", "text_encoder.encoder.layers"]
    if optimizer == "dlion":
        given[given.index("--lr") + 1] = 1.0
    assert train(*given, "--out", tmp_path / "whole") == 0
    for stop in (1, 8, 10):
        assert train(*given, "--out", tmp_path / "parts", "--stop-after", stop) == 0
    last = "checkpoints/step-00000010/*"
    assert files(tmp_path / "parts", last) == files(tmp_path / "whole", last)
    lines = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == lines
    if optimizer == "dlion":
        assert [line["lr_effective"] for line in lines] == [x["d"] * x["lr"] for x in lines]
        assert lines[0]["d"] == 1e-6 < lines[7]["d"] <= lines[9]["d"]


@pytest.mark.slow
def test_rate_options_act_and_a_stop_step_changes_no_rate(
    arguments: Arguments, tmp_path: Path
) -> None:
    given = ["--phase", "te", *arguments, "--sample-every", 0, "--optimizer", "dlion"]
    given[given.index("--lr") + 1] = 1.0
    given += ["--scheduler", "linear", "--lr-floor", 0.1]
    assert train(*given, "--out", tmp_path / "whole") == 0
    lines = metrics(tmp_path / "whole")
    expected = [1 / 3, 2 / 3, 1.0] + [0.1 + 0.9 * (10 - step) / 7 for step in range(4, 11)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert train(*given, "--out", tmp_path / "short", "--stop-after", 6) == 0
    assert metrics(tmp_path / "short") == lines[:6]
    limits = ("--d-max", 1.5e-6, "--d-growth", 1.2)
    assert train(*given, *limits, "--out", tmp_path / "limited") == 0
    ds, free = ([x["d"] for x in found] for found in (metrics(tmp_path / "limited"), lines))
    assert max(ds) == 1.5e-6 < max(free)
    assert (
        max(b / a for a, b in pairwise(ds)) <= 1.2 + 1e-12 < max(b / a for a, b in pairwise(free))
    )


def test_the_first_plateau_is_said_once(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With bounds that d, which the first steps leave where it began, meets at once."""
    monkeypatch.setattr(xlsd_train.optim.plateau, "RISE", 1.0)
    monkeypatch.setattr(xlsd_train.optim.plateau, "WINDOW", 1)
    given = ["--phase", "te", *arguments, "--sample-every", 0, "--optimizer", "dlion"]
    given[given.index("--lr") + 1] = 1.0
    for stop in (1, 3, 4):
        assert train(*given, "--out", tmp_path / "run", "--stop-after", stop) == 0
    (said,) = [x for x in printed(capsys).splitlines() if "first plateau" in x]
    assert said.startswith("d reached its first plateau at step 1: up to step 2 ")
    assert said.endswith("--optimizer lion --lr 6.7e-07")


@pytest.mark.slow
def test_reinitialised_layers_begin_anew_once(
    arguments: Arguments, model: Path, tmp_path: Path
) -> None:
    """When the run begins; not when it goes on, and the same after a kill before any checkpoint."""
    given = ["--phase", "unet", *arguments, "--sample-every", 0, "--reinit", "unet.conv_in"]
    given[given.index("--lr") + 1] = 1e-9  # so that weights stay where they began
    assert train(*given, "--out", tmp_path / "whole") == 0
    assert train(*given, "--out", tmp_path / "parts", "--stop-after", 1) == 0
    checkpoints(tmp_path / "parts")[-1].rename(tmp_path / "lost")
    for stop in (1, 4, 10):
        assert train(*given, "--out", tmp_path / "parts", "--stop-after", stop) == 0
    last = "checkpoints/step-00000010/*"
    assert files(tmp_path / "parts", last) == files(tmp_path / "whole", last)
    old = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    new = load_file(tmp_path / "whole/checkpoints/step-00000010/unet.safetensors")
    far = {key for key in old if (old[key] - new[key]).abs().max() > 1e-3}
    assert far == {"conv_in.weight", "conv_in.bias"}


@pytest.mark.slow
def test_a_run_that_steps_inside_backward_resumes_exactly(
    arguments: Arguments, tmp_path: Path
) -> None:
    given = ["--phase", "both", *arguments, "--memory", "sliced", "--micro-batch", 1]
    given[given.index("--steps") + 1] = 6
    assert train(*given, "--out", tmp_path / "whole") == 0
    for stop in (2, 6):
        assert train(*given, "--out", tmp_path / "parts", "--stop-after", stop) == 0
    last = "checkpoints/step-00000006/*"
    assert files(tmp_path / "parts", last) == files(tmp_path / "whole", last)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_plan_that_was_tightened_stays_so_after_a_resume(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is full once, in step 2; going on from step 3 is bit-equal to never stopping."""
    given = ["--phase", "unet", *arguments]
    given[given.index("--steps") + 1] = 6
    start = Step._start

    def full_once(self: Step, batch: Batch) -> Any:
        if batch.number == 2 and self.plan == MemoryPlan("plain", 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(self, batch)

    monkeypatch.setattr(Step, "_start", full_once)
    assert train(*given, "--out", tmp_path / "whole") == 0
    assert train(*given, "--out", tmp_path / "parts", "--stop-after", 3) == 0
    monkeypatch.undo()
    state = tmp_path / "parts/checkpoints/step-00000003/state.json"
    assert json.loads(state.read_text())["plan"][:2] == ["plain", 2]
    assert train(*given, "--out", tmp_path / "parts") == 0
    last = "checkpoints/step-00000006/*"
    assert files(tmp_path / "parts", last) == files(tmp_path / "whole", last)


def all_at_once(images: Path, vae: Path, folder: Path) -> dict[str, object]:
    """Every feature that has a state or is random, with a second store of six other pictures."""
    write_images(images, [f"{i}.png" for i in range(6)])
    build = ("--vae", vae, "--resolution", 128, "--batch", 4)
    assert cache("build", images, "--out", folder, *build) == 0
    return {
        "--ema": None, "--ema-every": 2, "--shuffle": "tags", "--tag-dropout": 0.2,
        "--timesteps": "stratified", "--noise-offset": 0.05, "--validate-every": 3,
        "--validation-fraction": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "optimizer", "mixed", "due"),
    [
        pytest.param("unet", "lion", False, 10, marks=pytest.mark.slow),
        ("te", "dlion", False, 4),
        pytest.param("te", "dlion", True, 6, marks=pytest.mark.slow),
        pytest.param("te", "adamw", True, 6, marks=pytest.mark.slow),
    ],
)
def test_kill_9_again_and_again(
    arguments: Arguments, store: Path, vae: Path, tmp_path: Path, phase: str, optimizer: str,
    mixed: bool, due: int,
) -> None:  # fmt: skip
    """Weights, optimizer state, averages, samples, metrics, validation: all bit-equal."""
    given = ["--phase", phase, *arguments, "--optimizer", optimizer]
    if optimizer == "dlion":
        given[given.index("--lr") + 1] = 1.0
    if mixed:
        more = all_at_once(tmp_path / "images", vae, tmp_path / "second")
        given += [word for pair in more.items() for word in pair if word is not None]
        at = given.index("--data")
        given[at : at + 2] = ["--data", f"{store}:2", tmp_path / "second"]
        given[given.index("--batch") + 1], given[given.index("--accum") + 1] = 2, 8
    assert train(*given, "--out", tmp_path / "whole") == 0
    expected = left(tmp_path / "whole")

    random.seed(phase + optimizer)
    run, log, kills, killed_at = tmp_path / "killed", tmp_path / "log", 0, set[int]()
    while kills < due or len(killed_at) < min(4, due - 1):  # at different steps
        process = spawn(slow_train, *given, "--out", run, log=log)
        if kills < due // 3:  # while it starts
            time.sleep(random.uniform(0.1, 1.5))
        else:  # some steps on from where it began again
            newest = max((int(path.name[5:]) for path in checkpoints(run)), default=0)
            goal = newest + random.randint(1, 4)
            while steps(run) < goal and process.is_alive():
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.3))
        assert kills < 40, killed_at
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: let it do the end again
            shutil.rmtree(checkpoints(run)[-1])
            continue
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        kills += 1
        killed_at.add(steps(run))
    process = spawn(train, *given, "--out", run, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert left(run) == expected
    assert not list(run.rglob("*.tmp"))


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_sampling_saving_and_logging_change_no_weight(arguments: Arguments, tmp_path: Path) -> None:
    given = ["--phase", "unet", *arguments]
    assert train(*given, "--out", tmp_path / "all") == 0
    quiet = list(given)
    quiet[quiet.index("--sample-every") + 1] = 0
    quiet[quiet.index("--save-every") + 1] = 100
    assert train(*quiet, "--out", tmp_path / "none") == 0
    assert not (tmp_path / "none/samples").exists()
    last = "checkpoints/step-00000010/*"
    assert files(tmp_path / "none", last) == files(tmp_path / "all", last)
    assert metrics(tmp_path / "none") == metrics(tmp_path / "all")


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGINT], marks=pytest.mark.slow),
        [signal.SIGHUP, signal.SIGTERM] * 2,
    ],
)
def test_signals_save_and_say_how_to_go_on(
    arguments: Arguments, tmp_path: Path, numbers: list[signal.Signals]
) -> None:
    """Once or again and again; what was not measured is not called the best, and is made up for."""
    given = ["--phase", "unet", *arguments, *measuring(3)]
    run, log = tmp_path / "run", tmp_path / "log"
    process = spawn(slow_train, *given, "--out", run, log=log)
    wait_for(lambda: steps(run) >= 1)
    for number in numbers:
        with suppress(ProcessLookupError):  # it may have ended after fewer
            os.kill(process.pid, number)
        time.sleep(0.03)
    process.join()
    assert process.exitcode == 0, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert f"to resume bit-exactly, use the same command with --out {run}" in said
    step = int(checkpoints(run)[-1].name[5:])
    assert step == len(metrics(run)) < 10
    if step < 3:
        assert "no trained checkpoint was validated, so there is no best one" in said
    assert ("\nreport " in said) == (numbers == [signal.SIGINT])  # slow, so not in a hurry
    assert train(*given, "--out", run) == 0
    assert train(*given, "--out", tmp_path / "whole") == 0
    assert left(run) == left(tmp_path / "whole")


def measuring(every: int) -> Arguments:
    return ["--validate-every", every, "--validation-fraction", 0.3]


def test_what_a_signal_left_out_is_made_up_for(arguments: Arguments, tmp_path: Path) -> None:
    """Samples and validation of the step that it was saved at, by the run that goes on."""
    given = ["--phase", "unet", *arguments, *measuring(4), "--ema", "--ema-every", 2]
    given[given.index("--save-every") + 1] = 4
    run = tmp_path / "run"
    assert train(*given, "--out", run, "--stop-after", 4) == 0
    before = left(run)
    shutil.rmtree(run / "samples/step-00000004")
    (run / "validation/step-00000004.safetensors").unlink()
    lines = (run / "validation.jsonl").read_text().splitlines(keepends=True)
    (run / "validation.jsonl").write_text("".join(x for x in lines if '"step": 0,' in x))
    assert train(*given, "--out", run, "--stop-after", 4) == 0
    assert left(run) == before


def test_looking_is_broken_off_between_batches(open_run: Open, tmp_path: Path) -> None:
    session = open_run(validate_every=1, validation_fraction=0.4, batch=3, sample_steps=1)
    assert session.validator
    answers = iter([False, False, True])

    def stopped() -> bool:
        return next(answers)

    weights = {"live": nullcontext()}
    assert session.validator(session.take_step, weights, stopped=stopped) is None
    answers = iter([False, True])
    folder = session.run.folder
    drawn = session.sampler(session.model, folder, 0, session.accelerator, stopped=stopped)
    assert drawn is None
    assert not (folder / "samples").exists()
    assert session.model.unet.training


def test_a_closed_terminal_saves(arguments: Arguments, tmp_path: Path) -> None:
    """The kernel's own SIGHUP to a session, and a terminal that refuses all further text."""
    run, log = tmp_path / "run", tmp_path / "log"
    given = ["--phase", "unet", *arguments, "--sample-every", 0, "--out", run]
    given[given.index("--steps") + 1] = 2000
    terminal, inner = os.openpty()
    process = spawn(in_terminal, os.ttyname(inner), *given, log=log)
    wait_for((tmp_path / "open").exists)
    os.close(inner)
    wait_for(lambda: steps(run) >= 2 and bool(os.read(terminal, 1 << 16)))
    os.close(terminal)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert int(checkpoints(run)[-1].name[5:]) == len(metrics(run)) < 2000


def in_terminal(name: str, *given: object) -> int:
    """`xlsd-train` as the leader of a session of its own in this terminal."""
    os.setsid()
    number = os.open(name, os.O_RDWR)  # which is the session's from here on
    for stream in range(3):
        os.dup2(number, stream)
    os.close(number)
    (Path(str(given[-1])).parent / "open").touch()
    start()
    return slow_train(*given)


def test_an_epoch_is_as_long_as_its_stores_weights_make_it(
    arguments: Arguments, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --epochs counts: three uses of each sample for a weight of 3, and that is said."""
    given = ["--phase", "unet", *arguments, "--sample-every", 0, "--out", tmp_path / "run"]
    given[given.index("--data") + 1] = f"{store}:3"
    at = given.index("--steps")
    given[at : at + 2] = ["--epochs", 1]
    assert train(*given) == 0
    last = metrics(tmp_path / "run")[-1]
    assert last["images_seen"] == pytest.approx(3 * 8, abs=8)  # eight photos
    assert last["epoch"] == last["images_seen"] / 24
    (said,) = [x for x in printed(capsys).splitlines() if x.startswith("epoch 1 done")]
    told = re.fullmatch(
        r"epoch 1 done: (\d+) images seen, 24 per epoch \(images times store weights(.*)\)", said
    )
    assert told
    assert 24 - 8 < int(told[1]) < 24 + 8
    assert bool(told[2]) == (told[1] != "24")


def test_touched_files_act_at_the_next_step(arguments: Arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    rare = list(arguments)
    for option in ("--save-every", "--sample-every"):
        rare[rare.index(option) + 1] = 1000
    rare[rare.index("--steps") + 1] = 500
    process = spawn(slow_train, "--phase", "unet", *rare, "--out", run, log=log)
    wait_for(lambda: steps(run) >= 1)
    for name, appears in (
        ("SAMPLE", lambda: len(list((run / "samples").glob("step-*/03.png"))) == 2),
        ("SAVE", lambda: len(checkpoints(run)) == 1),
        ("STOP", lambda: not process.is_alive()),
    ):
        (run / name).touch()
        wait_for(appears)
        assert not (run / name).exists()
    process.join()
    assert process.exitcode == 0
    lines = len(metrics(run))
    assert lines < 500
    assert checkpoints(run)[-1].name == f"step-{lines:08d}"


def test_two_processes_see_what_one_would(arguments: Arguments, tmp_path: Path) -> None:
    """Losses equal to rounding, weights too; and a checkpoint of either resumes in the other.

    Samples and validation, which they share, are one process's to the bit for the same weights
    and the same plan, which a run keeps.
    """
    given = ["--phase", "both", *arguments, "--optimizer", "adamw", *measuring(3), "--ema"]
    for option, value in (("--lr", 1e-5), ("--steps", 6), ("--sample-every", 3)):
        given[given.index(option) + 1] = value
    given.append("--out")
    assert train(*given, tmp_path / "one") == 0
    torchrun(2, "xlsd_train", *given, tmp_path / "two first", "--stop-after", 3)
    assert train(*given, tmp_path / "two first") == 0
    assert train(*given, tmp_path / "one first", "--stop-after", 3) == 0
    looked = ("samples/step-00000003/*", "validation/step-00000003*")
    shutil.rmtree(tmp_path / "one first/samples/step-00000003")
    (tmp_path / "one first/validation/step-00000003.safetensors").unlink()
    of_two(train, *given, tmp_path / "one first", log=tmp_path / "log")
    for pattern in looked:
        found = files(tmp_path / "one", pattern)
        assert found
        assert files(tmp_path / "one first", pattern) == found
    two, alone = tmp_path / "two first", tmp_path / "one"  # begun with other micro-batches
    assert files(two, "samples/step-00000000/*") == files(alone, "samples/step-00000000/*")
    for name, losses in read_losses(alone, 0).items():
        assert np.allclose(read_losses(two, 0)[name], losses, rtol=1e-5)
    one = metrics(tmp_path / "one")
    last = "checkpoints/step-00000006/unet.safetensors"
    weights = load_file(tmp_path / "one" / last)
    for other in ("two first", "one first"):
        lines = metrics(tmp_path / other)
        assert len(lines) == len(one)
        for ours, theirs in zip(one, lines, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
            for name in ("step", "images_seen", "epoch", "lr"):
                assert theirs[name] == ours[name]
        for path, weight in load_file(tmp_path / other / last).items():
            assert torch.allclose(weight, weights[path], atol=1e-5), path
    assert json.loads((tmp_path / "two first/config.json").read_text())["processes"] == 2


def of_two(target: Any, *args: object, log: Path) -> None:
    """Two processes of one run, both of which must succeed."""
    for number, process in enumerate(together(2, target, *args, log=log)):
        process.join()
        assert process.exitcode == 0, log.with_suffix(f".{number}").read_text()


def test_signals_to_all_processes_save_once(arguments: Arguments, tmp_path: Path) -> None:
    """To both at once and again, as a launcher hands on what they were sent themselves."""
    run, log = tmp_path / "run", tmp_path / "log"
    given = ["--phase", "unet", *arguments, "--sample-every", 0, "--out", run]
    given[given.index("--steps") + 1] = 2000
    both = together(2, slow_train, *given, log=log)
    wait_for(lambda: steps(run) >= 2)
    for process in (*both, *both):
        os.kill(process.pid, signal.SIGTERM)
    for number, process in enumerate(both):
        process.join(60)
        assert process.exitcode == 0, log.with_suffix(f".{number}").read_text()
    assert int(checkpoints(run)[-1].name[5:]) == len(metrics(run)) < 2000


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_is_said_by_the_others(
    arguments: Arguments, tmp_path: Path, killed: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    given = ["--phase", "unet", *arguments, "--sample-every", 0, "--out", run]
    given[given.index("--steps") + 1] = 2000
    both = together(2, slow_train, *given, log=log)
    wait_for(lambda: steps(run) >= 4)
    both[killed].kill()
    other, text = both[1 - killed], log.with_suffix(f".{1 - killed}")
    other.join(60)
    assert other.exitcode == 1, text.read_text()
    (said,) = [x for x in text.read_text().splitlines() if x.startswith("xlsd-train: ")]
    assert "another process of this run has ended" in said
    assert said.endswith(f"resume with the same command and --out {run}")
    assert checkpoints(run)


@pytest.mark.slow
def test_two_processes_step_their_layers_together(arguments: Arguments, tmp_path: Path) -> None:
    given = ["--phase", "unet", *arguments, "--memory", "sliced", "--micro-batch", 1, "--out"]
    for option, value in (("--steps", 3), ("--sample-every", 0), ("--lr", 1e-5)):
        given[given.index(option) + 1] = value
    assert train(*given, tmp_path / "one") == 0
    of_two(train, *given, tmp_path / "two", log=tmp_path / "log")
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_a_batch_smaller_than_the_processes_still_trains(
    arguments: Arguments, tmp_path: Path
) -> None:
    """One sample and two processes: the second has none, and takes part with a zero gradient."""
    given = ["--phase", "unet", *arguments, "--out"]
    for option, value in (("--batch", 1), ("--accum", 1), ("--steps", 3), ("--sample-every", 0)):
        given[given.index(option) + 1] = value
    assert train(*given, tmp_path / "one") == 0
    of_two(train, *given, tmp_path / "two", log=tmp_path / "log")
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


@pytest.mark.parametrize(("number", "step"), [(9, 5), pytest.param(11, 6, marks=pytest.mark.slow)])
def test_a_loss_gone_wrong_ends_the_run_and_keeps_the_last_checkpoint(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int, step: int,
) -> None:  # fmt: skip
    """Also in a step after which a checkpoint is due: what is not a number is never kept."""
    make = BatchSource.make

    def spoilt(self: BatchSource, slot: Slot, pin: bool = False) -> Batch:
        batch = make(self, slot, pin)
        if slot.number == number:
            batch.latents[0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(BatchSource, "make", spoilt)
    assert train("--phase", "unet", *arguments, "--out", tmp_path / "run") == 1
    assert f"the loss of step {step} is nan" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000003"
    logged = metrics(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, step + 1))
    assert [math.isfinite(line["loss"]) for line in logged] == [True] * (step - 1) + [False]
    page = Page(tmp_path / "run/report.html")
    assert f"It diverged: at step {step} the loss is not finite." in page.text


def small_disk(limit: int, *args: object) -> int:
    """`xlsd-train` where no file may grow beyond `limit` bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return train(*args)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_last_checkpoint_stands(
    arguments: Arguments, tmp_path: Path
) -> None:
    given = ["--phase", "unet", *arguments]
    run, log = tmp_path / "run", tmp_path / "log"
    assert train(*given, "--out", run, "--stop-after", 4) == 0
    process = spawn(small_disk, 1_000_000, *given, "--out", run, log=log)
    process.join()
    assert process.exitcode == 1
    assert "Traceback" not in log.read_text()
    (said,) = [x for x in log.read_text().splitlines() if x.startswith("xlsd-train: ")]
    assert "File too large" in said
    assert "the newest checkpoint is" in said
    assert "step-00000004" in said
    assert not list((run / "checkpoints").glob(".*"))
    assert train(*given, "--out", run) == 0
    assert train(*given, "--out", tmp_path / "whole") == 0
    last = "checkpoints/step-00000010/*"
    assert files(run, last) == files(tmp_path / "whole", last)


def test_a_full_card_is_one_sentence(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "_start", full)
    assert train("--phase", "te", *arguments, "--out", tmp_path / "run") == 1
    assert (
        "out of memory with sliced by 1, and no memory plan takes less" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_fixed_noise_loss_falls_five_times_on_three_photos(
    photos: Path, vae: Path, model: Path, tmp_path: Path, open_run: Open
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("astronaut_face.jpg", "cat.png", "coffee.jpg"):
        for path in (photos / name, (photos / name).with_suffix(".txt")):
            (images / path.name).write_bytes(path.read_bytes())
    data, run = tmp_path / "latents", tmp_path / "run"
    build = ("--out", data, "--vae", vae, "--resolution", 64, "--buckets", "square")
    assert cache("build", images, *build) == 0
    steps = 450
    assert train(
        "--phase", "unet", "--batch", 3, "--data", data, "--model", model, "--steps", steps,
        "--out", run, "--lr", 1e-3, "--warmup", 20, "--sample-every", 0, "--save-every", steps,
        "--threads", 1,
    ) == 0  # fmt: skip

    def fixed_noise_loss(trained: Path) -> float:
        session = open_run(data=data, model=str(trained), batch=3, out=tmp_path / "measured")
        fixed = [session.source.make(session.batch_order.slot(10**6 + n)) for n in range(40)]
        with torch.no_grad():
            loss = torch.cat([session.take_step.loss(batch) for batch in fixed]).mean()
        session.run.close()
        shutil.rmtree(session.run.folder)
        return float(loss)

    before, after = fixed_noise_loss(model), fixed_noise_loss(run)
    assert after < before / 5, (before, after)
