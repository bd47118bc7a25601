"""Everything a run needs, opened and checked before the first step, and closed after the last."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.nn import Parameter

from xlsd_cache import UserError, __version__
from xlsd_cache.precision import set_precision
from xlsd_cache.store import LatentStore
from xlsd_train.announce import announce
from xlsd_train.batches import BatchSource
from xlsd_train.captions import Captions, Columns
from xlsd_train.checkpoint import load_optimizer
from xlsd_train.config import TrainConfig
from xlsd_train.diffusion import alphas_cumprod
from xlsd_train.lengths import cut
from xlsd_train.memory import Planner, choose, limit_of
from xlsd_train.model import Model, load_model
from xlsd_train.optim import make_optimizer
from xlsd_train.rate import planned_steps
from xlsd_train.run import Run, machine, settings
from xlsd_train.sample import Sampler, read_prompts, sample_size
from xlsd_train.schedule import Schedule
from xlsd_train.selection import Selection, select
from xlsd_train.step import Plan, Step


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
    with LatentStore.open(config.data, run.generation) as store, closing(run):
        columns = Columns.parse(config.caption, store.caption_columns, config.data)
        selection = select(store, columns.names, *config.selected_tags())
        _check_batch(config, selection)
        shared = settings(config, store, device)
        run.compare(shared, config.force)
        parts = config.parts()
        prompts = read_prompts(config.sample_prompts, store, selection, columns, parts, config.seed)
        resumed = run.checkpoint
        if resumed:
            model = load_model(str(resumed), None, store.identity)
        else:
            model = load_model(
                config.model,
                config.vae,
                store.identity,
                unet=config.unet,
                text_encoder=config.text_encoder,
                tokenizer=config.tokenizer,
                ema=config.model_ema,
                tokens=config.tokens,
            )
        model.clip_skip = config.clip_skip
        abar = alphas_cumprod(model.scheduler_config)
        named = model.prepare(config.phase, config.train)
        if config.reinit is not None and not resumed:
            model.reinitialise(named, config.phase, config.reinit, config.seed)
        batch, plan, told = _plan(config, run, selection, model, accelerator)
        schedule = Schedule(selection.sizes, batch, config.seed)
        planned, warmup = planned_steps(config, schedule)
        captions = Captions(
            model.tokenizer, model.tokens, config.seed, config.caption_dropout, parts
        )
        rank, processes = accelerator.process_index, accelerator.num_processes
        source = BatchSource(
            store, selection, schedule, captions, columns, len(abar), rank, processes
        )
        record = {
            "command": list(command),
            "config": asdict(config),
            "precision": precision,
            "batch": batch,
            "plan": plan,
            "memory": told,
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
            "captions": cut(source),
            # Of a resumed run the trained weights are the checkpoint's; hashing takes a while.
            "model": {"source": model.source, "sha256": {} if resumed else model.sha256()},
            "settings": shared,
            "machine": machine(device),
            "processes": accelerator.num_processes,
            "xlsd": __version__,
        }
        run.compare_model(record, config.force)
        if accelerator.is_main_process:
            announce(config, record, schedule, named, run, selection.unknown)
        accelerator.wait_for_everyone()  # all have looked before the main process writes
        if accelerator.is_main_process and not config.dry_run:
            run.begin(record, model, config)
        accelerator.wait_for_everyone()
        model.unet.to(device)
        if config.channels_last:
            model.unet.to(memory_format=torch.channels_last)
        model.text_encoder.to(device)
        optimizer = make_optimizer(config, named.values())
        if resumed:
            load_optimizer(resumed, named, optimizer)
        yield Session(
            config,
            accelerator,
            run,
            schedule,
            source,
            model,
            named,
            Step(model, list(named.values()), optimizer, abar.to(device), accelerator, plan),
            Sampler(
                prompts,
                *sample_size(selection.sizes),
                config.sample_steps,
                config.sample_guidance,
                config.seed,
            ),
            planned,
            warmup,
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


def _check_batch(config: TrainConfig, selection: Selection) -> None:
    """Refuse a batch that is larger than what is selected, before the model is loaded."""
    count = len(selection)
    if not count:
        raise UserError(f"{config.data} holds no live image; build it from images that load")
    if config.batch != "auto" and config.batch > count:
        which = "images" if count == selection.of else "selected images"
        raise UserError(
            f"--batch {config.batch} is larger than the {count} {which} of {config.data}; "
            f"lower it to {count} or less"
        )


def _plan(
    config: TrainConfig, run: Run, selection: Selection, model: Model, accelerator: Accelerator
) -> tuple[int, Plan, str]:
    """(batch, how it passes, what is said of it): of a run begun before what it began with."""
    limit = limit_of(config, accelerator.device)
    if run.before and not config.force:
        plan = Plan(*run.state().get("plan", run.before["plan"]))
        return run.before["batch"], plan, run.before["memory"]
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
        found = [(batch, plan, str(prediction or unknown))]
    batch, plan, told = broadcast_object_list(found)[0]
    return batch, plan, told
