"""Everything a run needs, opened and checked before the first step, and closed after the last."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.nn import Parameter

from xlsd_cache import __version__
from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.encoding.compatibility import decoder_notice
from xlsd_train.checkpoints.checkpoint import load_optimizer
from xlsd_train.checkpoints.comparison import (
    compare_length,
    compare_model,
    compare_settings,
    inherit_held_out,
)
from xlsd_train.checkpoints.disk_space import check_disk, needed, writing
from xlsd_train.checkpoints.environment import machine, resume_settings
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.adapt import adapt, chosen
from xlsd_train.config.recipes import Recipe
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import truncation
from xlsd_train.data.loader import BatchSource
from xlsd_train.data.mixture import open_mixture
from xlsd_train.data.selection import columns_of
from xlsd_train.evaluation.prompts import remarks
from xlsd_train.evaluation.sampler import Sampler, read_prompts, sample_size
from xlsd_train.evaluation.validator import Validator, make_validator
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import Ema, averaging
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.optim.lr_scheduler import planned_steps
from xlsd_train.runs.record import RunRecord
from xlsd_train.step.distributed import Processes
from xlsd_train.step.objective import make_objective
from xlsd_train.step.step import Step
from xlsd_train.training.announce import announce
from xlsd_train.training.setup import (
    check_start,
    choose_samples,
    make_source,
    open_model,
    plan_batch,
    start,
)


@dataclass(frozen=True)
class Session:
    """A run that is ready for its next step."""

    config: TrainConfig
    accelerator: Accelerator
    processes: Processes
    run: RunFolder
    schedule: BatchOrder
    source: BatchSource
    model: ModelBundle
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
    given, fraction = chosen(config, command), config.validation_fraction
    config = config.resolved()
    accelerator, precision = start(config)
    processes = Processes.of(accelerator)
    # The default folder's name holds the time, which processes would read differently.
    config = replace(config, out=broadcast_object_list([RunFolder.open(config).folder])[0])
    run, device = RunFolder.open(config), accelerator.device
    with (
        open_mixture(config.data, run.generations) as store,
        closing(run),
        ExitStack() as stack,
    ):
        config, adapted = adapt(config, store, given, run.adapted)
        config = inherit_held_out(run, config, fraction)
        samples = choose_samples(config, store)
        shared = resume_settings(config, store, device)
        compare_settings(run, shared, config, partial(columns_of, store))
        pictures = read_prompts(config, store, samples.selection, samples.columns, run.before)
        resumed = run.checkpoint
        check_start(config, run, store)
        model = open_model(config, resumed, store)
        before = model.scheduler_config
        objective = make_objective(
            config.objective, config.loss_weight, config.min_snr_gamma or 0, before
        )
        model.scheduler_config = objective.scheduler_config
        named = model.prepare(config.phase, config.train)
        if config.reinit is not None and not resumed:
            model.reinitialise(named, config.phase, config.reinit, config.seed)
        sure = replace(config, objective=objective.kind)
        batch, plan, told, step_s = plan_batch(sure, run, samples.selection, model, accelerator)
        source = make_source(config, store, samples, batch, model, objective, accelerator)
        schedule = source.sampler.order
        planned, warmup = compare_length(
            run, config, *planned_steps(config, schedule, "warmup" in given)
        )
        count = samples.measured
        validator = (
            make_validator(source, samples.held, samples.trains, count, batch) if count else None
        )
        record = RunRecord(
            command=list(command),
            config=config.to_json(),
            adapted=adapted,
            recipe=Recipe.read(config.recipe).record(config) if config.recipe else None,
            precision=precision,
            batch=batch,
            plan=plan,
            memory=told,
            step_s=step_s,
            planned_steps=planned,
            warmup_steps=warmup,
            prompts=[picture.prompt for picture in pictures],
            samples={
                "size": "{}x{}".format(*sample_size(samples.selection.sizes)),
                "pictures": [asdict(picture) for picture in pictures],
            },
            stores=samples.told(store),
            unknown_tags=list(samples.tagged.unknown),
            captions=truncation(source),
            remarks=remarks(pictures, model.tokenizer, model.tokens),
            # Of a resumed run the trained weights are the checkpoint's; hashing takes a while.
            model={"source": model.source, "sha256": {} if resumed else model.sha256()},
            objective=objective.record(before),
            latents=model.scaling.record(),
            vae={
                "padding": model.vae.padding,
                "decoder": decoder_notice(model.vae, store.identity),
            },
            validation=validator.keys() if validator else {},
            settings=shared,
            machine=machine(device),
            processes=accelerator.num_processes,
            xlsd=__version__,
        )
        compare_model(run, record, config.force)
        if accelerator.is_main_process:
            announce(config, record, schedule, named, run)
            drawn = sum(3 * picture.width * picture.height for picture in pictures)
            check_disk(needed(config, run, model, named, planned, drawn), run, config)
        processes.wait()  # all have looked before the main process writes
        if accelerator.is_main_process and not config.dry_run:
            with writing(run):
                run.begin(record, model, config)
        processes.wait()
        model.to(device, config.channels_last)
        optimizer = make_optimizer(config, named.values())
        if resumed:
            load_optimizer(resumed, named, optimizer)
        averages = averaging(named, optimizer, config.ema_every, resumed)
        yield Session(
            config,
            accelerator,
            processes,
            run,
            schedule,
            source,
            model,
            named,
            Step(model, list(named.values()), optimizer, objective.to(device), accelerator, plan),
            Sampler(pictures),
            planned,
            warmup,
            validator,
            stack.enter_context(averages) if config.ema and accelerator.is_main_process else None,
        )
