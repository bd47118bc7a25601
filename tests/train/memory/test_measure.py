"""Measured plans: nothing of the run changes, a wrong prediction is corrected, and it is kept."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.demo.pipeline import make_networks
from tests.support import files, metrics, spawn, torchrun, train, wait_for
from tests.train.commands.test_sweep import Forked
from tests.train.step.test_memory_full import Refusing
from xlsd_train.commands import sweep
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory import measure, plan_cache, trials
from xlsd_train.memory.measure import Measuring, fastest, shortlist
from xlsd_train.memory.plan_cache import cache_file, key_of
from xlsd_train.memory.planner import GIB, Prediction
from xlsd_train.memory.trials import Job, Trial
from xlsd_train.step.backend import MemoryPlan

Words = tuple[object, ...]
CPU = torch.device("cpu")
SIZE = (8, 8)
PLAIN, SLOW, CHEAP = MemoryPlan("plain", 16), MemoryPlan("plain", 1), MemoryPlan("cheap", 16)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> Path:
    """A cache folder of the test's own."""
    caplog.set_level("INFO", "xlsd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@cache
def networks() -> tuple[Any, Any]:
    unet, text_encoder = make_networks("nano", 600)
    return dict(unet.config), text_encoder.config.to_dict()


def config_of(**options: Any) -> TrainConfig:
    return TrainConfig("unet", **{"remeasure": True, **options}).resolved()


def job(*plans: MemoryPlan, **options: Any) -> Job:
    return Job(config_of(**options), networks(), list(plans), 16, 1, SIZE, CPU, GIB, 1)


class Believing:
    """A planner that predicts these plans to be the fastest, in this order."""

    def __init__(self, *plans: MemoryPlan) -> None:
        self.found = [
            Prediction(plan, 16, {}, 1.0, 1.0, {"RTX 4090": float(n), "A100": -float(n)})
            for n, plan in enumerate(plans)
        ]

    def candidates(self, *_: object) -> list[Prediction]:
        return self.found


def measured(*plans: MemoryPlan, **options: Any) -> tuple[MemoryPlan | None, Measuring]:
    measuring = Measuring(config_of(**options), networks(), CPU, GIB)
    planner: Any = Believing(*plans)
    return measuring(planner, 16, SIZE), measuring


def states() -> list[Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 (the one that others may use)
    return [torch.get_rng_state().tolist(), random.getstate(), str(legacy[1].tolist()), legacy[2]]


def test_a_wrong_prediction_is_corrected_and_remembered(caplog: Any) -> None:
    networks()
    before = states(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    found, measuring = measured(SLOW, PLAIN)
    assert found == PLAIN
    assert [row["plan"] for row in measuring.rows] == [list(SLOW), list(PLAIN)]
    assert all(row["fits"] and row["images_per_s"] for row in measuring.rows)
    assert "; measured " in measuring.text()
    assert before == (
        states(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    )  # fmt: skip

    written = cache_file().stat().st_mtime_ns
    again, second = measured(remeasure=False)  # with no planner to ask
    assert again == PLAIN
    assert second.rows == measuring.rows
    assert "were measured before" in caplog.text
    assert cache_file().stat().st_mtime_ns == written
    assert measured(remeasure=False, optimizer="dlion")[0] is None  # a CPU is not measured unasked


def refusing(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Measure in this process, and let the memory of some plans be full."""

    def here(job: Job) -> Iterator[Trial]:
        for number, plan in enumerate(job.plans):
            with Refusing(900 if number in at else 0):
                yield from trials.trials(Job(**{**vars(job), "plans": [plan]}))

    monkeypatch.setattr(measure, "in_child", here)


def test_a_plan_that_does_not_fit_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    refusing(monkeypatch, 0)
    found, measuring = measured(PLAIN, SLOW)
    assert found == MemoryPlan("plain", 8)  # next to it, with one pass more
    assert [row["plan"][1] for row in measuring.rows] == [16, 8, 1]
    assert measuring.rows[0] == {
        "plan": list(PLAIN), "images_per_s": None, "of_peak": None, "peak_gib": None, "fits": False,
    }  # fmt: skip
    found, measuring = measured(PLAIN, SLOW, micro_batch=16)
    assert found == SLOW
    refusing(monkeypatch, 0)
    found, measuring = measured(SLOW)
    assert found is None
    assert measuring.text() == ""
    assert "the one predicted to be fastest" in caplog.text


def test_more_plans_are_tried_only_if_none_fits() -> None:
    plans, most = [MemoryPlan("plain", n) for n in range(16, 5, -1)], 2 * trials.MOST
    assert len(list(trials.trials(job(*plans)))) == trials.MOST

    class Full(Refusing):  # type: ignore[no-untyped-call]
        """Full in the first plans, whose steps end before they begin."""

        def _count(self, func: Any) -> None:
            if func.overloadpacket.__name__ == "embedding":  # the first kernel of a step
                self.count += 1
                if self.count <= self.at:
                    raise torch.OutOfMemoryError("CUDA out of memory")

    with Full(most):
        found = list(trials.trials(job(*plans, micro_batch=16)))
    assert [trial.plan for trial in found] == plans[: most + 1]
    assert [trial.seconds is not None for trial in found] == [False] * most + [True]
    with Full(4):
        found = list(trials.trials(job(PLAIN)))
    assert [trial.plan.micro_batch for trial in found] == [16, 8, 6, 4, 3]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that is allocated for later use."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "new_empty":
            self.elements = max(self.elements, out.numel())
        return out


def test_one_of_several_processes_has_messages_too() -> None:
    """All gradients of the smallest UNet fit into one message."""
    unet, _ = make_networks("nano", 600)
    elements = sum(parameter.numel() for parameter in unet.parameters())
    for processes in (1, 2):
        with Largest() as largest:  # type: ignore[no-untyped-call]
            (trial,) = trials.trials(replace(job(PLAIN), processes=processes))
        assert trial.seconds
        assert (largest.elements == elements) == (processes > 1)


def test_an_error_that_is_not_about_memory_ends_it_with_what_there_is(caplog: Any) -> None:
    broken = MemoryPlan("plain", 0)  # no range has such a step
    assert [trial.plan for trial in trials.in_child(job(CHEAP, broken, PLAIN))] == [CHEAP]
    assert "ended early: ValueError" in caplog.text


def test_the_order_has_the_best_of_each_attention_first() -> None:
    exact = [plan._replace(attention="exact") for plan in (PLAIN, CHEAP)]
    found = Believing(PLAIN, CHEAP, SLOW, *exact).found
    assert [x.plan for x in shortlist(found, None)] == [PLAIN, exact[0], CHEAP, SLOW, exact[1]]
    assert [x.plan for x in shortlist(found, "A100")][:2] == [exact[1], SLOW]
    sliced = [x.plan.micro_batch for x in shortlist(Believing(MemoryPlan("sliced", 4)).found, None)]
    assert sliced == [4, 2, 1]


def test_the_fastest_must_fit() -> None:
    rows: list[Any] = [
        {"plan": list(plan), "images_per_s": rate, "peak_gib": 1.0, "of_peak": None, "fits": fits}
        for plan, rate, fits in ((PLAIN, 9.0, False), (CHEAP, 4.0, True), (SLOW, 2.0, True))
    ]
    assert fastest(rows) == rows[1]
    assert fastest(rows[:1]) is None


def test_what_was_measured_is_of_one_card_shape_and_set_of_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(
        batch: int = 4, limit: float = 22.5, card: str = "a", processes: int = 1, **options: Any
    ) -> str:
        config = config_of(**options)
        return key_of(config, networks(), card, CPU, batch, processes, SIZE, limit * GIB)

    others = [
        key(batch=5), key(limit=21.9), key(card="b"), key(optimizer="adamw"), key(compile=True),
        key(precision="tf32"), key(deterministic=False), key(attention="sdpa"), key(accum=2),
        key(micro_batch=2), key(processes=2),
    ]  # fmt: skip
    monkeypatch.setattr(torch, "__version__", "9")
    others.append(key())
    monkeypatch.undo()
    assert len({key(), *others}) == 1 + len(others)
    assert key(lr=1e-6, seed=3, out=Path("x"), limit=22.9, accum=1) == key()
    assert key(processes=2) == key(processes=8)


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{", b'{"a": 3}', b'{"KEY": [{"plan": ["plain", 1]}]}', b"9" * 2**21,
])  # fmt: skip
def test_a_damaged_cache_is_no_error(content: bytes, caplog: Any) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(content)
    assert plan_cache.recall("KEY") == []
    assert f"ignoring {cache_file()}" in caplog.text
    plan_cache.remember("KEY", [])
    assert json.loads(cache_file().read_bytes()) == {"KEY": []}


@pytest.mark.parametrize("plan", [
    ["fast", 1, "sdpa", "resident"], ["plain", 0, "sdpa", "resident"], ["plain", 1],
    ["plain", 1, "x", "resident"], ["plain", 1, "sdpa", "x"],
])  # fmt: skip
def test_a_plan_that_is_none_is_not_taken(plan: list[Any]) -> None:
    row: Any = {"plan": plan, "images_per_s": 1, "of_peak": 1, "peak_gib": 1, "fits": True}
    good: Any = {**row, "plan": list(PLAIN)}
    plan_cache.remember("a", [good])
    plan_cache.remember("b", [good, row])
    assert plan_cache.recall("a") == [good]
    assert plan_cache.recall("b") == []


def test_the_cache_keeps_the_newest_and_may_be_unwritable(home: Path, caplog: Any) -> None:
    for number in range(plan_cache.MOST_ENTRIES + 5):
        plan_cache.remember(str(number), [])
    assert next(iter(json.loads(cache_file().read_text()))) == "5"
    cache_file().unlink()
    cache_file().parent.rmdir()
    cache_file().parent.write_text("mine")
    plan_cache.remember("a", [])
    assert "the next run measures" in caplog.text
    assert cache_file().parent.read_text() == "mine"


BASE = (
    "--phase", "unet", "--batch", 4, "--steps", 2, "--warmup", 0, "--sample-every", 1,
    "--sample-steps", 1, "--save-every", 1, "--device", "cpu", "--threads", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def given(model: Path, store: Path) -> Words:
    return (*BASE, "--model", model, "--data", store)


def kept(run: Path) -> dict[str, Any]:
    return {
        **files(run, "checkpoints/*/*.safetensors"), **files(run, "samples/**/*.png"),
        "metrics": metrics(run),
    }  # fmt: skip


def test_a_measured_run_is_that_of_its_flags_and_resumes_as_such(
    given: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = (*given, "--vram", 2), tmp_path / "run"
    assert train(*run, "--remeasure", "--dry-run", "--out", out) == 0
    assert "the run will measure the best plans first" in capsys.readouterr().err
    assert not cache_file().exists()

    assert train(*run, "--remeasure", "--out", out, "--stop-after", 1) == 0
    record, said = json.loads((out / "config.json").read_text()), capsys.readouterr().err
    plans, plan = [row["plan"] for row in record["measured"]], MemoryPlan(*record["plan"])
    assert {"sdpa", "exact"} == {attention for _, _, attention, _ in plans}
    assert record["plan"] in plans
    assert "; measured " in record["memory"]
    assert f"  * {plan}" in said
    assert " at the measured " in said
    assert record["tflop"] > 0
    assert f"the same plan again: {plan.flags()}" in said

    written, flags = cache_file().read_bytes(), plan.flags().split()
    cache_file().write_bytes(b"{}")  # a resume needs none
    other = "exact" if plan.attention == "sdpa" else "sdpa"
    for wrong in (("--attention", other), ("--memory", "sliced"), ("--micro-batch", 3)):
        assert train(*run, "--out", out, *wrong) == 1
        assert f"was started with {wrong[0]} " in capsys.readouterr().err
    assert train(*run, "--out", out, "--compile") == 1
    assert train(*run, "--out", out, "--remeasure", "--attention", "auto", "--stop-after", 1) == 0
    assert train(*given, "--out", out, *flags) == 0
    assert "measuring" not in capsys.readouterr().err
    assert cache_file().read_bytes() == b"{}"
    assert json.loads((out / "config.json").read_text()) == record

    cache_file().write_bytes(written)
    for name, options in {"cached": run, "flags": (*given, *flags)}.items():
        assert train(*options, "--out", tmp_path / name) == 0
        assert ("were measured before" in (said := capsys.readouterr().err)) == (name == "cached")
        assert "measuring the best" not in said
        assert kept(tmp_path / name) == kept(out)
    assert cache_file().read_bytes() == written


@pytest.mark.parametrize(
    "options", [("--no-measure",), ("--memory", "plain"), ("--batch", 3)], ids=str
)
def test_nothing_is_measured_that_is_not_to_be(
    given: Words, options: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --vram there is no limit to plan for."""
    monkeypatch.setattr(measure, "in_child", lambda _: pytest.fail("measured"))
    limit = () if "--batch" in options else ("--vram", 2)
    run = (*given, *limit, "--remeasure", *options, "--out", tmp_path / "run")
    assert train(*run, "--stop-after", 1, "--sample-every", 0) == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["measured"] == []
    assert record["plan"][2] == "sdpa"


def test_a_forced_resume_measures_again(given: Words, tmp_path: Path) -> None:
    """Its checkpoint has momentum, gradients it needs none."""
    run, out = (*given, "--vram", 2, "--remeasure"), tmp_path / "run"
    assert train(*run, "--out", out, "--stop-after", 1, "--memory", "sliced") == 0
    before = json.loads((out / "config.json").read_text())
    assert before["measured"] == []
    assert train(*run, "--out", out, "--force") == 0
    record = json.loads((out / "config.json").read_text())
    best = fastest(record["measured"])
    assert best
    assert best["plan"] == record["plan"] != before["plan"]
    assert record["changed"][0]["was"]["plan"] == before["plan"]
    state = json.loads((out / "checkpoints/step-00000002/state.json").read_text())
    assert state["plan"] == record["plan"][:3]


@pytest.mark.slow
def test_of_two_processes_one_measures_for_both(given: Words, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun(2, "xlsd_train", *given, "--vram", 2, "--remeasure", "--out", out)
    record = json.loads((out / "config.json").read_text())
    assert record["plan"] in [row["plan"] for row in record["measured"]]
    assert {row["plan"][1] for row in record["measured"]} <= {1, 2}  # of its share of 4
    assert len(json.loads(cache_file().read_text())) == 1
    assert len(metrics(out)) == 2


def test_the_plan_of_an_older_run_means_sdpa(given: Words, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(*given, "--out", out, "--stop-after", 1) == 0
    record = json.loads((out / "config.json").read_text())
    record["plan"] = record["plan"][:2]
    for name in ("attention", "momentum", "measure", "remeasure", "compile"):
        record["settings"].pop(name, None)
        record["config"].pop(name)
    del record["measured"]
    (out / "config.json").write_text(json.dumps(record))
    path = out / "checkpoints/step-00000001/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "plan": state["plan"][:2]}))
    assert train(*given, "--out", out, "--attention", "exact") == 1
    assert train(*given, "--out", out, "--attention", "sdpa", "--stop-after", 1) == 0
    assert train(*given, "--out", out) == 0
    state = json.loads((out / "checkpoints/step-00000002/state.json").read_text())
    assert state["plan"][:3] == ["plain", 4, "sdpa"]


def train_at(home: Path, *args: object) -> int:
    """`xlsd-train` with this cache folder, in a process that has not the test's environment."""
    os.environ["XDG_CACHE_HOME"] = str(home)
    return train(*args)


def test_a_sweep_measures_once(
    given: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = partial(train_at, tmp_path / "cache")
    monkeypatch.setattr(sweep, "start", lambda words: Forked(run, words))
    options = ("--vram", 2, "--remeasure", "--stop-after", 1, "--sample-every", 0)
    assert train("sweep", "--lr", "1e-5,2e-5", *given, *options, "--out", tmp_path / "runs") == 0
    first, second = (tmp_path / "runs" / f"lr-{rate}/config.json" for rate in ("1e-05", "2e-05"))
    said = (tmp_path / "runs.log").read_text()
    assert said.count("measuring the best") == said.count("were measured before") == 1
    record = json.loads(first.read_text())
    assert record["plan"] == json.loads(second.read_text())["plan"]

    again = ("sweep", "--lr", "1e-5,2e-5", *given, "--sample-every", 0, "--out", tmp_path / "runs")
    flags = MemoryPlan(*record["plan"]).flags().split()
    assert train(*again, "--stop-after", 2, *flags) == 0
    assert len(metrics(second.parent)) == 2
    assert train(*again, "--memory", "sliced") == 1
    assert "was started with --memory fastest (now sliced)" in capsys.readouterr().err


def test_a_run_killed_while_it_measures_leaves_nothing(given: Words, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    options = ("--vram", 2, "--remeasure", "--out", out)
    process = spawn(train_at, tmp_path / "cache", *given, *options, log=log)
    wait_for(lambda: log.exists() and "measuring the best" in log.read_text(), 120)
    running = psutil.Process(process.pid)
    wait_for(lambda: running.children() != [])
    (measuring,) = running.children()
    process.kill()
    process.join()
    assert not out.exists()
    assert not cache_file().exists()
    wait_for(lambda: not measuring.is_running() or measuring.status() == psutil.STATUS_ZOMBIE)
