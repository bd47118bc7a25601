"""What sharing gradients costs a step on several GPUs of one machine.

By a model: a message is sent when the backward pass has completed it and the link is free, and a
ring all-reduce moves 2(N-1)/N of its bytes into and out of each of N GPUs. Kernels take as long as
alone at 100% of the peak, so a real GPU hides more: its step is longer, and the messages are not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlsd_train.memory.footprint import Footprint
from xlsd_train.memory.gpus import CARDS, shown_cards
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, Planner, Prediction, last
from xlsd_train.step.backend import Way

LITTLE = 0.05  # of a step: what sharing should cost at most


@dataclass(frozen=True)
class Link:
    """What connects the GPUs."""

    cards: int
    gb_per_s: float  # into each GPU, and as much out of it

    def seconds(self, nbytes: float) -> float:
        """Time to sum so many bytes over the GPUs."""
        return 2 * (self.cards - 1) / self.cards * nbytes / (self.gb_per_s * 1e9)


@dataclass(frozen=True)
class SharedStep:
    """Seconds of a step on one of several GPUs."""

    alone: float  # without sharing
    link: float  # that messages take
    waiting: float  # for messages: the rest of them is hidden by the backward pass

    @property
    def cost(self) -> float:
        """Share of the step that waits."""
        return self.waiting / (self.alone + self.waiting)

    def json(self, batch: int) -> dict[str, float]:
        """For a batch of so many images over all GPUs."""
        return {
            "step_s": self.alone + self.waiting,
            "waiting_s": self.waiting,
            "hidden": 1 - self.waiting / self.link,
            "images_per_s": batch / (self.alone + self.waiting),
            "efficiency": 1 - self.cost,
        }


def shared_step(planner: Planner, it: Prediction, size: Size, link: Link) -> dict[str, SharedStep]:
    """By GPU, the step of a prediction that was made for several processes."""
    footprint = planner.last_pass(it, size)  # the only one in which messages are sent
    sending = link.seconds(sum(nbytes for _, _, nbytes in footprint.messages))
    found = {}
    for name, card in CARDS.items():
        waiting = waiting_s(footprint, planner.kernel_seconds(footprint, card), link)
        found[name] = SharedStep(it.seconds[name], sending, waiting)
    return found


def waiting_s(footprint: Footprint, each: NDArray[np.float64], link: Link) -> float:
    """Seconds for which kernels, that take `each` seconds, wait for messages."""
    reached = np.concatenate([[0.0], np.cumsum(each)])  # when a kernel starts if none waits
    waited = free = 0.0  # free: when the link is
    arrived: list[float] = []
    for kernel, number, nbytes in footprint.messages:
        now = float(reached[kernel]) + waited
        if nbytes:
            free = max(free, now) + link.seconds(nbytes)
            arrived.append(free)
        else:
            waited += max(0.0, arrived[number] - now)
    return waited


def smallest_batches(step: Callable[[int], Mapping[str, SharedStep]], start: int) -> dict[str, int]:
    """By GPU, the smallest batch of each GPU for which sharing costs less than LITTLE."""
    known = cache(step)

    def smallest(name: str) -> int:
        return 1 + last(lambda count: known(count)[name].cost >= LITTLE, start=start)

    return {name: smallest(name) for name in CARDS}


def several_cards(
    planner: Planner, plans: Sequence[Prediction], chosen: Prediction, most: Mapping[Way, int],
    size: Size, link: Link, batch: int,
) -> dict[str, Any]:  # fmt: skip
    """Times of all plans, and the smallest batches for the way of the chosen one, as JSON.

    `batch` is that of all GPUs, and `most` the most samples in one pass of each way.
    """

    def step(count: int) -> dict[str, SharedStep]:
        plan = chosen.plan
        if plan.way != "sliced":
            passes = ceil(count / most[plan.way])
            plan = plan._replace(micro_batch=ceil(count / passes))
        return shared_step(planner, planner.predict(plan, count, size), size, link)

    steps = {it.plan.way: shared_step(planner, it, size, link) for it in plans}
    steps[chosen.plan.way] = shared_step(planner, chosen, size, link)
    example = next(iter(steps[chosen.plan.way].values()))
    return {
        "cards": link.cards,
        "link_gb_per_s": link.gb_per_s,
        "gradients_gib": planner.gradients_nbytes / GIB,
        "link_s": example.link,
        "chosen": chosen.plan.way,
        "plans": {
            way: {name: it.json(batch) for name, it in found.items()}
            for way, found in steps.items()
        },
        "smallest_batch": smallest_batches(step, start=chosen.batch),
    }


def table(told: dict[str, Any]) -> str:
    """What `several_cards` found, as text: a line for each GPU that tables show."""
    way, ways = told["chosen"], told["plans"]
    said = (
        f"\n{told['cards']} GPUs, {told['link_gb_per_s']:g} GB/s each way: sharing "
        f"{told['gradients_gib']:.2f} GiB of gradients takes {told['link_s']:.3f} s a step\n"
        f"Hidden under the backward pass by each plan. For {way}: times, images/s of all GPUs at "
        f"100% of each,\nand the smallest batch per GPU with which waiting costs less than "
        f"{LITTLE:.0%} of a step\n"
    )
    columns = "".join(f"{x:>13}" for x in ways)
    lines = [said, f"{'':18}{columns}   step s   waiting s  images/s  efficiency  batch per GPU"]
    for name in shown_cards():
        smallest = told["smallest_batch"][name]
        it = ways[way][name]
        hidden = "".join(f"{found[name]['hidden']:13.0%}" for found in ways.values())
        lines.append(
            f"{name:18}{hidden}{it['step_s']:9.3f}{it['waiting_s']:12.3f}"
            f"{it['images_per_s']:10.1f}{it['efficiency']:12.0%}{smallest:15}"
        )
    return "\n".join(lines)
