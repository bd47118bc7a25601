"""Planned shards -> committed shards: threads decode ahead while others encode and one writes."""

import hashlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlsd_cache.console.progress import draws_bars, event, progress_bar, ticking
from xlsd_cache.encoding.encoder import Encoder
from xlsd_cache.files.inflate import BadSource
from xlsd_cache.files.uri import Stat, read_source, stat_source
from xlsd_cache.images.decode import Pixels, decode
from xlsd_cache.images.header import MAX_PIXELS, max_bytes, too_large
from xlsd_cache.images.sandbox import Sandbox, decoders
from xlsd_cache.outcomes import Rejected
from xlsd_cache.planning.units import PlannedUnits
from xlsd_cache.runtime.signals import StopSignal
from xlsd_cache.schema import PlanEntry
from xlsd_cache.store.commit import Claim, claim
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.shard import ShardRow
from xlsd_cache.store.view import StoreView
from xlsd_cache.vocabulary import Bucket

Decoded = tuple[str, Pixels | Rejected]  # content hash; pixels, or why there are none
Encoded = tuple[list[ShardRow], dict[int, NDArray[Any]]]  # rows; latents by slot
FLOAT16_MAX = 65504.0


class WriteOrder:
    """Batch n may be encoded once all but `calls` of the batches before it are written.

    Batches are written in order, so a kill costs at most the `calls` that are being encoded.
    """

    def __init__(self, calls: int) -> None:
        self._allowed = [time.perf_counter()] * calls  # when batch n was allowed to start
        self._changed, self._closed = Condition(), False

    def wait(self, n: int) -> float:
        """Wait until batch n may start; returns since when. Raises CancelledError after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or n < len(self._allowed))
            if self._closed:
                raise CancelledError
            return self._allowed[n]

    def written(self) -> None:
        """Report one more batch as written."""
        with self._changed:
            self._allowed.append(time.perf_counter())
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel all who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass
class EncodePipeline:
    """Encodes one process's shards, and measures the seconds that each stage takes."""

    store: StoreView
    encoder: Encoder
    units: PlannedUnits
    workers: int
    max_pixels: int = MAX_PIXELS  # of an image
    advance: Callable[[int], None] = lambda _: None  # called after each batch, with the images done
    wait_s: float = 0.0  # encoders idle, waiting for pixels
    encode_s: float = 0.0
    write_s: float = 0.0
    begun: float = 0.0  # by time.perf_counter
    done: int = 0  # images encoded or rejected
    seconds: float = 0.0  # wall clock
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> images
    rounding: list[float] = field(default_factory=list)  # std of float16's error / the latent's
    _timing: Lock = field(default_factory=Lock)

    def run(self, order: list[ShardId], stop: StopSignal, waits: bool = True) -> None:
        """Encode and commit units in order; by default, wait for those that others hold."""
        total, self.begun = self.units.count(order), time.perf_counter()
        with (
            progress_bar(desc="encoding", total=total, unit="image", smoothing=0.1) as bar,
            ticking(bar.refresh),
            ThreadPoolExecutor(self.workers) as readers,
            self.encoder.threads(spare=1) as encoders,  # the spare one prepares the next batch
        ):
            while order and not stop.asked:
                self._pass(order, readers, encoders, bar, stop)
                committed = self.store.manifest.committed()
                order = [unit for unit in order if unit not in committed]
                if not waits:
                    break
                if order and not stop.asked:  # held by other processes, which may be killed
                    waiting = f"waiting for {len(order)} shards of other processes"
                    bar.set_postfix_str(waiting, refresh=draws_bars())
                    time.sleep(0.2)
            bar.n = total if not order else bar.n
        self.seconds = time.perf_counter() - self.begun

    def _pass(
        self,
        order: list[ShardId],
        readers: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        bar: Any,
        stop: StopSignal,
    ) -> None:
        """Encode every unit that no other process holds; a few batches are decoded ahead."""
        calls, batch = self.encoder.calls, self.encoder.batch
        sandbox = decoders(self.workers, self.max_pixels)
        read = partial(_read_and_decode, sandbox, self.max_pixels)
        ahead = calls + max(1, 2 * self.workers // batch)
        held: list[Claim] = []
        queue: deque[tuple[Claim, list[Future[Decoded]], Future[Encoded], bool]] = deque()
        upcoming, order_of_writes = self._batches(order, held), WriteOrder(calls)
        number = itertools.count()
        try:
            while True:
                while not stop.asked and len(queue) < ahead and (batch_of := next(upcoming, None)):
                    taken, slots, last = batch_of
                    pixels = [
                        readers.submit(read, entry, entry["live"])
                        for entry in map(taken.entries.__getitem__, slots)
                    ]
                    encoded = encoders.submit(
                        self._encode, slots, pixels, order_of_writes, next(number)
                    )
                    queue.append((taken, pixels, encoded, last))
                if not queue:
                    return
                taken, pixels, encoded, last = queue.popleft()
                if stop.asked and encoded.cancel():  # not started, nor are those after it
                    return
                rows, latents = encoded.result()
                begun = time.perf_counter()
                taken.writer.append(rows, latents)
                order_of_writes.written()
                if last:
                    taken.finish()
                    held.remove(taken)
                self.write_s += time.perf_counter() - begun
                self._show(bar, rows)
        finally:
            order_of_writes.close()
            for _, pixels, encoded, _ in queue:
                encoded.cancel()
                for future in pixels:
                    future.cancel()
            for taken in held:
                taken.release()

    def _show(self, bar: Any, rows: list[ShardRow]) -> None:
        """Advance the bar by rows that are written, with what was rejected and the shares."""
        self.rejected.update(row.reason for row in rows if row.reason)
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
        rejected = f"rejected: {reasons}; " if reasons else ""
        bar.set_postfix_str(rejected + self.shares(), refresh=False)
        bar.update(len(rows))
        self.done += len(rows)
        self.advance(self.done)
        rate = self.done / (time.perf_counter() - self.begun)
        told = {"images_per_s": rate, "rejected": self.rejected}
        event("progress", images=self.done, total=bar.total, **told)

    def _batches(
        self, order: list[ShardId], held: list[Claim]
    ) -> Iterator[tuple[Claim, list[int], bool]]:
        """Claim units one by one; yields (claim, slots, whether it is the unit's last batch)."""
        for unit in order:
            taken = claim(self.store, unit, self.units.entries, self.encoder.batch)
            if taken is None:
                continue
            held.append(taken)
            remaining = taken.writer.remaining
            for i, slots in enumerate(remaining):
                yield taken, list(slots), i == len(remaining) - 1
            if not remaining:  # a killed process wrote all of them
                yield taken, [], True

    def _encode(
        self, slots: list[int], futures: list[Future[Decoded]], order: WriteOrder, number: int
    ) -> Encoded:
        """Encode one batch in an encoder thread, once its pixels and the write order allow."""
        decoded = dict(zip(slots, (future.result() for future in futures), strict=True))
        pixels = {s: image for s, (_, image) in decoded.items() if not isinstance(image, Rejected)}
        refused = {s: image for s, (_, image) in decoded.items() if isinstance(image, Rejected)}
        stacked = np.stack(list(pixels.values())) if pixels else None
        ready = time.perf_counter()
        allowed = order.wait(number)
        begun = time.perf_counter()
        latents: dict[int, NDArray[Any]] = {}
        if stacked is not None:
            for slot, latent in zip(pixels, self.encoder.encode(stacked), strict=True):
                stored = self._stored(latent)
                if isinstance(stored, Rejected):
                    refused[slot] = stored
                else:
                    latents[slot] = stored
        with self._timing:
            self.wait_s += max(0.0, ready - allowed)
            self.encode_s += time.perf_counter() - begun
        rows = []
        for slot, (content_hash, _) in decoded.items():
            why = refused.get(slot)
            reason, detail = (why.reason, why.detail) if why else ("", "")
            rows.append(ShardRow(slot, content_hash, reason=reason, detail=detail))
        return rows, latents

    def _stored(self, latent: NDArray[np.float32]) -> NDArray[Any] | Rejected:
        """The latent in the store's dtype, or why it cannot be kept."""
        if not np.isfinite(latent).all():
            return Rejected("non_finite", "the VAE gave NaN or infinity")
        if self.store.identity.dtype == "float32":
            return latent
        if np.abs(latent).max() > FLOAT16_MAX:
            return Rejected("overflow", f"{np.abs(latent).max():.0f} is beyond float16")
        stored = latent.astype(np.float16)
        spread = float(latent.std()) or 1.0
        self.rounding.append(float((stored - latent).std()) / spread)
        return stored

    def shares(self) -> str:
        """Share of the time of each stage, the largest first."""
        calls = self.encoder.calls
        parts = {
            "encode": self.encode_s / calls,
            "wait for decode": self.wait_s / calls,
            "write": self.write_s,
        }
        total = sum(parts.values()) or 1.0
        ranked = sorted(parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked)


def _read_and_decode(sandbox: Sandbox, max_pixels: int, entry: PlanEntry, live: bool) -> Decoded:
    """Read and decode a planned image; Rejected if it changed since the scan."""
    if not live:
        return "", Rejected("removed", "removed or changed after it was planned")
    upright = entry["width"], entry["height"]
    left, top, right, bottom = entry["crop"]
    crop = left, top, right, bottom
    if why := too_large(*upright, max_pixels):  # planned under another limit
        return "", why
    try:
        before = stat_source(entry["source"])
        data = _read(entry["source"], max_bytes(max_pixels))
        now = stat_source(entry["source"])
    except FileNotFoundError:
        return "", Rejected("vanished", "gone between the scan and its reading")
    except OSError as error:
        return "", Rejected("unreadable", error.strerror or str(error))
    changed = Rejected("changed", "changed between the scan and its reading")
    if before != now or now[:2] != (entry["size"], entry["mtime_ns"]):
        return "", changed
    if isinstance(data, Rejected):
        return "", data
    content = hashlib.sha256(data).hexdigest()
    if len(data) != entry["size"] or entry["content_hash"] not in ("", content):
        return "", changed
    pixels = sandbox.call(decode, data, upright, crop, Bucket.parse(entry["bucket"]), max_pixels)
    # A file that was replaced by one of equal size in bytes and pixels is encoded: its own hash is
    # recorded. If it fails to decode, that is not the scanned file's fault.
    if isinstance(pixels, Rejected) and not _is_scanned(entry, now):
        return content, changed
    return content, pixels


def _is_scanned(entry: PlanEntry, now: Stat) -> bool:
    """Whether the file is the one that was scanned; older logs have no inode to compare."""
    logged = entry["inode"], entry["ctime_ns"]
    return None in logged or logged == (now.inode, now.ctime_ns)


def _read(source: str, most: int) -> bytes | Rejected:
    """The image's bytes, or why it is rejected. Raises OSError."""
    try:
        return read_source(source, most)
    except BadSource as error:
        return Rejected(error.reason, str(error))
