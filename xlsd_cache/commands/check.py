"""`xlsd-cache check`: read the whole store back, and compare some decoded latents with images."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image

from xlsd_cache.console import terminal
from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.compatibility import decoder_notice, load_vae_for
from xlsd_cache.encoding.vae import Vae
from xlsd_cache.files.uri import read_source
from xlsd_cache.images.decode import Pixels, decode
from xlsd_cache.images.header import MOST_PIXELS
from xlsd_cache.integrity.accounting import account
from xlsd_cache.integrity.repair import Repaired, repair
from xlsd_cache.integrity.shard_check import LISTED, Problem
from xlsd_cache.integrity.verify import verify, verify_index, verify_live
from xlsd_cache.options.inspection import CheckOptions
from xlsd_cache.outcomes import Rejected
from xlsd_cache.runtime.device import device_of
from xlsd_cache.runtime.own_files import writing
from xlsd_cache.store.index import Snapshot, make_snapshot
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView
from xlsd_cache.vocabulary import Bucket

Say = Callable[..., None]
TOLERATED_DB = 0.5  # below the VAE's own round trip: float16 and other kernels cost far less


def check(config: CheckOptions) -> bool:
    """Print every problem with the images it concerns; True if none is left."""
    store = StoreView.open(config.store.expanduser())
    say = _silent if config.json else terminal.say
    found, live = _find(store, config, say)
    for problem in found:
        say(f"WRONG: {problem}")
    say(f"{len(found)} problems" if found else f"all {live} latents are right")
    value: dict[str, Any] = {"right": not found, "live": live, "problems": list(map(asdict, found))}
    right = not found
    broken = [problem for problem in found if problem.kind != "image"]  # repair can fix these
    if config.repair and broken:
        with writing(config.store, "Nothing valid is lost"):
            repaired = repair(store, broken)
        lost_captions = any(problem.kind == "captions" for problem in found)
        right = (
            _say_repaired(StoreView.open(store.manifest.root), repaired, say) and not lost_captions
        )
        value |= {"right": right, "repaired": asdict(repaired)}
    if config.json:
        terminal.say_json(value)
    return right


def _find(store: StoreView, config: CheckOptions, say: Say) -> tuple[list[Problem], int | None]:
    """All problems, and the number of live images if the journal is readable."""
    problems = verify(store)
    if not _log_is_readable(store, problems):
        say("the journal is damaged: its sums and index.arrow were not checked")
        return problems, None
    counts, _ = account(store)
    say(counts)  # raises if the sums do not add up
    if counts.pending:
        told = f"holds {counts.live} images; {counts.pending} images are not encoded yet"
        problems.append(Problem("pending", "the store", f"{told}, run the build again"))
    snapshot = make_snapshot(store)
    problems = [_with_live_names(problem, snapshot) for problem in problems]
    problems += verify_index(store, snapshot) + verify_live(store, snapshot)
    if config.decode and not problems:
        with LatentStore(store, snapshot) as latents:
            vae = load_vae_for(store.identity, config.vae, [store.manifest.root])
            if told := decoder_notice(vae, store.identity):
                say(told)
            problems += _check_decoded(latents, vae, config, say)
    return problems, counts.live


def _log_is_readable(store: StoreView, problems: list[Problem]) -> bool:
    """Whether the journal can be folded: commit records may be missing, but not damaged."""
    return not any(
        problem.kind in ("plan", "captions")
        or (problem.kind == "commit" and (store.manifest.root / problem.where).exists())
        for problem in problems
    )


def _with_live_names(problem: Problem, snapshot: Snapshot) -> Problem:
    """The problem with the images' current names; commit records have those at encoding."""
    if problem.unit is None or not problem.rows or problem.unit.bucket not in snapshot.ranges:
        return problem
    start, stop = snapshot.ranges[problem.unit.bucket]
    samples = snapshot.samples.slice(start, stop - start)
    at = pc.index_in(pa.array(problem.rows, pa.int64()), value_set=samples["row"]).to_pylist()
    keys = samples["key"]
    named = tuple(
        f"{key} (not in training)" if i is None else str(keys[i].as_py())
        for key, i in zip(problem.images, at, strict=True)
    )
    return replace(problem, images=named)


def _say_repaired(store: StoreView, repaired: Repaired, say: Say) -> bool:
    """Print what was done; True if the store is valid again without another build."""
    for problem in repaired.left:
        say(f"cannot repair {problem.where}: restore it from a copy, or rebuild the store")
    if repaired.left:
        return False
    for done in repaired.done:
        say(f"repaired: {done}")
    if repaired.gone:
        named = ", ".join(repaired.gone[:LISTED])
        say(f"{len(repaired.gone)} images dropped, their files are gone: {named}")
    counts, _ = account(store)
    if counts.pending:
        say(f"{counts.pending} images to re-encode: run the same `xlsd-cache build` again")
    else:
        say(f"all {counts.live} latents are valid now")
    return not counts.pending


def _check_decoded(store: LatentStore, vae: Vae, config: CheckOptions, say: Say) -> list[Problem]:
    """Compare decoded latents with their images, against the VAE's own round trip.

    Pixels are scaled by diffusers' image processor here, so latents encoded from pixels in another
    range than the VAE's [-1, 1] fail.
    """
    device = device_of(config.device)
    vae.model.to(device)
    processor = VaeImageProcessor()
    chosen = np.unique(np.linspace(0, len(store) - 1, min(config.decode, len(store))).astype(int))
    problems: list[Problem] = []
    ours, own, changed, passed_over = [], [], [], Counter[str]()
    for index in progress_bar(chosen, "decoding", unit="image"):
        sample = store.samples.slice(int(index), 1).to_pylist()[0]
        pixels = _pixels(sample)
        if isinstance(pixels, Rejected):
            if pixels.reason == "changed":
                changed.append(sample["key"])
            else:
                passed_over[pixels.detail if pixels.reason == "vanished" else pixels.reason] += 1
            continue
        raw = torch.from_numpy(store.read(sample["bucket"], [sample["row"]])).float()
        x = processor.preprocess(Image.fromarray(pixels))
        with torch.inference_mode():
            stored = vae.decode(raw.to(device)).cpu()
            round_trip = vae.decode(vae.encode(x.to(device))).cpu()
        ours.append(_psnr(stored, x))
        own.append(_psnr(round_trip, x))
        if ours[-1] < own[-1] - TOLERATED_DB:
            bucket, row = sample["bucket"], sample["row"]
            told = (
                f"row {row} decodes to {ours[-1]:.1f} dB of its image, where the VAE's own round "
                f"trip gives {own[-1]:.1f} dB"
            )
            unit = ShardId(bucket, row // store.rows_per_shard)
            problems.append(Problem("latents", bucket, told, (sample["key"],), unit, (row,)))
    for what, count in sorted(passed_over.items()):
        say(f"{count} of {len(chosen)} images were not compared: {what}")
    if ours:
        say(
            f"decoded {len(ours)}: PSNR {np.mean(ours):.2f} dB (least {min(ours):.2f}), the VAE's "
            f"own round trip {np.mean(own):.2f} dB"
        )
    if changed:
        told = (
            f"of {len(changed)} of {len(chosen)} samples are not what was encoded; run "
            f"`xlsd-cache build` with the store's sources and --rehash, which re-encodes them"
        )
        problems.append(Problem("image", "the images", told, tuple(changed)))
    return problems


def _pixels(sample: dict[str, Any]) -> Pixels | Rejected:
    """The sample's image as it went into the VAE, or why it is not available."""
    if not sample["content_hash"]:  # imported without its image
        return Rejected("vanished", "imported without their images")
    try:
        data = read_source(sample["source"])
    except FileNotFoundError:
        return Rejected("vanished", "gone")
    except OSError as error:
        # Errors of the system have a number. Others mean that the archive has changed.
        return Rejected("unreadable" if error.errno else "changed")
    if hashlib.sha256(data).hexdigest() != sample["content_hash"]:
        return Rejected("changed")
    upright, bucket = (sample["width"], sample["height"]), Bucket.parse(sample["bucket"])
    return decode(data, upright, tuple(sample["crop"]), bucket, MOST_PIXELS)


def _silent(*_: object) -> None:
    """Print nothing, since programs read JSON."""


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error: NDArray[np.float64] = ((a.clamp(-1, 1) - b) / 2).double().numpy()
    return float(-10 * np.log10(np.mean(np.square(error)) + 1e-12))
