"""Maps a function over blocks of a long stream with threads: in order, with bounded look-ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_blocks(
    function: Callable[[list[Item]], Result], items: Iterable[Item], size: int, workers: int
) -> Iterator[Result]:
    """Yield `function(block)` for each block of `size` items, in order.

    Disks serve several requests at once, so threads help in spite of Python's lock. Blocks that
    have not started when the caller stops are cancelled.
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
