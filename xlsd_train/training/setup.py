"""The parts of a session, each opened and checked by itself: device, samples, model, plan."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from transformers import CLIPTokenizer

from xlsd_cache.dataset.dataset import LatentDataset
from xlsd_cache.dataset.sampler import BucketBatchSampler
from xlsd_cache.dataset.selection import Mask, Selection, select
from xlsd_cache.encoding.hub import repository_of
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.device import device_of, set_precision
from xlsd_train.checkpoints.comparison import compare_batch
from xlsd_train.checkpoints.resume import PLACES, START, changes, other_start
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns, Captions
from xlsd_train.data.loader import BatchSource
from xlsd_train.data.mixture import Mixture
from xlsd_train.data.noise import Noising
from xlsd_train.data.selection import TagFilter, columns_of, filter_by_tags, held_out_mask
from xlsd_train.evaluation.validator import measured
from xlsd_train.memory.planner import Planner, choose, limit_of
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.model.latent_scaling import scaling_by_statistics
from xlsd_train.model.loading import load_bundle
from xlsd_train.runs.layout import BASE
from xlsd_train.runs.record import StoreRecord
from xlsd_train.step.distributed import PATIENCE
from xlsd_train.step.objective import Objective
from xlsd_train.step.step import Plan
from xlsd_train.training.pace import predicted

log = logging.getLogger("xlsd.train.training")


@dataclass(frozen=True)
class Samples:
    """Which samples of the store a run uses, and for what."""

    columns: CaptionColumns
    tagged: TagFilter
    held: Mask  # for validation alone
    trains: Mask
    selection: Selection  # those that train
    measured: int  # of each set, by validation

    def told(self, stores: Mixture) -> list[StoreRecord]:
        """Of each store what config.json keeps."""
        tagged, selected = stores.counts(self.tagged.mask), stores.counts(self.trains)
        return [
            {
                "path": str(part.store.root.absolute()),
                "weight": float(part.weight),
                "generation": part.store.generation,
                "newest_generation": part.store.newest_generation,
                "fingerprint": part.store.fingerprint,
                "resolution": part.store.identity.resolution,
                "images": len(part.store),
                "tagged": tagged[at],
                "selected": selected[at],
            }
            for at, part in enumerate(stores.parts)
        ]


def start(config: TrainConfig) -> tuple[Accelerator, str]:
    """Set precision, threads and determinism, and find the device and the other processes."""
    device = device_of(config.device)
    precision = set_precision(config.precision)
    deterministic(config.deterministic)
    mixed = "bf16" if config.precision == "bf16" else "no"
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[patient]
    )
    if config.threads:  # now: accelerate sets a number of its own for several processes
        torch.set_num_threads(config.threads)
    return accelerator, precision


def deterministic(on: bool) -> None:
    """Have a card choose the same kernels every time, and those that always sum in one order.

    Else cuDNN times its kernels for every shape, and takes the fastest.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on  # it may choose another kernel every run


def choose_samples(config: TrainConfig, store: Mixture) -> Samples:
    """By tags and by what is held out. Raises UserError where they are fewer than --batch."""
    columns = columns_of(store, config.caption)
    tagged = filter_by_tags(store, columns.names, *config.selected_tags())
    held = tagged.mask & held_out_mask(store, config.validation_fraction or 0)
    trains = tagged.mask & ~held
    selection = select(store, trains)
    _check_batch(config, selection, store.root)
    count = measured(config, held, trains)
    return Samples(columns, tagged, held, trains, selection, count)


def _check_batch(config: TrainConfig, selection: Selection, data: str) -> None:
    count = len(selection)
    if not selection.of:
        raise UserError(f"{data} holds no live image; build it from images that load")
    if not count:
        raise UserError(
            f"--validation-fraction {config.validation_fraction:g} holds out every image that is "
            f"selected; lower it"
        )
    if config.batch != "auto" and config.batch > count:
        which = "images" if count == selection.of else "selected images"
        raise UserError(
            f"--batch {config.batch} is larger than the {count} {which} of {data}; "
            f"lower it to {count} or less"
        )


def open_model(config: TrainConfig, resumed: Path | None, store: Mixture) -> ModelBundle:
    """The checkpoint's, or as --model and the options beside it say; not yet what trains of it."""
    roots = [part.store.root for part in store.parts]
    if resumed:
        model = load_bundle(str(resumed), None, store.identity, roots=roots)
    else:
        model = load_bundle(
            config.model,
            config.vae,
            store.identity,
            unet=config.unet,
            text_encoder=config.text_encoder,
            tokenizer=config.tokenizer,
            ema=config.model_ema,
            tokens=config.tokens,
            roots=roots,
        )
    model.clip_skip = config.clip_skip
    if config.normalize_latents and not model.scaling.normalized:
        model.scaling = scaling_by_statistics(store)
    return model


def check_start(config: TrainConfig, run: RunFolder, store: Mixture) -> None:
    """Refuse a resume that asks to begin with other weights, though its checkpoint has them all.

    A model that lies elsewhere now is compared by its weights, and need not be there at all.
    """
    if run.before is None or run.checkpoint is None:
        return
    other = other_start(run.before.settings, config)
    if not other:
        return
    asked = {name: getattr(config, name) for name in other}
    new = dict(asked)
    if config.force:
        log.info(
            f"--force: {run.folder} was started with {changes(other, asked)}; its checkpoint counts"
        )
        return
    for name, value in list(new.items()):
        if name in PLACES and _is_gone(name, value):
            option = f"--{name.replace('_', '-')}"
            log.info(
                f"{option} {value} is not there, and not needed: the checkpoint holds the model"
            )
            new.pop(name)
    if new and not _begins_alike(config, run, store, new):
        raise UserError(
            f"{run.folder} was started with {changes(other, asked)}; leave that out, as the "
            f"checkpoint holds the whole model, or use another --out"
        )


def _is_gone(name: str, value: str) -> bool:
    """Whether this is a path, and nothing is there: no name of the hub, or of a known VAE."""
    there = Path(value).expanduser()
    names = name == "vae" and there.name == value
    return not names and not there.exists() and repository_of(value) is None


def _begins_alike(
    config: TrainConfig, run: RunFolder, store: Mixture, new: Mapping[str, Any]
) -> bool:
    """Whether the run would begin with the weights and the tokenizer that it began with."""
    assert run.before is not None
    assert run.checkpoint is not None
    if not all(Path(value).expanduser().exists() for name, value in new.items() if name in PLACES):
        return False  # nothing is fetched for it
    old = run.before.settings
    asked = {name: new.get(name, old.get(name)) for name in START}
    try:
        model = open_model(replace(config, **asked), None, store)
        named = model.prepare(config.phase, config.train)
        if asked["reinit"]:
            model.reinitialise(named, config.phase, asked["reinit"], config.seed)
    except UserError:
        return False
    own = CLIPTokenizer.from_pretrained(
        run.folder / BASE / "tokenizer", local_files_only=True, trust_remote_code=False
    )
    alike: bool = own.get_vocab() == model.tokenizer.get_vocab()
    return alike and model.sha256() == run.before.model["sha256"]


def plan_batch(
    config: TrainConfig,
    run: RunFolder,
    selection: Selection,
    model: ModelBundle,
    accelerator: Accelerator,
) -> tuple[int, Plan, str, tuple[str, float] | None]:
    """(batch, how it passes, what is said of it, (card, seconds a batch at its peak) if known).

    Of a run begun before what it began with.
    """
    limit = limit_of(config, accelerator.device)
    if run.before and not config.force:
        plan = Plan(*run.state().get("plan", run.before.plan))
        return run.before.batch, plan, run.before.memory, run.before.step_s
    found: list[Any] = [None]
    if accelerator.is_main_process:  # memory that is free differs between cards; sums must not
        configs = model.unet.config, model.text_encoder.config.to_dict()
        batch, plan, prediction = choose(
            config,
            lambda: Planner(config, *configs),
            selection.sizes,
            accelerator.num_processes,
            limit,
        )
        unknown = f"batch {batch}, {plan}: no memory limit is known here; --vram sets one"
        device = accelerator.device
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        step_s = predicted(prediction.seconds, named) if prediction else None
        found = [(batch, plan, str(prediction or unknown), step_s)]
    batch, plan, how, step_s = broadcast_object_list(found)[0]
    compare_batch(run, batch, plan, config.force)
    return batch, plan, how, step_s


def make_source(
    config: TrainConfig, store: Mixture, samples: Samples, batch: int, model: ModelBundle,
    objective: Objective, accelerator: Accelerator,
) -> BatchSource:  # fmt: skip
    """What makes this process's part of any batch."""
    captions = Captions(
        model.tokenizer, model.tokens, config.seed, config.caption_dropout, config.caption_edits()
    )
    stratified = config.timesteps == "stratified"
    noising = Noising(objective.first, objective.count, stratified, config.noise_offset)
    dataset = LatentDataset(
        store, samples.columns.names[0], scaled=False, selection=samples.selection
    )
    sampler = BucketBatchSampler(
        dataset, batch, config.seed,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    return BatchSource(dataset, sampler, captions, samples.columns, noising)
