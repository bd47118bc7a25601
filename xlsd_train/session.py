"""Everything a run needs, opened and checked before the first step, and closed after the last."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.nn import Parameter

from xlsd_cache import UserError, __version__
from xlsd_cache.precision import set_precision
from xlsd_cache.store import LatentStore
from xlsd_train.batches import BatchSource, Noising
from xlsd_train.captions import Captions
from xlsd_train.checkpoint import load_optimizer
from xlsd_train.config import TrainConfig
from xlsd_train.diffusion import make_objective
from xlsd_train.ema import Ema, averaging
from xlsd_train.latents import normalising
from xlsd_train.model import Model, load_model
from xlsd_train.optim import make_optimizer, warmup_steps
from xlsd_train.run import Run, machine, settings
from xlsd_train.sample import Sampler, read_prompts, sample_size
from xlsd_train.schedule import Schedule
from xlsd_train.selection import Selection, held_out, selected
from xlsd_train.step import Step
from xlsd_train.validate import HELD_OUT, Validator, make_validator


@dataclass(frozen=True)
class Session:
    """A run that is ready for its next step."""

    config: TrainConfig
    accelerator: Accelerator
    run: Run
    schedule: Schedule
    source: BatchSource
    model: Model
    named: dict[str, Parameter]  # what trains
    take_step: Step
    sampler: Sampler
    planned_steps: int
    warmup_steps: float
    validator: Validator | None
    ema: Ema | None  # of the main process

    def average(self, step: int) -> None:
        """Take the weights of a step into the averages, with --ema."""
        if self.ema:
            self.ema.update(step)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


@contextmanager
def open_session(config: TrainConfig, command: Sequence[str]) -> Iterator[Session]:
    """Open a new run or one begun before, in this order: store, settings, model, optimizer.

    Raises UserError before anything is written where the run cannot be as asked.
    """
    config = config.resolved()
    accelerator, precision = _start(config)
    # The default folder's name holds the time, which processes would read differently.
    config = replace(config, out=broadcast_object_list([Run.open(config).folder])[0])
    run, device = Run.open(config), accelerator.device
    with (
        LatentStore.open(config.data, run.generation) as store,
        closing(run),
        ExitStack() as stack,
    ):
        held = held_out(store, config.validation_fraction or 0)
        trains = ~held
        selection = selected(store, trains)
        schedule = _schedule(config, selection)
        column = _caption_column(config, store)
        shared = settings(config, store, device)
        run.compare(shared, config.force)
        planned, warmup = _length(config, schedule)
        prompts = read_prompts(config.sample_prompts, store, column, config.seed)
        resumed = run.checkpoint
        if resumed:
            model = load_model(str(resumed), None, store.identity)
        else:
            model = load_model(config.model, config.vae, store.identity)
        if config.normalize_latents and not model.scaling.normalized:
            model.scaling = normalising(store)
        before = model.scheduler_config
        objective = make_objective(
            config.objective, config.loss_weight, config.min_snr_gamma or 0, before
        )
        model.scheduler_config = objective.scheduler_config
        named = model.prepare(config.phase, config.gradient_checkpointing)
        captions = Captions(model.tokenizer, model.tokens, config.seed, config.caption_dropout)
        stratified = config.timesteps == "stratified"
        noising = Noising(objective.first, objective.count, stratified, config.noise_offset)
        rank, processes = accelerator.process_index, accelerator.num_processes
        source = BatchSource(store, selection, schedule, captions, column, noising, rank, processes)
        validates = config.validate_every > 0
        validator = make_validator(source, held, trains, config) if validates else None
        record = {
            "command": list(command),
            "config": asdict(config),
            "precision": precision,
            "planned_steps": planned,
            "warmup_steps": warmup,
            "prompts": prompts,
            "store": {
                "path": str(store.root.absolute()),
                "generation": store.generation,
                "fingerprint": store.fingerprint,
                "newest_generation": store.newest_generation,
                "images": len(store),
                "selected": len(selection),
            },
            # Of a resumed run the trained weights are the checkpoint's; hashing takes a while.
            "model": {"source": model.source, "sha256": {} if resumed else model.sha256()},
            "objective": objective.record(before),
            "latents": model.scaling.record(),
            "validation": validator.keys() if validator else {},
            "settings": shared,
            "machine": machine(device),
            "processes": accelerator.num_processes,
            "xlsd": __version__,
        }
        run.compare_model(record, config.force)
        if accelerator.is_main_process:
            _say(config, record, schedule, named, run)
        accelerator.wait_for_everyone()  # all have looked before the main process writes
        if accelerator.is_main_process and not config.dry_run:
            run.begin(record, model, config)
        accelerator.wait_for_everyone()
        model.unet.to(device)
        model.text_encoder.to(device)
        model.scaling = model.scaling.to(device)
        optimizer = make_optimizer(config, named.values())
        if resumed:
            load_optimizer(resumed, named, optimizer)
        averages = averaging(named, optimizer, config.ema_every, resumed)
        yield Session(
            config,
            accelerator,
            run,
            schedule,
            source,
            model,
            named,
            Step(model, list(named.values()), optimizer, objective.to(device), accelerator),
            Sampler(
                prompts,
                *sample_size(store),
                config.sample_steps,
                config.sample_guidance,
                config.seed,
            ),
            planned,
            warmup,
            validator,
            stack.enter_context(averages) if config.ema and accelerator.is_main_process else None,
        )


def _start(config: TrainConfig) -> tuple[Accelerator, str]:
    """Set precision, threads and determinism, and find the device and the other processes."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA card; leave it out or use cpu")
    precision = set_precision(config.precision)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False  # it may choose another kernel every run
    mixed = "bf16" if config.precision == "bf16" else "no"
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    return Accelerator(mixed_precision=mixed, cpu=cpu), precision


def _schedule(config: TrainConfig, selection: Selection) -> Schedule:
    count = len(selection)
    if not selection.of:
        raise UserError(f"{config.data} holds no live image; build it from images that load")
    if config.batch > count:
        which = "images" if count == selection.of else "selected images"
        raise UserError(
            f"--batch {config.batch} is larger than the {count} {which} of {config.data}; "
            f"lower it to {count} or less"
        )
    return Schedule(selection.sizes, config.batch, config.seed)


def _caption_column(config: TrainConfig, store: LatentStore) -> str:
    columns = store.caption_columns
    if config.caption in columns:
        return str(config.caption)
    there = ", ".join(columns) or "none"
    if config.caption is not None:
        raise UserError(
            f"{config.data} has no caption column {config.caption!r} (it has {there}); name "
            f"another, or run `xlsd-cache build` with --captions {config.caption}"
        )
    if len(columns) != 1:
        raise UserError(
            f"{config.data} has the caption columns {there}; choose one with --caption"
            if columns
            else f"{config.data} has no captions; run `xlsd-cache build` with --captions again"
        )
    return columns[0]


def _length(config: TrainConfig, schedule: Schedule) -> tuple[int, float]:
    """Planned length and warm-up, in steps."""
    planned = config.steps
    if planned is None:
        assert config.epochs is not None
        whole, part = divmod(config.epochs, 1)
        batches = schedule.batches(int(whole))
        batches += math.ceil(part * (schedule.batches(int(whole) + 1) - batches))
        planned = max(1, math.ceil(batches / config.accum))
    steps_an_epoch = schedule.batches_an_epoch / config.accum
    if config.warmup is None and config.phase == "unet":
        return planned, min(200.0, planned / 10)
    return planned, warmup_steps(config.warmup or "10%", planned, steps_an_epoch)


def _say(
    config: TrainConfig,
    record: dict[str, Any],
    schedule: Schedule,
    named: dict[str, Parameter],
    run: Run,
) -> None:
    """What will run, in full, before it does."""
    for name, value in asdict(config).items():
        print(f"  {name:<24}{value}")
    weights = sum(parameter.numel() for parameter in named.values())
    print(record["precision"])
    print(f"model {record['model']['source']}: {weights / 1e6:.1f} M weights train")
    objective = record["objective"]
    weight = "" if config.loss_weight == "none" else f", weighted by {config.loss_weight}"
    print(f"objective {objective['kind']}{weight}, {config.timesteps} timesteps", end="")
    anew = f"; the model predicted {objective['before']} so far, and learns to anew"
    print(anew if objective["anew"] else "")
    if record["latents"]["normalized"]:
        print("latents are normalised by channel, with " + json.dumps(record["latents"]))
    store = record["store"]
    print(
        f"store {store['path']}: {store['images']} images, generation {store['generation']}", end=""
    )
    later = store["newest_generation"] - store["generation"]
    print(f", without the {later} later ones, unfinished or newer than the run" if later else "")
    if store["selected"] < store["images"]:
        print(
            f"  {store['images'] - store['selected']} of them are held out for validation", end=""
        )
        measured = len(record["validation"].get(HELD_OUT, ()))
        some = f", where {measured} of them are measured beside {measured} that train"
        print(some if measured else "")
    if config.ema:
        gib = 2 * 4 * weights / 2**30
        held = gib * 1.5 if record["settings"]["device"] == "cuda" else gib  # a copy on its way
        print(
            f"EMA: two averages in {held:.1f} GiB of the CPU's memory, and at most "
            f"{config.ema_snapshots} snapshots of {gib:.1f} GiB in {run.folder / 'ema'}"
        )
    for bucket, count in schedule.small_buckets(config.batch):
        print(f"  bucket {bucket} holds {count} images, so its batches do, not {config.batch}")
    an_epoch = schedule.batches_an_epoch / config.accum
    print(
        f"planned {record['planned_steps']} steps, {an_epoch:.1f} an epoch; warm-up over "
        f"{record['warmup_steps']:g} steps to {config.lr:g}"
    )
    print(f"run {run.folder}" + (f", from step {run.state()['step']}" if run.before else ""))
