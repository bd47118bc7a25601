"""How long the rest of a run takes: the pace of its steps, and the pauses that are due."""

from collections import deque
from collections.abc import Mapping
from typing import Any

FIRST = 2  # steps that are slower: they start what later ones reuse
WINDOW = 100  # latest steps, whose mean is the pace


class TimeLeft:
    """Times steps and pauses apart, so that no pause changes the pace."""

    def __init__(self, last: int, every: Mapping[str, int]) -> None:
        """`last` is the step that the run will end at; `every`: pause -> its interval in steps."""
        self._last, self._every = last, every
        self._pause_s: dict[str, float] = {}  # of the newest pause of each kind
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds, images of a step
        self._seen = 0
        self._images: int | None = None

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a step's metrics."""
        before, self._images = self._images, line["images_seen"]
        self._seen += 1
        if before is None:
            return
        if self._seen == FIRST + 1:
            self._recent.clear()
        images = line["images_seen"] - before
        self._recent.append((images / line["images_per_s"], images))

    def paused(self, what: str, seconds: float) -> None:
        """Take how long a pause was."""
        self._pause_s[what] = seconds

    @property
    def measured(self) -> tuple[int, float]:
        """The latest steps and their seconds; none before those that are slower are over."""
        if self._seen <= FIRST:
            return 0, 0.0
        return len(self._recent), sum(seconds for seconds, _ in self._recent)

    @property
    def images_per_s(self) -> float | None:
        """Of the latest steps, without pauses; None before the second step."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(images for _, images in self._recent) / seconds if self._recent else None

    def after(self, step: int) -> float | None:
        """Seconds from this step to the end, with the pauses due; None before the second step."""
        if step >= self._last:
            return 0.0
        if not self._recent:
            return None
        step_s = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        pauses = sum(
            seconds * (-(-self._last // self._every[what]) - step // self._every[what])
            for what, seconds in self._pause_s.items()
            if self._every.get(what)
        )
        return step_s * (self._last - step) + pauses
