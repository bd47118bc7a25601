"""Open everything that a run needs, check it before the first step, and close it after the last."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.nn import Parameter

from xlsd_cache import __version__
from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.encoding.compatibility import decoder_notice
from xlsd_cache.runtime.device import describe_precision
from xlsd_train.checkpoints.comparison import compare_length, compare_model
from xlsd_train.checkpoints.disk_space import check_disk, needed, writing
from xlsd_train.checkpoints.environment import machine
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.adapt import chosen
from xlsd_train.config.recipes import Recipe
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.caption_lengths import truncation
from xlsd_train.data.loader import BatchSource
from xlsd_train.data.mixture import open_mixture
from xlsd_train.evaluation.prompts import remarks
from xlsd_train.evaluation.sampler import Sampler, sample_size
from xlsd_train.evaluation.validator import Validator, make_validator
from xlsd_train.memory.choose import largest
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.optim.ema import Ema, averaging
from xlsd_train.optim.lr_scheduler import planned_steps
from xlsd_train.progress.announce import announce
from xlsd_train.progress.events import Events
from xlsd_train.progress.pace import ceiling
from xlsd_train.progress.status import Status
from xlsd_train.runs.record import RunRecord
from xlsd_train.step.distributed import Processes
from xlsd_train.step.step import Step
from xlsd_train.training.agreement import agree_on_command, agree_on_inputs
from xlsd_train.training.setup_data import RunData, build_data, make_source
from xlsd_train.training.setup_model import RunModel, build_model
from xlsd_train.training.setup_step import build_step, plan_batch, start


@dataclass(frozen=True)
class Session:
    """A run that is ready for its next step."""

    config: TrainConfig
    accelerator: Accelerator
    processes: Processes
    run: RunFolder
    batch_order: BatchOrder
    source: BatchSource
    model: ModelBundle
    named: dict[str, Parameter]  # what trains
    take_step: Step
    sampler: Sampler
    planned_steps: int
    warmup_steps: float
    validator: Validator | None
    ema: Ema | None  # in the main process
    events: Events
    ceiling: float | None  # images/s at the peak of its cards, if known
    status: Status

    def average(self, step: int) -> None:
        """With --ema, update the averages with the weights of a step."""
        if self.ema:
            self.ema.update(step)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


@contextmanager
def open_session(
    config: TrainConfig, command: Sequence[str], status: Status | None = None
) -> Iterator[Session]:
    """Open a new run or resume one: data, model, memory plan, length, record, training step.

    Raises UserError for a run that is not possible, before anything is written.
    """
    given, fraction = chosen(config, command), config.validation_fraction
    config, status = config.resolved(), status or Status()
    status.doing("reading the data")
    accelerator = start(config)
    processes = Processes.of(accelerator)
    # The default folder's name holds the time, which differs between processes.
    config = replace(config, out=broadcast_object_list([RunFolder.open(config).folder])[0])
    run = RunFolder.open(config)
    agree_on_command(config, run, processes)
    with (
        open_mixture(config.data, run.generations) as store,
        closing(run),
        ExitStack() as stack,
    ):
        data = build_data(config, given, fraction, store, run, accelerator.device)
        config = data.config
        status.doing("loading the model")
        model = build_model(config, run, store)
        # A resumed run's trained weights are the checkpoint's, and hashing takes a while.
        sha256 = {} if run.checkpoint else model.bundle.sha256()
        agree_on_inputs(data, sha256, processes)
        status.doing("planning the memory")
        batching = plan_batch(config, run, data.samples.selection, model, accelerator)
        source = make_source(data, batching.batch, model.bundle, model.objective, accelerator)
        order = source.sampler.order
        planned, warmup = compare_length(
            run, config, *planned_steps(config, order, "warmup" in given)
        )
        held, trains, count = data.samples.held_out, data.samples.trains, data.samples.measured
        validator = make_validator(source, held, trains, count, batching.batch)
        record = replace(
            _record(data, model, sha256, source, validator),
            command=list(command),
            precision=describe_precision(config.precision, batching.plan.attention == "exact"),
            batch=batching.batch,
            plan=batching.plan,
            memory=batching.text,
            measured=batching.measured,
            step_s=batching.step_s,
            tflop=batching.tflop,
            planned_steps=planned,
            warmup_steps=warmup,
            machine=machine(accelerator.device),
            processes=accelerator.num_processes,
        )
        compare_model(run, record, config.force)
        if accelerator.is_main_process:
            status.doing("starting")
            announce(config, record, order, model.named, run)
            pictures = data.pictures
            plan = needed(config, run, model.bundle, model.named, planned, pictures)
            check_disk(plan, run, config)
        processes.wait()  # all have checked before the main process writes
        if accelerator.is_main_process and not config.dry_run:
            with writing(run):
                run.begin(record, model.bundle, config)
        processes.wait()
        size = largest(data.samples.selection.sizes)
        step = build_step(config, run, model, batching.plan, accelerator, size)
        ema = None
        if config.ema and accelerator.is_main_process:
            ema = stack.enter_context(
                averaging(model.named, step.optimizer, config.ema_every, run.checkpoint)
            )
        yield Session(
            config, accelerator, processes, run, order, source, model.bundle, model.named, step,
            Sampler(data.pictures), planned, warmup, validator, ema,
            Events(run.folder, config.on_event, accelerator.is_main_process),
            ceiling(record),
            status,
        )  # fmt: skip


def _record(
    data: RunData, model: RunModel, sha256: dict[str, str], source: BatchSource,
    validator: Validator | None,
) -> RunRecord:  # fmt: skip
    """What config.json says of data and model."""
    config, samples, bundle = data.config, data.samples, model.bundle
    return RunRecord(
        config=config.to_json(),
        adapted=data.adapted,
        recipe=Recipe.read(config.recipe).record(config) if config.recipe else None,
        prompts=[picture.prompt for picture in data.pictures],
        samples={
            "size": "{}x{}".format(*sample_size(samples.selection.sizes)),
            "pictures": [asdict(picture) for picture in data.pictures],
        },
        stores=samples.records(data.store),
        unknown_tags=list(samples.tagged.unknown),
        captions=truncation(source),
        remarks=remarks(data.pictures, bundle.tokenizer, bundle.tokens),
        model={"source": bundle.source, "sha256": sha256},
        objective=model.objective.record(model.scheduler_before),
        latents=bundle.scaling.record(),
        vae={
            "padding": bundle.vae.padding,
            "decoder": decoder_notice(bundle.vae, data.store.identity),
        },
        validation=validator.keys() if validator else {},
        settings=data.settings,
        xlsd=__version__,
    )
