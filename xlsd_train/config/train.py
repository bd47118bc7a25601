"""A run's options: ten groups of them in one frozen dataclass, from which the help is generated."""

import shlex
import shutil
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from xlsd_cache.console.option_checks import (
    CheckedOptions,
    Count,
    Every,
    Folder,
    Share,
    Threads,
    Within,
)
from xlsd_cache.errors import UserError
from xlsd_train.config.inputs import (
    CaptionOptions,
    DataOptions,
    ModelOptions,
    TrainableOptions,
)
from xlsd_train.config.optimization import (
    MemoryOptions,
    ObjectiveOptions,
    OptimizerOptions,
)

# Bounds of --lr, whether it is a factor of the rate that dlion finds (1, rarely 0.1 to 10) or the
# rate itself: below 1e-10 fp32 rounds steps away (weights of 0.01 are 1e-9 apart), and steps of
# 0.1, larger than nearly all weights, replace them.
RATES = {True: (0.01, 100.0), False: (1e-10, 0.1)}

# Options that may change when a run is resumed, since none of them changes a weight.
FREE = frozenset({
    "recipe", "out", "stop_after", "save_every", "keep", "dry_run", "force", "on_event", "log_with",
    "quiet", "json",
    # A run keeps the plan that it was started with.
    "vram", "momentum", "measure", "remeasure",
    "ema_snapshots", "validate_every", "sample_every", "sample_prompts", "sample_steps",
    "sample_guidance",
})  # fmt: skip

# config.json lists options in the order in which they came to be; later ones follow at the end.
_RECORDED = """
    phase recipe train reinit batch accum memory micro_batch vram channels_last data model model_ema
    unet text_encoder tokenizer vae out epochs steps stop_after lr warmup scheduler lr_floor
    optimizer betas d_max d_growth weight_decay precision caption require_tags forbid_tags tags
    drop_tags underscores_to_spaces shuffle keep_first tag_dropout max_tags caption_dropout tokens
    clip_skip objective loss_weight min_snr_gamma noise_offset timesteps normalize_latents
    sample_every sample_prompts sample_steps sample_guidance validate_every validation_fraction
    validation_images ema ema_every ema_snapshots save_every keep seed device threads deterministic
    force dry_run
""".split()


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CheckedOptions):
    """Samples."""

    sample_every: Every = 250
    """Draw samples every this many steps, at step 0 and at the end. 0: never."""

    sample_prompts: Path | None = None
    """Text file with one prompt per line and optional settings as in `xlsd-train sample`: a cat
    --size 512x768 --seed 5. Default: four captions of the store."""

    sample_steps: Annotated[int, Within(1, 1000)] = 20
    """Denoising steps per sample."""

    sample_guidance: Annotated[float, Within(0, 1000)] = 7.5
    """Classifier-free guidance scale of samples."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(CheckedOptions):
    """Validation."""

    validate_every: Every = 0
    """Measure the loss on held-out images every this many steps, at step 0 and at the end. 0:
    never."""

    validation_fraction: Share | None = None
    """Fraction of the images to hold out of training, selected by content. Default: 0.01 with
    --validate-every, else 0."""

    validation_images: Count = 256
    """Measure at most this many held-out images and as many training images, at ten timesteps
    each."""

    def check(self) -> None:
        """Raise UserError for a fraction that leaves nothing to train on, or to measure."""
        fraction = self.validation_fraction
        if fraction == 1:
            raise UserError(
                f"--validation-fraction {fraction:g} is not within 0 to 1; give e.g. 0.01"
            )
        if self.validate_every and fraction == 0:
            raise UserError(
                f"--validate-every {self.validate_every} has nothing to measure with "
                f"--validation-fraction 0; give e.g. 0.01"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions(CheckedOptions):
    """Run."""

    recipe: str | None = None
    """Take defaults from a recipe: a name that `xlsd-train recipes` lists, or a .toml file."""

    out: Folder | None = None
    """The run's folder. Default: runs/PHASE-DATE-TIME."""

    save_every: Count = 500
    """Save a checkpoint every this many steps, and at the end."""

    keep: Every = 3
    """Keep this many of the newest checkpoints, and the best. 0: all."""

    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Seed of batch order, noise, timesteps, captions and samples."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""

    threads: Threads | None = None
    """CPU threads of torch. They affect rounding, so a resume compares them. Default: torch's
    own."""

    deterministic: bool = True
    """Use deterministic GPU kernels, which a bit-exact resume needs."""

    force: bool = False
    """Resume although settings, store, model or versions differ (not bit-exact). Also start on a
    disk that is too small, or with any --lr."""

    dry_run: bool = False
    """Check everything, print what would run, and stop."""

    quiet: bool = False
    """Show no progress bar: only lines, as without a terminal."""

    json: bool = False
    """Print events on stdout, a JSON object per line: start, step, sampled, validated, saved,
    disk-low, and done, stopped or failed. No bar."""

    on_event: str | None = None
    """Run a command when the run is sampled, validated, saved, done, stopped, failed or disk-low.
    It gets XLSD_EVENT, XLSD_RUN, XLSD_STEP, XLSD_PATH and XLSD_MESSAGE in its environment."""

    log_with: Literal["tensorboard", "wandb"] = "tensorboard"
    """wandb: log to Weights & Biases too, which `pip install 'xlsd[wandb]'` adds. TensorBoard's
    files are always written."""

    def check(self) -> None:
        """Raise UserError for a command that cannot run, and for a package that is missing."""
        if self.log_with == "wandb" and find_spec("wandb") is None:
            raise UserError(
                "--log-with wandb: the package wandb is not installed; run `pip install "
                "'xlsd[wandb]'`, or leave the option out"
            )
        if self.on_event is None:
            return
        try:
            words = shlex.split(self.on_event)
        except ValueError as error:
            raise UserError(
                f"--on-event {self.on_event!r} is no command: {error}; quote its words as in a "
                f"shell"
            ) from error
        if not words or shutil.which(words[0]) is None:
            raise UserError(
                f"--on-event {self.on_event!r}: there is no such program, or no right to run it; "
                f"give e.g. 'sh notify.sh'"
            )


@dataclass(frozen=True)
class TrainConfig(
    RunOptions, ValidationOptions, SamplingOptions, MemoryOptions, ObjectiveOptions,
    OptimizerOptions, CaptionOptions, ModelOptions, DataOptions, TrainableOptions,
):  # fmt: skip
    """Train the UNet, the text encoder, or both, from a latent store.

    Given an existing --out, training resumes from its last complete checkpoint, bit-exactly.
    Ctrl-C, SIGTERM or closing the terminal saves a checkpoint first. `touch RUN/SAVE`, `RUN/SAMPLE`
    or `RUN/STOP` acts at the next step.
    """

    def check(self) -> None:
        """Raise UserError for values that do not go together, within a group or across groups."""
        for group in cast("tuple[type[CheckedOptions], ...]", TrainConfig.__bases__):
            group.check(self)
        if self.momentum == "streamed" and self.optimizer == "adamw":
            raise UserError(
                "--momentum streamed is for --optimizer lion and dlion, not adamw; leave it out"
            )
        self.check_rate()

    def check_rate(self) -> None:
        """Raise UserError for a rate that trains nothing, or breaks the weights in one step."""
        dlion = self.optimizer == "dlion"
        least, most = RATES[dlion]
        if not (self.force or least <= self.rate <= most):
            factor = "a factor of the learning rate that --optimizer dlion finds, not a rate"
            what = factor if dlion else f"no learning rate for --optimizer {self.optimizer}"
            raise UserError(
                f"--lr {self.rate:g} is {what}; leave it out, or give {least:g} to {most:g}"
            )
        if self.lr_floor is not None and self.lr_floor >= self.rate:
            raise UserError(
                f"--lr-floor {self.lr_floor:g} is not below --lr {self.rate:g}; lower it"
            )

    @property
    def rate(self) -> float:
        """--lr, or its default."""
        if self.lr is not None:
            return self.lr
        # XLLSD's 4.5e-5 at batch 256, scaled to batch 32; 3e-6 is the article's for the TE.
        lr = 5e-6 if self.phase == "unet" else 3e-6
        return 1.0 if self.optimizer == "dlion" else lr

    def resolved(self) -> "TrainConfig":
        """With the defaults filled in that depend on other options."""
        steps, epochs = self.steps, self.epochs
        if steps is None and epochs is None:
            steps, epochs = (1_000_000, None) if self.phase == "unet" else (None, 3.0)
        betas = (0.9, 0.99) if self.optimizer == "lion" else (0.9, 0.999)
        fraction = self.validation_fraction
        if fraction is None:
            fraction = 0.01 if self.validate_every else 0.0
        weighs = self.loss_weight == "min-snr"
        return replace(
            self,
            steps=steps,
            epochs=epochs,
            lr=self.rate,
            betas=self.betas or betas,
            validation_fraction=fraction,
            ema_every=(self.ema_every or 1) if self.ema else None,
            ema_snapshots=(self.ema_snapshots or 12) if self.ema else None,
            min_snr_gamma=(self.min_snr_gamma or 5.0) if weighs else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Option -> value, flat, as config.json keeps it."""
        names = [*_RECORDED, *(field.name for field in fields(TrainConfig))]
        return {name: getattr(self, name) for name in dict.fromkeys(names)}
