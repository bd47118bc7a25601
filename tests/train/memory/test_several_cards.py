"""What several cards cost: the model of the link, and what `plan --cards --link` prints."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.demo.pipeline import make_networks
from benchmarks.lib.allocations import peak_of
from tests.support import printed, train
from tests.support.sessions import bare_step
from xlsd_train.config.run_options import PlanConfig
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory.footprint import Footprint
from xlsd_train.memory.gpus import CARDS, shown_cards
from xlsd_train.memory.planner import Planner
from xlsd_train.memory.several_cards import (
    LITTLE,
    Link,
    SharedStep,
    shared_step,
    smallest_batches,
    table,
    waiting_s,
)
from xlsd_train.step import sharing
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.sharing import Sharing

SIZE = (32, 32)


class Nothing:
    """A message to no one, which is there at once."""

    def wait(self) -> None:
        pass


@cache
def planner(processes: int) -> Planner:
    unet, text_encoder = make_networks("nano", 600)
    configs = unet.config, text_encoder.config.to_dict()
    config = TrainConfig(phase="unet").resolved()
    return Planner(config, *configs, workspaces=False, processes=processes)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small a part of the gradients as the usual ones are of SD1.5's."""
    monkeypatch.setattr(sharing, "MESSAGE", 4000)


def footprint_of(messages: tuple[tuple[int, int, int], ...]) -> Footprint:
    return replace(planner(1)._meta_step(MemoryPlan("plain", 1), 1, SIZE), messages=messages)


def test_a_ring_moves_each_byte_twice_less_what_stays() -> None:
    """Of N parts of a message, each card sends N-1 to sum them and N-1 to hand out the sums."""
    for cards in (2, 4, 8):
        rounds = 2 * (cards - 1)  # in each of which a card sends one part of N
        assert Link(cards, 10).seconds(8e9) == pytest.approx(rounds * (8e9 / cards) / 10e9)


def test_kernels_wait_for_what_is_not_there_when_they_need_it() -> None:
    """By hand: two cards and 1 GB/s, so as many seconds as GB."""
    each, gb = np.array([1.0, 2.0, 1.0, 3.0]), 10**9
    after = ((1, 0, 2 * gb), (2, 1, gb), (3, 0, 0), (3, 1, 0))
    # Sent at 1, there at 3; sent at 3, there at 4; both needed at 4.
    assert waiting_s(footprint_of(after), each, Link(2, 1)) == 0
    # Half as fast: there at 5 and at 7, so the last kernel starts 3 seconds late.
    assert waiting_s(footprint_of(after), each, Link(2, 0.5)) == 3
    # Layer by layer: the first is there at 5 and needed at 3; the second is sent then, there at 7.
    lagging = ((1, 0, 2 * gb), (2, 0, 0), (2, 1, gb), (3, 1, 0))
    assert waiting_s(footprint_of(lagging), each, Link(2, 0.5)) == 2 + 1


@pytest.mark.parametrize("way", ["cheap", "sliced", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_planned_messages_are_those_that_a_step_sends(way: Any) -> None:
    unet, text_encoder = make_networks("nano", 600)
    step = bare_step(TrainConfig(phase="unet").resolved(), MemoryPlan(way, 2), unet, text_encoder)
    sent: list[int] = []

    def send(flat: Any) -> Nothing:
        sent.append(flat.nbytes)
        return Nothing()

    step.backend.sharing = Sharing(send)
    step([drawn(2)], 0.0)
    found = planner(2)._meta_step(MemoryPlan(way, 2), 2, SIZE).messages
    assert [nbytes for _, _, nbytes in found if nbytes] == sent
    assert sum(sent) == planner(2).gradients_nbytes
    if way != "sliced":  # those but the first half are sent during the last backward pass
        update = planner(2)._meta_step(MemoryPlan(way, 2), 2, SIZE).update
        assert sum(kernel < update for kernel, _, nbytes in found if nbytes) > 0.9 * len(sent)
    waits = [number for _, number, nbytes in found if not nbytes]
    assert sorted(waits) == [*range(len(sent))]
    assert not planner(1)._meta_step(MemoryPlan(way, 2), 2, SIZE).messages


@pytest.mark.parametrize(
    "plan",
    [MemoryPlan("sliced", 1), pytest.param(MemoryPlan("cheap", 3), marks=pytest.mark.slow),
     pytest.param(MemoryPlan("plain", 2), marks=pytest.mark.slow),
     pytest.param(MemoryPlan("sliced", 2), marks=pytest.mark.slow)],
)  # fmt: skip
def test_memory_of_one_of_several_processes_is_the_allocators(plan: MemoryPlan) -> None:
    unet, text_encoder = make_networks("nano", 600)
    step = bare_step(TrainConfig(phase="unet").resolved(), plan, unet, text_encoder)
    step.backend.sharing = Sharing(lambda _: Nothing())
    found = planner(2).predict(plan, 6, SIZE)
    assert found.peak - found.items["batch"] == pytest.approx(peak_of(step, [drawn(6)]), rel=0.03)
    assert found.tflop == planner(1).predict(plan, 6, SIZE).tflop
    for card, seconds in found.seconds.items():
        assert seconds == pytest.approx(planner(1).predict(plan, 6, SIZE).seconds[card])


def drawn(count: int) -> Batch:
    latents = torch.randn((2, count, 4, *SIZE), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros((count, 77), dtype=torch.int64)
    return Batch(0, "", 0.0, 0, count, latents[0], latents[1], ids[:, 0].clone(), ids)


@pytest.mark.slow
def test_only_the_last_pass_hides_messages_and_a_faster_link_waits_less() -> None:
    plans = planner(4)
    slow, fast = 0.1, 1e4
    for plan in (MemoryPlan("plain", 2), MemoryPlan("sliced", 2)):
        one, many = (plans.predict(plan, batch, SIZE) for batch in (2, 8))
        waits = {
            (it.batch, rate): shared_step(plans, it, SIZE, Link(4, rate))["RTX 4090"]
            for it in (one, many)
            for rate in (slow, fast)
        }
        assert waits[8, fast].waiting < waits[8, slow].waiting < waits[8, slow].link
        if plan.way == "plain":  # four passes hide as much as one
            assert waits[2, slow].waiting == pytest.approx(waits[8, slow].waiting)
        assert waits[8, slow].cost < waits[2, slow].cost


def test_the_smallest_batch_is_the_first_that_waits_little() -> None:
    def step(batch: int) -> dict[str, SharedStep]:
        return {name: SharedStep(0.01 * batch, 1.0, 0.02) for name in CARDS}

    found = smallest_batches(step, 3)
    assert {*found} == {*CARDS}
    (batch,) = {*found.values()}
    assert step(batch)["H100"].cost < LITTLE <= step(batch - 1)["H100"].cost


@pytest.mark.slow
def test_plan_says_what_several_cards_cost(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("plan", "--phase", "unet", "--model", model, "--size", "128x128", "--batch", 8)
    assert train(*given, "--cards", 4, "--link", 0.5, "--json") == 0
    told = json.loads(printed(capsys))
    shared, plans = told["sharing"], told["plans"]
    assert (told["batch"], plans[0]["micro_batch"]) == (8, 2)
    assert shared["link_s"] == pytest.approx(1.5 * shared["gradients_gib"] * 2**30 / 0.5e9)
    assert [*shared["plans"]] == ["plain", "cheap", "feed-forward", "sliced"]
    for row in plans:
        for card, it in shared["plans"][row["way"]].items():
            alone = 2 / row["images_per_s"][card]
            assert it["step_s"] == pytest.approx(alone + it["waiting_s"])
            assert it["waiting_s"] == pytest.approx((1 - it["hidden"]) * shared["link_s"])
            assert it["images_per_s"] == pytest.approx(8 / it["step_s"])
            assert it["efficiency"] == pytest.approx(alone / it["step_s"])
    lines = table(shared).splitlines()
    assert lines[1].startswith("4 GPUs, 0.5 GB/s each way: sharing 0.00 GiB of gradients takes")
    shown = shown_cards()
    for name, line in zip(shown, lines[-len(shown) :], strict=True):
        it, words = shared["plans"][shared["chosen"]][name], line.removeprefix(name).split()
        assert words[-2:] == [f"{it['efficiency']:.0%}", str(shared["smallest_batch"][name])]
        assert words[-3] == f"{it['images_per_s']:.1f}"
        assert words[:4] == [f"{rows[name]['hidden']:.0%}" for rows in shared["plans"].values()]


def test_a_link_and_cards_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert PlanConfig(phase="unet").cards == 1
    for words, said in (
        (("--link", 5), "--link 5 does nothing with one card; add --cards"),
        (("--cards", 2), "--cards 2 needs --link, the GB/s between them; give e.g. --link 10"),
        (("--cards", 0), "--cards 0 is less than 1"),
        (("--cards", 2, "--link", 0), "--link 0 is not above 0"),
    ):
        assert train("plan", "--phase", "unet", *words) == 1
        assert said in capsys.readouterr().err
    assert train("plan", "--help") == 0
    helped = " ".join(capsys.readouterr().out.split())
    assert "--cards" in helped
    assert "bandwidth of each GPU to the others in GB/s each way" in helped
