"""State in CPU memory gives the bits of resident state, in whatever order a GPU does its work."""

import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import xlsd_train.optim.lion
from benchmarks.demo.pipeline import make_networks
from tests.support import files, spawn, train, wait_for
from tests.support.sessions import Open, bare_step, slow_train
from xlsd_cache.errors import UserError
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.choose import memory_limit
from xlsd_train.memory.planner import GIB, Planner
from xlsd_train.optim.factory import finish, numbers, settle
from xlsd_train.optim.lion import DLion, Lion
from xlsd_train.optim.streamed import BUFFERS, Streamed, Streams
from xlsd_train.step.backend import MemoryPlan, Way
from xlsd_train.step.step import Step

STEPS = 20


class Counting(Streams):
    """Counts the chunks that are fetched while a step waits for them, and all of them."""

    def __init__(self) -> None:
        self.marks = self.fetched = self.stored = 0

    def copy(self, way: str, pairs: Any, after: Any) -> Any:
        self.fetched += way == "in"
        self.stored += way == "out"
        return super().copy(way, pairs, after)


def drawn_batch(step: int, count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn((2, count, 4, 8, 8), generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    ids = torch.randint(0, 600, (count, 77), generator=generator)
    return Batch(0, "", 0.0, 0, count, latents, noise, timesteps, ids)


def made(optimizer: Any, plan: MemoryPlan) -> Step:
    config = TrainConfig(phase="both", optimizer=optimizer, weight_decay=0.01).resolved()
    unet, text_encoder = make_networks("nano", 600)
    unet.to(memory_format=torch.channels_last)  # some weights are not contiguous
    return bare_step(config, plan, unet, text_encoder)


def assert_equal(ours: Step, theirs: Step) -> None:
    settle(ours.optimizer)
    assert numbers(ours.optimizer) == numbers(theirs.optimizer)
    for mine, its in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(mine, its)
        assert ours.optimizer.state[mine].keys() == theirs.optimizer.state[its].keys()
        for key, value in theirs.optimizer.state[its].items():
            assert torch.equal(ours.optimizer.state[mine][key], value), key
            assert ours.optimizer.state[mine][key].stride() == value.stride()


CI = {("cheap", "lion"), ("sliced", "dlion")}


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [
        pytest.param(way, kind, marks=() if (way, kind) in CI else pytest.mark.slow)
        for way in get_args(Way)
        for kind in ("lion", "dlion")
    ],
)
def test_twenty_steps_are_equal_to_the_bit(
    way: Way, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 20_000)  # many chunks
    resident, streamed = (
        made(optimizer, MemoryPlan(way, 2, momentum=where)) for where in ("resident", "streamed")
    )
    kind: Any = streamed.optimizer
    first = [p.clone() for p in streamed.parameters]
    counted = kind.streamed._streams = Counting()
    ahead = []
    for step in range(STEPS):
        before = counted.fetched
        rate = (1.0 if optimizer == "dlion" else 1e-3) * (step + 1) / STEPS
        for each in (resident, streamed):
            each([drawn_batch(step)], rate)
        ahead.append((counted.fetched - before, len(kind.streamed._ahead)))
    assert_equal(streamed, resident)
    assert not any(torch.equal(a, b) for a, b in zip(first, streamed.parameters, strict=True))
    chunks, waiting = ahead[-1]
    assert chunks > 10 * BUFFERS
    assert waiting == BUFFERS, "the first chunks of the next step were not fetched ahead"
    # In the first step nothing is known, and in no later step anything is fetched twice.
    assert [count for count, _ in ahead] == [chunks, chunks + BUFFERS, *[chunks] * (STEPS - 2)]
    assert counted.stored == STEPS * chunks


@pytest.mark.parametrize("kind", [Lion, DLion])
def test_a_change_of_the_order_or_of_the_chunks_changes_no_bit(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out and the sliced way follows, with layers in other groups."""
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(shape, generator=generator) for shape in [(3, 5), (40,), (7,), (2, 2)] * 3
    ]
    worlds = []
    for streams in (None, Streams()):
        given = [Parameter(value.clone()) for value in values]
        optimizer = kind(given, lr=1e-3)
        if streams:
            optimizer.stream(streams)
        worlds.append((given, optimizer))
    shuffle = random.Random(0)
    for step in range(40):
        parts = [list(range(len(values)))]
        if step % 3:
            shuffle.shuffle(parts[0])
            at = sorted(shuffle.sample(range(len(values)), 3))
            parts = [parts[0][a:b] for a, b in zip([0, *at], [*at, None], strict=True)]
        monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", shuffle.choice([1, 50, 2**24]))
        for given, optimizer in worlds:
            for part in parts:
                for i in part:
                    given[i].grad = values[i] * (i + step % 5 - 2)
                optimizer.step()
                optimizer.zero_grad()
            finish(optimizer)
    (mine, ours), (its, theirs) = worlds[1], worlds[0]
    ours.settle()
    for a, b in zip(mine, its, strict=True):
        assert torch.equal(a, b)
        for key, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][key], value)


class Event:
    done = False


class Device(Streams):
    """Does its work late, in any order that the streams and the events allow, drawn at random.

    Kernels are put into `kernels` by the test; `ignored` drops one kind of wait.
    """

    def __init__(self, seed: int, ignored: str = "") -> None:
        self.random, self.ignored = random.Random(seed), ignored
        self.eager = self.random.choice([0, 1, 3, 30])  # work that is done while the host goes on
        self.queues: dict[str, deque[tuple[str, Any]]] = {
            name: deque() for name in ("kernels", "in", "out")
        }

    def kernel(self, work: Callable[[], object]) -> None:
        self.queues["kernels"].append(("do", work))
        self.go_on(self.random.randint(0, self.eager))

    def mark(self) -> Event:
        return self._record("kernels")

    def copy(self, way: str, pairs: Sequence[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Event:
        events = list(after)
        if self.ignored == "until the buffer is free" and way == "in":
            events = events[1:]
        if self.ignored == "until the host has it" and way == "in":
            events = events[:1]
        if self.ignored == "until it is updated" and way == "out":
            events = []
        self.queues[way] += [("wait", event) for event in events]
        for target, source in pairs:
            self.queues[way].append(("do", partial(target.copy_, source)))
        self.go_on(self.random.randint(0, self.eager))
        return self._record(way)

    def hold(self, event: Event) -> None:
        if self.ignored != "until it is fetched":
            self.queues["kernels"].append(("wait", event))

    def finish(self) -> None:
        while self.queues["in"] or self.queues["out"]:
            assert self.go_on(1), "each waits for another"

    def _record(self, name: str) -> Event:
        event = Event()
        self.queues[name].append(("record", event))
        return event

    def go_on(self, count: int) -> bool:
        """Do up to `count` pieces of work; whether there was any."""
        for _ in range(count):
            heads = [q for q in self.queues.values() if q and (q[0][0] != "wait" or q[0][1].done)]
            if not heads:
                return False
            what, it = self.random.choice(heads).popleft()
            if what == "do":
                it()
            elif what == "record":
                it.done = True
        return True


SIZES = (130, 3, 128, 60, 1, 7, 200, 9)
# Chunks as the ways of the memory plan give them: all in order, and layers in reverse.
ORDERS = [
    [[0, 1], [2], [3, 4], [5], [6, 7]],
    [[6], [7], [5], [4, 3], [0], [1, 2]],
    [[0, 1, 2], [5, 6, 7]],
    [[0]],
]


def update(value: Tensor, number: int) -> None:
    value.mul_(3).add_(number).fmod_(997)


def trained_right(seed: int, ignored: str = "") -> bool:
    """Whether streamed state ends as the updates say, read and replaced by the host in between."""
    device, draw = Device(seed, ignored), random.Random(seed)
    given = [torch.zeros(size) for size in SIZES]
    streamed = Streamed(given, ("m", "s"), 2 * 3 * 256, device)
    expected = [torch.zeros(size) for size in SIZES]
    right = True
    for step in range(25):
        for chunk in ORDERS[draw.choices(range(4), [9, 9, 1, 1])[0]]:
            with streamed.of([given[i] for i in chunk]) as states:
                for i, state in zip(chunk, states, strict=True):
                    for value in state.values():
                        device.kernel(partial(update, value, i + step))
            for i in chunk:
                update(expected[i], i + step)
        if draw.random() < 0.1:
            streamed.settle()
            right &= all(map(torch.equal, (streamed.host[p]["m"] for p in given), expected))
            for p, value in zip(given, expected, strict=True):
                value.fill_(step)
                for host in streamed.host[p].values():
                    host.fill_(step)
    streamed.settle()
    for p, value in zip(given, expected, strict=True):
        right &= all(torch.equal(host, value) for host in streamed.host[p].values())
    return right


def test_state_is_right_in_every_order_that_the_events_allow() -> None:
    assert all(trained_right(seed) for seed in range(150))


@pytest.mark.parametrize(
    "ignored",
    [
        "until the buffer is free", "until the host has it", "until it is updated",
        "until it is fetched",
    ],
)  # fmt: skip
def test_every_wait_is_needed(ignored: str) -> None:
    assert not all(trained_right(seed, ignored) for seed in range(150))


@pytest.mark.parametrize(
    ("phase", "optimizer"),
    [("te", "dlion"), pytest.param("unet", "lion", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_with_the_state_here_and_there(
    arguments: list[object], tmp_path: Path, phase: str, optimizer: str
) -> None:
    """Checkpoints equal those of an uninterrupted resident run to the byte."""
    given = [*arguments[2:-2], "--phase", phase, "--optimizer", optimizer, "--ema"]
    given[given.index("--steps") + 1] = 8
    if optimizer == "dlion":
        given[given.index("--lr") + 1] = 1.0
    whole, run, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert train(*given, "--out", whole) == 0
    for goal, momentum in ((3, "streamed"), (5, "resident"), (7, "streamed")):
        words = *given, "--out", run, "--momentum", momentum
        process = spawn(slow_train, *words, log=log)
        wait_for(partial(reached, run, goal))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    process = spawn(train, *given, "--out", run, log=log)  # as it was started: streamed
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert files(run, "checkpoints/*/*") == files(whole, "checkpoints/*/*")
    assert "streamed momentum" in (run / "config.json").read_text()
    assert "streamed momentum" not in (whole / "config.json").read_text()


def reached(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= step


def test_a_small_card_streams_where_the_cpu_has_room(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the tightest resident plan needs; CPU memory is asked before the start."""
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 20_000)
    model = open_run(out=None, dry_run=True).model
    configs = model.unet.config, model.text_encoder.config.to_dict()
    planner = Planner(TrainConfig(phase="unet").resolved(), *configs)
    needed = planner.predict(MemoryPlan("sliced", 1), 4, (16, 16)).peak
    vram = 1 + (needed - 1) / GIB
    assert memory_limit(vram) == pytest.approx(needed - 1, abs=1)

    session = open_run(vram=vram)
    plan = session.take_step.plan
    assert plan.momentum == "streamed"
    assert isinstance(session.take_step.optimizer, Lion)
    assert session.take_step.optimizer.streamed is not None
    session.run.close()

    full = SimpleNamespace(available=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: full)
    short = r"streamed momentum takes .* GiB of CPU memory, and 0.00 GiB are free.*--momentum resid"
    with pytest.raises(UserError, match="does not fit into"):  # nothing is streamed unasked
        open_run(vram=vram, out=None)
    with pytest.raises(UserError, match=short):
        open_run(vram=vram, momentum="streamed", out=None)
    with pytest.raises(UserError, match=short):
        open_run()  # resumes
    assert open_run(momentum="resident").take_step.plan == plan._replace(momentum="resident")
