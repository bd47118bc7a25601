"""A long stream through threads, a block at a time: in order, and never far ahead of its reader."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_blocks(
    function: Callable[[list[Item]], Result], items: Iterable[Item], size: int, workers: int
) -> Iterator[Result]:
    """`function` of each block of `size` items, in the items' order.

    Disks answer several questions at once, so threads pay even where Python runs one at a time.
    What is still waiting when the reader stops is cancelled.
    """
    stream = iter(items)
    queue: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while block := list(islice(stream, size)):
                queue.append(pool.submit(function, block))
                if len(queue) > 2 * workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for waiting in queue:
                waiting.cancel()
