"""One frozen dataclass for a run; the command line is generated from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from xlsd_cache import Precision, UserError

Phase = Literal["unet", "te", "both"]
Kind = Literal["eps", "v", "flow"]
Weighting = Literal["none", "min-snr", "debiased"]

# What may differ when a run goes on: none of these changes a weight at any step.
FREE = frozenset(
    {"out", "stop_after", "save_every", "keep", "dry_run", "force"}
    | {
        "ema_snapshots",
        "validate_every",
        "sample_every",
        "sample_prompts",
        "sample_steps",
        "sample_guidance",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """Train the UNet, the text encoder, or both, from a latent store.

    Given an --out that exists, a run goes on exactly where its last complete checkpoint is, to the
    bit. Ctrl-C saves first. `touch RUN/SAVE`, `RUN/SAMPLE` or `RUN/STOP` act at the next step.
    """

    phase: Phase
    """What trains: the UNet with the text encoder frozen, the reverse, or both."""

    batch: int = 32
    """Images per batch. Each batch comes from one bucket."""

    accum: int = 1
    """Batches per optimizer step; their gradients are averaged over all images."""

    data: Path = Path("latents")
    """The latent store that `xlsd-cache build` made."""

    model: str | None = None
    """A hub id, pipeline folder, checkpoint or run. Default: hub's SD1.5, with the store's VAE."""

    vae: str | None = None
    """Swap this VAE into --model, where the model's own is not the store's. Names as in build."""

    out: Path | None = None
    """The run's folder. Default: runs/PHASE-DATE-TIME."""

    epochs: float | None = None
    """Planned length in epochs: with --steps the other way to say it. Default: 3 for te, both."""

    steps: int | None = None
    """Planned length in optimizer steps. Default: 1000000 for unet."""

    stop_after: int | None = None
    """Stop after this step without changing the planned length, so no learning rate changes."""

    lr: float | None = None
    """Learning rate. Default: 3e-6 for te and both; 5e-6 for unet."""

    warmup: str | None = None
    """Steps (200), percent of the plan (10%), epochs (0.5e). Default: 10%; for unet at most 200."""

    optimizer: Literal["lion", "adamw"] = "lion"
    """lion: lion-pytorch's. adamw: torch's, with twice the state."""

    betas: tuple[float, float] | None = None
    """Default: 0.9 0.99 for lion, 0.9 0.999 for adamw."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    precision: Precision = "fp32"
    """fp32: no TF32 anywhere. bf16: autocast over fp32 weights."""

    gradient_checkpointing: bool = True
    """Recompute activations in backward: a quarter more work, a quarter of the memory."""

    caption: str | None = None
    """Caption column. Default: the store's only one."""

    caption_dropout: float = 0.0
    """How often a caption is left out, which classifier-free guidance wants; 0 to 1."""

    objective: Kind | None = None
    """eps: noise. v: velocity, with zero terminal SNR. flow: rectified. Default: --model's own."""

    loss_weight: Weighting = "none"
    """By timestep. min-snr: for eps and v, whose last step then weighs nothing. debiased: eps."""

    min_snr_gamma: float | None = None
    """With --loss-weight min-snr: the SNR above which timesteps weigh less. Default: 5."""

    noise_offset: float = 0.0
    """Spread of a random shift of each channel's noise, say 0.05, for darker and lighter images."""

    timesteps: Literal["uniform", "stratified"] = "uniform"
    """Each image's drawn alone, or spread evenly over each batch, for a less noisy gradient."""

    normalize_latents: bool = False
    """Mean 0 and spread 1 in every channel, by the store's statistics; kept with the model."""

    sample_every: int = 250
    """Draw samples every so many steps, at step 0 and at the end; 0 never."""

    sample_prompts: Path | None = None
    """A text file of prompts, one a line. Default: four captions of the store."""

    sample_steps: int = 20
    """Denoising steps a sample."""

    sample_guidance: float = 7.5
    """Classifier-free guidance of samples."""

    validate_every: int = 0
    """Measure the loss on held-out images every so many steps, at step 0 and the end; 0 never."""

    validation_fraction: float | None = None
    """Share of the images, by their content, that never trains. Default: 0.01 if validated."""

    validation_images: int = 256
    """Measure at most so many held-out images and as many that train, at ten timesteps each."""

    ema: bool = False
    """Keep two averages of the weights on the CPU, from which `xlsd-train ema` makes others."""

    ema_every: int | None = None
    """With --ema: take in the weights every so many steps, which is cheaper. Default: 1."""

    ema_snapshots: int | None = None
    """With --ema: keep at most so many snapshots of the averages, in RUN/ema. Default: 12."""

    save_every: int = 500
    """Write a checkpoint every so many steps, and at the end."""

    keep: int = 3
    """Keep this many newest checkpoints; 0 keeps all."""

    seed: int = 0
    """Order, noise, timesteps, captions and samples follow from it."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    threads: int | None = None
    """CPU threads of torch. Default: torch's own. Sums depend on it, so a resume compares it."""

    deterministic: bool = True
    """Deterministic GPU kernels, which exact resuming needs."""

    force: bool = False
    """Resume although settings, store, model or versions differ; exactness is then lost."""

    dry_run: bool = False
    """Check everything, print what would run, and stop."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        for name in (
            "batch",
            "accum",
            "steps",
            "stop_after",
            "save_every",
            "sample_steps",
            "threads",
            "validation_images",
            "ema_every",
            "ema_snapshots",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is less than 1; raise it")
        for name in (
            "sample_every",
            "keep",
            "weight_decay",
            "sample_guidance",
            "noise_offset",
            "validate_every",
        ):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} is negative; 0 turns it off")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"--steps {self.steps} and --epochs {self.epochs:g} both give the planned length; "
                f"leave one out"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"--epochs {self.epochs:g} is not above 0; raise it")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UserError(f"--lr {self.lr:g} is not a positive number; give say 3e-6")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"--caption-dropout {self.caption_dropout:g} is not within 0 to 1")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {self.betas} are not within 0 to 1")

        self._check_objective()
        self._check_validation()

    def _check_validation(self) -> None:
        fraction = self.validation_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise UserError(
                f"--validation-fraction {fraction:g} is not within 0 to 1; give say 0.01"
            )
        for name in ("ema_every", "ema_snapshots"):
            if getattr(self, name) is not None and not self.ema:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} does nothing without --ema")
        if self.validate_every and fraction == 0:
            raise UserError(
                f"--validate-every {self.validate_every} has nothing to measure with "
                f"--validation-fraction 0; give say 0.01"
            )

    def _check_objective(self) -> None:
        if self.objective is not None:
            check_weighting(self.objective, self.loss_weight)
        if self.min_snr_gamma is not None and self.loss_weight != "min-snr":
            raise UserError(
                f"--min-snr-gamma {self.min_snr_gamma:g} does nothing with --loss-weight "
                f"{self.loss_weight}; add --loss-weight min-snr or leave it out"
            )
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < float("inf"):
            raise UserError(f"--min-snr-gamma {self.min_snr_gamma:g} is not above 0; give say 5")
        if not self.noise_offset < float("inf"):
            raise UserError(f"--noise-offset {self.noise_offset:g} is no number; give say 0.05")

    def resolved(self) -> "TrainConfig":
        """With the defaults that depend on the phase and the optimizer filled in."""
        unet = self.phase == "unet"
        steps, epochs = self.steps, self.epochs
        if steps is None and epochs is None:
            steps, epochs = (1_000_000, None) if unet else (None, 3.0)
        fraction = self.validation_fraction
        if fraction is None:
            fraction = 0.01 if self.validate_every else 0.0
        betas = (0.9, 0.99) if self.optimizer == "lion" else (0.9, 0.999)
        return replace(
            self,
            steps=steps,
            epochs=epochs,
            # XLLSD's 4.5e-5 at batch 256, scaled to batch 32; 3e-6 is the article's for the TE.
            lr=self.lr if self.lr is not None else 5e-6 if unet else 3e-6,
            betas=self.betas or betas,
            validation_fraction=fraction,
            ema_every=self.ema_every or (1 if self.ema else None),
            ema_snapshots=self.ema_snapshots or (12 if self.ema else None),
            min_snr_gamma=self.min_snr_gamma or (5.0 if self.loss_weight == "min-snr" else None),
        )


def check_weighting(objective: Kind, weighting: Weighting) -> None:
    """Refuse a loss weight that is not defined for what is predicted."""
    known: dict[Weighting, tuple[Kind, ...]] = {"min-snr": ("eps", "v"), "debiased": ("eps",)}
    if objective not in known.get(weighting, (objective,)):
        raise UserError(
            f"--loss-weight {weighting} is defined for {' and '.join(known[weighting])}, not for "
            f"--objective {objective}; take --loss-weight none"
        )


@dataclass(frozen=True)
class EmaConfig:
    """Make an average of a run's weights, of any length, from the snapshots that --ema kept.

    The length is relative to the training so far: sigma_rel, the spread of the moments that count
    (arXiv 2312.02696). What is written is as --model takes it.
    """

    run: tyro.conf.Positional[Path]
    """The run's folder."""

    out: tyro.conf.Positional[Path]
    """A new folder for the average."""

    sigma_rel: float = 0.10
    """Length of the average, above 0 and below 0.288, which is all of training alike."""

    step: int | None = None
    """The average as of this step. Default: the newest snapshot's."""

    def __post_init__(self) -> None:
        """Refuse lengths that no power function has."""
        if not 0 < self.sigma_rel < 12**-0.5:
            raise UserError(
                f"--sigma-rel {self.sigma_rel:g} is not above 0 and below {12**-0.5:.3f}; give say "
                f"0.1"
            )
