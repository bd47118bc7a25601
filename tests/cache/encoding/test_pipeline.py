import random
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Lock

import pytest

from xlsd_cache.encoding.pipeline import WriteOrder


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_no_more_calls_than_that_are_begun_and_not_written(calls: int) -> None:
    """However they overtake: it is what a kill costs."""
    order, lock, begun, most = WriteOrder(calls), Lock(), 0, 0
    pause = random.Random(calls)

    def call(n: int) -> int:
        nonlocal begun
        order.wait(n)
        with lock:
            begun += 1
        time.sleep(pause.uniform(0, 0.005))
        return n

    with ThreadPoolExecutor(calls + 1) as pool:
        futures = [pool.submit(call, n) for n in range(60)]
        for written, future in enumerate(futures):
            future.result()
            with lock:
                most = max(most, begun - written)
            order.written()
    assert begun == 60
    assert most == calls


def test_closing_frees_whoever_waits() -> None:
    order = WriteOrder(1)
    order.wait(0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(order.wait, 1)
        order.close()
        with pytest.raises(CancelledError):
            waiting.result(timeout=10)
