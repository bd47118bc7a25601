"""How long processes wait for each other's gradients after the backward pass.

Two processes on this machine take the same steps, with gradients shared during the backward pass
and one message after another once it has ended. Both send the same messages. The process that waits
less is the later one, which waits for messages only; the other one also waits for it.

python benchmarks/train/sharing.py
"""

import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from anywhere, uninstalled

from benchmarks.demo.pipeline import Size
from benchmarks.lib.machine import machine
from benchmarks.lib.real_step import drawn_batch, model_of, step_of
from benchmarks.lib.report import JsonOption, Report, run_script
from xlsd_train.config.train import TrainConfig
from xlsd_train.step import sharing
from xlsd_train.step.backend import MemoryPlan, Way
from xlsd_train.step.sharing import Sharing

Order = Literal["after", "during"]


@dataclass(frozen=True)
class SharingBenchmark(JsonOption):
    """Take steps in two processes, in turns with either order."""

    size: Size = "keys"
    """The networks' size."""

    way: tuple[Way, ...] = ("plain", "sliced")
    """How a batch passes."""

    batch: int = 2
    """Images of each process."""

    resolution: int = 256
    """Side of the images in pixels."""

    steps: int = 9
    """Timed steps of each order, after a first one."""

    message: int = 2**18
    """Elements of a message: about as small a part of all as the usual ones are of SD1.5's."""


class Timed(Sharing):
    """Notes how long the sums are waited for."""

    def __init__(self, order: Order) -> None:
        super().__init__(self._sum)
        self._now = order == "after"
        self.waited = 0.0

    def _sum(self, flat: Tensor) -> Any:
        return distributed.all_reduce(flat, async_op=True)

    def backward(self, loss: Tensor, parameters: Sequence[Parameter], last: bool) -> None:
        """With or without sending what is complete."""
        super().backward(loss, parameters, last and not self._now)

    def start(self, parameters: Sequence[Parameter]) -> bool:
        """Without overlap each message is waited for at once."""
        if not self._now:
            return super().start(parameters)
        for message in self._unsent(parameters):
            self._start(message)
            begun = time.perf_counter()
            self._sent[message[0]][1].wait()
            self.waited += time.perf_counter() - begun
        return False

    def wait(self, parameters: Sequence[Parameter]) -> None:
        """The same, timed."""
        begun = time.perf_counter()
        super().wait(parameters)
        self.waited += time.perf_counter() - begun


def main(config: SharingBenchmark, arguments: Sequence[str]) -> None:
    """Print the table."""
    report = Report("benchmarks/train/sharing.py", arguments, machine("torch"))
    report.fact("processes", "two, one thread each, gloo over loopback; they share these cores")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    both = [context.Process(target=measure, args=(rank, port, config, queue)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        if process.exitcode:
            sys.exit(f"a process ended with code {process.exitcode}")
    rows = sorted((queue.get() for _ in range(4 * len(config.way))), key=lambda row: row["place"])
    report.fact("gradients", f"{rows[0].pop('mib'):.1f} MiB")
    print(f"{'':8}{'shared':>8}{'process':>9}{'step s':>9}{'waiting s':>11}{'of the step':>13}")
    for row in rows:
        row.pop("place"), row.pop("mib", None)
        report.add("sharing", **row)
        print(
            f"{row['way']:8}{row['order']:>8}{row['process']:9}{row['step_s']:9.3f}"
            f"{row['waiting_s']:11.3f}{row['waiting_s'] / row['step_s']:13.1%}"
        )
    report.write(config.json)


def measure(rank: int, port: int, config: SharingBenchmark, queue: Any) -> None:
    """In one of the two processes: medians of both orders, which take turns."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    sharing.MESSAGE = config.message
    model = model_of(config.size)
    plan = MemoryPlan("plain", config.batch)
    step = step_of(model, TrainConfig(phase="unet").resolved(), plan, "cpu")
    torch.set_num_threads(1)  # after accelerate, which sets its own number
    batch = drawn_batch(model, config.batch, (config.resolution // 8,) * 2, "cpu")
    orders: tuple[Order, ...] = ("after", "during")
    for place, way in enumerate(config.way):
        step.plan = plan._replace(way=way, micro_batch=1 if way == "sliced" else config.batch)
        found: dict[Order, list[tuple[float, float]]] = {order: [] for order in orders}
        for order in orders * (config.steps + 1):
            step.backend.sharing = timed = Timed(order)
            distributed.barrier()
            begun = time.perf_counter()
            step([batch], 0.0)
            found[order].append((time.perf_counter() - begun, timed.waited))
        for n, (order, times) in enumerate(found.items()):
            seconds, waited = map(statistics.median, zip(*times[1:], strict=True))
            queue.put({
                "way": way, "order": order, "process": rank, "step_s": seconds,
                "waiting_s": waited, "place": (place, n, rank),
                "mib": sum(p.nbytes for p in step.parameters) / 2**20,
            })  # fmt: skip
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main, SharingBenchmark, __doc__)
