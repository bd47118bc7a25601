"""The status as Prometheus metrics."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xlsd_cache.watching.status import STATES, Status

_GAUGES = {  # field of Status -> metric, help
    "generation": ("generation", "The store's newest generation, -1 before the first."),
    "waiting": ("waiting_images", "Images that are new, changed or removed and not taken over."),
    "unsettled": ("unsettled_images", "Images whose files may still be written."),
    "oldest_waiting_s": ("oldest_waiting_seconds", "How long the oldest change has been waiting."),
    "images_per_s": ("images_per_second", "Images encoded a second, in the newest generation."),
    "pass_s": ("pass_seconds", "What the last pass took."),
    "last_pass": ("last_pass_timestamp_seconds", "The end of the last pass that did not fail."),
    "failing_since": (
        "failing_since_timestamp_seconds",
        "The first failed pass; 0 if all is well.",
    ),
    "heartbeat": ("heartbeat_timestamp_seconds", "The last sign of life."),
    "started": ("start_timestamp_seconds", "The start of the watcher."),
}
_COUNTERS = {
    "passes": ("passes", "Looks at the sources since the start."),
    "failed_passes": ("failed_passes", "Passes that failed: a source was missing, a disk full."),
    "generations": ("generations", "Generations written since the start."),
    "encoded": ("encoded_images", "Images encoded or rejected since the start."),
}


class StatusCollector(Collector):
    """Makes metrics of the status as it is when they are asked for."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        now = self._status()
        for name, (metric, about) in _GAUGES.items():
            yield GaugeMetricFamily(f"xlsd_watch_{metric}", about, value=getattr(now, name) or 0)
        for name, (metric, about) in _COUNTERS.items():
            yield CounterMetricFamily(f"xlsd_watch_{metric}", about, value=getattr(now, name))
        states = GaugeMetricFamily("xlsd_watch_state", "1 for the state now.", labels=["state"])
        for state in STATES:
            states.add_metric([state], float(state == now.state))
        yield states
        about = "Images of the newest generation, by outcome; live ones have a latent."
        images = GaugeMetricFamily("xlsd_watch_images", about, labels=["outcome"])
        about = "Rejected images of the newest generation."
        rejected = GaugeMetricFamily("xlsd_watch_rejected_images", about, labels=["reason"])
        sums = now.sums or {}
        for outcome in ("scanned", "live", "duplicate", "pending"):
            images.add_metric([outcome], sums.get(outcome, 0))
        for reason, count in sums.get("rejected", {}).items():
            rejected.add_metric([reason], count)
        yield from (images, rejected)
        version = GaugeMetricFamily("xlsd_watch_info", "Its version.", labels=["version"])
        version.add_metric([now.version], 1)
        yield version


def registry(status: Callable[[], Status]) -> CollectorRegistry:
    """The status, and the process's memory and CPU time."""
    made = CollectorRegistry()
    made.register(StatusCollector(status))
    ProcessCollector(registry=made)
    return made


def exposition(made: CollectorRegistry) -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(made)
