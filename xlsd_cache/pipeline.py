"""Planned units -> committed shards: threads decode ahead while the VAE encodes, each timed."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from xlsd_cache.commit import Claim, claim
from xlsd_cache.decode import Pixels, Rejected, decode
from xlsd_cache.encode import Encoder
from xlsd_cache.identity import bucket_shape
from xlsd_cache.interrupt import StopSignal
from xlsd_cache.locate import read_source, stat_source
from xlsd_cache.manifest import Manifest, Unit
from xlsd_cache.plan import Entry
from xlsd_cache.shard import Row

Decoded = tuple[str, Pixels | Rejected]  # content hash, and pixels or a reason
Todo = dict[Unit, dict[int, Entry]]  # the planned rows of each unit, by slot
FLOAT16_MAX = 65504.0


@dataclass
class Work:
    """What one process encodes, with what, and how long each station kept it."""

    manifest: Manifest
    encoder: Encoder
    live: Mapping[str, Entry]  # key -> entry: a planned row may be overtaken by a later change
    rows_per_shard: int
    dtype: str
    batch: int
    workers: int
    wait_s: float = 0.0  # for decoding: not the time decoding takes, but what it delays
    encode_s: float = 0.0
    write_s: float = 0.0
    rounding: list[float] = field(default_factory=list)  # of float16, relative to the spread

    def run(self, todo: Todo, order: list[Unit], stop: StopSignal) -> None:
        """Encode and commit the units in this order, waiting at the end for those others hold."""
        total = sum(len(entries) for entries in todo.values())
        with (
            tqdm(desc="encoding", total=total, unit="image", smoothing=0.1) as bar,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            while order and not stop.asked:
                self._pass(todo, order, pool, bar, stop)
                committed = self.manifest.committed()
                order = [unit for unit in order if unit not in committed]
                if order and not stop.asked:  # other processes hold these; one may yet be killed
                    bar.set_postfix_str(f"waiting for {len(order)} shards of other processes")
                    time.sleep(0.2)
            bar.n = total if not order else bar.n

    def _pass(
        self, todo: Todo, order: list[Unit], pool: ThreadPoolExecutor, bar: Any, stop: StopSignal
    ) -> None:
        """Go once through the units that nobody holds, a few batches decoding ahead."""
        ahead = max(2, 2 * self.workers // self.batch + 1)
        held: list[Claim] = []
        queue: deque[tuple[Claim, list[tuple[int, Future[Decoded]]], bool]] = deque()
        upcoming = self._batches(todo, order, held)
        try:
            while not stop.asked:
                while len(queue) < ahead and (batch := next(upcoming, None)) is not None:
                    taken, slots, last = batch
                    entries = [(slot, taken.entries[slot]) for slot in slots]
                    futures = [
                        (slot, pool.submit(_read_and_decode, entry, self._is_live(entry)))
                        for slot, entry in entries
                    ]
                    queue.append((taken, futures, last))
                if not queue:
                    return
                taken, futures, last = queue.popleft()
                self._encode(taken, futures)
                if last:
                    begun = time.perf_counter()
                    taken.finish()
                    held.remove(taken)
                    self.write_s += time.perf_counter() - begun
                bar.update(len(futures))
                bar.set_postfix_str(self.shares())
        finally:
            for _, futures, _ in queue:
                for _, future in futures:
                    future.cancel()
            for taken in held:
                taken.release()

    def _batches(
        self, todo: Todo, order: list[Unit], held: list[Claim]
    ) -> Iterator[tuple[Claim, list[int], bool]]:
        """(claim, slots, whether it is the unit's last batch), unit by unit as they are claimed."""
        for unit in order:
            shape = bucket_shape(unit.bucket, self.encoder.vae.channels)
            nbytes = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
            taken = claim(self.manifest, unit, todo[unit], self.batch, self.rows_per_shard, nbytes)
            if taken is None:
                continue
            held.append(taken)
            remaining = taken.writer.remaining
            for i, slots in enumerate(remaining):
                yield taken, list(slots), i == len(remaining) - 1
            if not remaining:  # a killed process had written it all
                yield taken, [], True

    def _encode(self, taken: Claim, futures: list[tuple[int, Future[Decoded]]]) -> None:
        """One batch: wait for its pixels, encode them, append them to the shard."""
        begun = time.perf_counter()
        decoded = [(slot, future.result()) for slot, future in futures]
        ready = time.perf_counter()
        pixels = {s: image for s, (_, image) in decoded if not isinstance(image, Rejected)}
        latents: dict[int, NDArray[Any]] = {}
        refused = {s: image for s, (_, image) in decoded if isinstance(image, Rejected)}
        if pixels:
            encoded = self.encoder.encode(np.stack(list(pixels.values())))
            for slot, latent in zip(pixels, encoded, strict=True):
                stored = self._stored(latent)
                if isinstance(stored, Rejected):
                    refused[slot] = stored
                else:
                    latents[slot] = stored
        done = time.perf_counter()
        rows = []
        for slot, (content_hash, _) in decoded:
            why = refused.get(slot, Rejected(""))
            rows.append(Row(slot, content_hash, reason=why.reason, detail=why.detail))
        taken.writer.append(rows, latents)
        self.wait_s += ready - begun
        self.encode_s += done - ready
        self.write_s += time.perf_counter() - done

    def _stored(self, latent: NDArray[np.float32]) -> NDArray[Any] | Rejected:
        """The latent in the store's dtype, or why it cannot be kept."""
        if not np.isfinite(latent).all():
            return Rejected("non_finite", "the VAE gave NaN or infinity")
        if self.dtype == "float32":
            return latent
        if np.abs(latent).max() > FLOAT16_MAX:
            return Rejected("overflow", f"{np.abs(latent).max():.0f} is beyond float16")
        stored = latent.astype(np.float16)
        spread = float(latent.std()) or 1.0
        self.rounding.append(float((stored - latent).std()) / spread)
        return stored

    def _is_live(self, entry: Entry) -> bool:
        now = self.live.get(entry["key"])
        return now is not None and (now["bucket"], now["row"]) == (entry["bucket"], entry["row"])

    def shares(self) -> str:
        """What the time went into, the slowest station first."""
        parts = {"encode": self.encode_s, "wait for decode": self.wait_s, "write": self.write_s}
        total = sum(parts.values()) or 1.0
        ranked = sorted(parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked)


def _read_and_decode(entry: Entry, live: bool) -> Decoded:
    """The pixels of a planned image as it is now; changed since the scan, it is planned anew."""
    if not live:
        return "", Rejected("removed", "removed or changed after it was planned")
    try:
        data = read_source(entry["source"])
        now = stat_source(entry["source"])
    except FileNotFoundError:
        return "", Rejected("vanished", "gone between the scan and its reading")
    except OSError as error:
        return "", Rejected("unreadable", error.strerror or str(error))
    if (len(data), *now) != (entry["size"], entry["size"], entry["mtime_ns"]):
        return "", Rejected("changed", "changed between the scan and its reading")
    width, height = map(int, entry["bucket"].split("x"))
    crop = tuple(entry["crop"])
    pixels = decode(data, (entry["width"], entry["height"]), crop, (width, height))
    return hashlib.sha256(data).hexdigest(), pixels
