"""One frozen dataclass for a run; the command line is generated from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from xlsd_cache.console.option_checks import (
    Count,
    Every,
    Folder,
    Share,
    Threads,
    Within,
    check_options,
)
from xlsd_cache.errors import UserError
from xlsd_cache.schema import Precision
from xlsd_train.config.weight_patterns import split
from xlsd_train.data.caption_edits import Parts, Shuffle, require_and_forbid, tag_list

Phase = Literal["unet", "te", "both"]
Scheduler = Literal["constant", "linear", "cosine", "rex"]
Optimizer = Literal["lion", "dlion", "adamw", "prodigy", "adafactor"]
FINDS_RATE = ("dlion", "prodigy")
# Bounds of --lr, whether it is a factor of what the optimizer finds (1, rarely 0.1 to 10) or the
# rate itself: below 1e-10 fp32 rounds steps away (weights of 0.01 are 1e-9 apart), and steps of
# 0.1, larger than nearly all weights, replace them.
RATES = {True: (0.01, 100.0), False: (1e-10, 0.1)}
DEFAULT_DATA = ("latents",)
D0 = 1e-6  # where dlion's d begins
Rate = Annotated[float, Within(0, 3e38, above=True)]  # up to fp32's largest; see RATES
MOST_STEPS = 10**8 - 1  # checkpoints are named in eight digits
Kind = Literal["eps", "v", "flow"]
Weighting = Literal["none", "min-snr", "debiased"]

# What may differ when a run goes on: none of these changes a weight at any step.
FREE = frozenset(
    {"recipe", "out", "stop_after", "save_every", "keep", "dry_run", "force"}
    | {
        "vram",  # a run keeps the plan that it began with
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
    bit. Ctrl-C, SIGTERM or a closed terminal saves first. `touch RUN/SAVE`, `RUN/SAMPLE` or
    `RUN/STOP` act at the next step.
    """

    phase: Phase
    """What trains: the UNet with the text encoder frozen, the reverse, or both."""

    recipe: str | None = None
    """Defaults from a recipe: a name that `xlsd-train recipes` lists, or a .toml file."""

    train: str | None = None
    """Of that only these weights, say unet.attn2,unet.conv_in: parts of their dotted names."""

    reinit: str | None = None
    """Draw these weights of the UNet anew when the run begins; named as in --train."""

    batch: Count | Literal["auto"] = 32
    """Images per batch, all from one bucket. auto: as many as can pass at once."""

    accum: Annotated[int, Within(1, 10**6)] = 1
    """Batches per optimizer step; their gradients are averaged over all images."""

    memory: Literal["fastest", "largest", "plain", "cheap", "feed-forward", "sliced"] = "fastest"
    """How a batch passes, `xlsd-train plan` shows what each takes. fastest: the fastest that fits.
    plain: all is kept. cheap: norms and activations are rebuilt. feed-forward: its projection too.
    sliced, largest: layer by layer, stepped inside the backward pass; largest by single images."""

    micro_batch: Count | None = None
    """Images that pass at once; sliced: in the widest layers. Default: as many as fit."""

    vram: Annotated[float, Within(1, 10**4, above=True)] | None = None
    """GB of the card to plan for and to stay within. Default: what is free; no limit on a CPU."""

    channels_last: bool = False
    """Convolutions on channels-last memory. Other kernels, so other rounding."""

    data: tuple[str, ...] = DEFAULT_DATA
    """Latent stores that `xlsd-cache build` made, mixed: photos:3 cc12m. With a weight of 3 an
    epoch uses each of a store's images three times."""

    model: str | None = None
    """A hub id, folder, file, checkpoint or run. Default: hub's SD1.5, with the store's VAE."""

    model_ema: bool = False
    """Of a single file that holds moving averages, take these."""

    unet: str | None = None
    """Take the UNet from here instead: a folder, a file, a checkpoint or run."""

    text_encoder: str | None = None
    """Take the text encoder from here instead: hub id, folder, file or run; say LongCLIP's."""

    tokenizer: str | None = None
    """A folder with vocab.json and merges.txt. Default: that of --text-encoder, else --model."""

    vae: str | None = None
    """Swap this VAE into --model, where the model's own is not the store's. Names as in build."""

    out: Folder | None = None
    """The run's folder. Default: runs/PHASE-DATE-TIME."""

    epochs: Annotated[float, Within(0, 10**6, above=True)] | None = None
    """Planned length in epochs: with --steps the other way to say it. Default: 3 for te, both."""

    steps: Annotated[int, Within(1, MOST_STEPS)] | None = None
    """Planned length in optimizer steps. Default: 1000000 for unet."""

    stop_after: Count | None = None
    """Stop after this step without changing the planned length, so no learning rate changes."""

    lr: Rate | None = None
    """Learning rate, 1e-10 to 0.1. Default: 3e-6 for te and both; 5e-6 for unet. For adafactor a
    part of the weights' size, 1e-3; for dlion and prodigy a factor of the rate that they find, 1,
    and never a rate itself: 0.01 to 100."""

    warmup: str | None = None
    """Steps (200), percent of the plan (10%), epochs (0.5e). Default: 10%; for unet at most 200."""

    scheduler: Scheduler = "constant"
    """How the rate goes from the end of the warm-up to the planned end; rex falls late."""

    lr_floor: Annotated[float, Within(0, 3e38)] | None = None
    """The rate at the planned end, in the unit of --lr, for linear, cosine and rex. Default: 0."""

    optimizer: Optimizer = "lion"
    """lion; dlion: finds Lion's rate, as dadaptation 3.2 does; adamw, adafactor: torch's; prodigy:
    prodigyopt's, which finds Adam's rate."""

    betas: tuple[Share, Share] | None = None
    """Default: 0.9 0.99 for lion, else 0.9 0.999. Adafactor has none."""

    d_max: Annotated[float, Within(D0, 1, above=True)] | None = None
    """The most that dlion's d may become. Default: no limit."""

    d_growth: Annotated[float, Within(1, 10**6, above=True)] | None = None
    """The most that dlion's or prodigy's d may grow by in one step, as a factor; above 1."""

    weight_decay: Annotated[float, Within(0, 1000)] = 0.0
    """Decoupled weight decay."""

    precision: Precision = "fp32"
    """fp32: no TF32 anywhere. bf16: autocast over fp32 weights."""

    caption: str | None = None
    """Caption column, or a mix by weight: txt=3,jsonl:wd=1. Default: the store's only one."""

    require_tags: str | None = None
    """Train only on samples that have all of these tags, A,B: each whole and as it is written."""

    forbid_tags: str | None = None
    """Train on no sample that has any of these tags, A,B: each whole and as it is written."""

    tags: bool = False
    """Captions are tags, split by comma: each is kept once. The options for tags imply it."""

    drop_tags: str | None = None
    """Leave these tags, A,B, out of captions: each whole and as it is written."""

    underscores_to_spaces: bool = False
    """In tags of more than three characters, which leaves faces like ^_^ alone."""

    shuffle: Shuffle = "none"
    """The order of a caption's tags, or of its sentences (split by full stop), anew each time."""

    keep_first: Every = 0
    """So many first tags (or sentences) stay first, and are not subject to --tag-dropout."""

    tag_dropout: Share = 0.0
    """How often each tag is left out, 0 to 1."""

    max_tags: Count | None = None
    """At most so many tags, cut after shuffling."""

    caption_dropout: Share = 0.0
    """How often a caption is left out, which classifier-free guidance wants; 0 to 1."""

    tokens: Literal[248] | None = None
    """Stretch a text encoder of 77 tokens to 248, as LongCLIP does. Default: its own length."""

    clip_skip: Annotated[int, Within(0, 100)] = 0
    """Layers of the text encoder before its last whose states are used; A1111's 2 is 1 here."""
    objective: Kind | None = None
    """eps: noise. v: velocity, with zero terminal SNR. flow: rectified. Default: --model's own."""

    loss_weight: Weighting = "none"
    """By timestep. min-snr: for eps and v, whose last step then weighs nothing. debiased: eps."""

    min_snr_gamma: Annotated[float, Within(0, 10**6, above=True)] | None = None
    """With --loss-weight min-snr: the SNR above which timesteps weigh less. Default: 5."""

    noise_offset: Annotated[float, Within(0, 10)] = 0.0
    """Spread of a random shift of each channel's noise, say 0.05, for darker and lighter images."""

    timesteps: Literal["uniform", "stratified"] = "uniform"
    """Each image's drawn alone, or spread evenly over each batch, for a less noisy gradient."""

    normalize_latents: bool = False
    """Mean 0 and spread 1 in every channel, by the store's statistics; kept with the model."""

    sample_every: Every = 250
    """Draw samples every so many steps, at step 0 and at the end; 0 never."""

    sample_prompts: Path | None = None
    """A text file of prompts, one a line, each with settings of its own as in `xlsd-train sample`:
    a cat --size 512x768 --seed 5. Default: four captions of the store."""

    sample_steps: Annotated[int, Within(1, 1000)] = 20
    """Denoising steps a sample."""

    sample_guidance: Annotated[float, Within(0, 1000)] = 7.5
    """Classifier-free guidance of samples."""

    validate_every: Every = 0
    """Measure the loss on held-out images every so many steps, at step 0 and the end; 0 never."""

    validation_fraction: Share | None = None
    """Share of the images, by their content, that never trains. Default: 0.01 if validated."""

    validation_images: Count = 256
    """Measure at most so many held-out images and as many that train, at ten timesteps each."""

    ema: bool = False
    """Keep two averages of the weights on the CPU, from which `xlsd-train ema` makes others."""

    ema_every: Count | None = None
    """With --ema: take in the weights every so many steps, which is cheaper. Default: 1."""

    ema_snapshots: Count | None = None
    """With --ema: keep at most so many snapshots of the averages, in RUN/ema. Default: 12."""

    save_every: Count = 500
    """Write a checkpoint every so many steps, and at the end."""

    keep: Every = 3
    """Keep this many newest checkpoints; 0 keeps all."""

    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Order, noise, timesteps, captions and samples follow from it."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the graphics card when there is one."""

    threads: Threads | None = None
    """CPU threads of torch. Default: torch's own. Sums depend on it, so a resume compares it."""

    deterministic: bool = True
    """Deterministic GPU kernels, which exact resuming needs."""

    force: bool = False
    """Resume although settings, store, model or versions differ; exactness is then lost. Also begin
    on a disk that is too small, or at any --lr."""

    dry_run: bool = False
    """Check everything, print what would run, and stop."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if not self.data:
            raise UserError("--data names no store; give one or several, or leave it out")
        check_options(self)
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"--steps {self.steps} and --epochs {self.epochs:g} both give the planned length; "
                f"leave one out"
            )
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {self.betas} are not within 0 to 1")
        self._check_rates()
        self._check_patterns()
        self._check_objective()
        self._check_validation()
        self.parts()
        self.selected_tags()

    def _check_patterns(self) -> None:
        """Which weights train, and which begin anew."""
        if self.train is not None:
            parts = {name.partition(".")[0] for name in split(self.train, "--train", self.phase)}
            if self.phase == "both" and len(parts) == 1:
                raise UserError(
                    f"--train {self.train} is all of one part and --phase both trains two; choose "
                    f"--phase {'unet' if 'unet' in parts else 'te'}"
                )
        for pattern in (
            split(self.reinit, "--reinit", self.phase) if self.reinit is not None else []
        ):
            if not pattern.startswith("unet"):
                raise UserError(
                    f"--reinit {pattern} is of the text encoder, which no VAE touches; leave it out"
                )

    def _check_rates(self) -> None:
        """What the optimizer and the schedule take."""
        kind = self.optimizer
        for name, takers in (("d_max", ("dlion",)), ("d_growth", FINDS_RATE)):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and kind not in takers:
                raise UserError(
                    f"{option} is for --optimizer {' or '.join(takers)}, not {kind}; leave it out"
                )
        if kind == "prodigy" and self.memory in {"sliced", "largest"}:
            raise UserError(
                f"--optimizer prodigy steps all weights at once and --memory {self.memory} each "
                f"layer by itself; choose --memory fastest, or another optimizer"
            )
        self._check_lr()
        if self.betas and kind == "adafactor":
            raise UserError("--betas are not for --optimizer adafactor, which has none; leave them")
        floor = self.lr_floor
        if floor is not None and self.scheduler == "constant":
            raise UserError(
                f"--lr-floor {floor:g} is never reached by a constant rate; leave it out, or "
                f"choose --scheduler linear, cosine or rex"
            )
        if floor is not None and floor >= self.rate:
            raise UserError(f"--lr-floor {floor:g} is not below --lr {self.rate:g}; lower it")

    def _check_lr(self) -> None:
        """A rate that trains nothing, or breaks the weights in a step, is another optimizer's."""
        if self.force:
            return
        finds, (least, most) = self.optimizer in FINDS_RATE, RATES[self.optimizer in FINDS_RATE]
        if finds and not least <= self.rate <= most:
            raise UserError(
                f"--lr {self.rate:g} is a factor of the learning rate that --optimizer "
                f"{self.optimizer} finds, not a rate; leave --lr out, or give {least:g} to {most:g}"
            )
        if not least <= self.rate <= most:
            raise UserError(
                f"--lr {self.rate:g} is no learning rate for --optimizer {self.optimizer}; leave "
                f"it out, or give {least:g} to {most:g}"
            )

    @property
    def rate(self) -> float:
        """--lr, or its default."""
        if self.lr is not None:
            return self.lr
        # XLLSD's 4.5e-5 at batch 256, scaled to batch 32; 3e-6 is the article's for the TE.
        lr = 5e-6 if self.phase == "unet" else 3e-6
        # T5's for fine-tuning (Raffel et al. 2020, arXiv 1910.10683, 2.1); the paper's 1e-2 trains
        # from nothing.
        return {"dlion": 1.0, "prodigy": 1.0, "adafactor": 1e-3}.get(self.optimizer, lr)

    def parts(self) -> Parts | None:
        """What becomes of captions' parts; None: nothing.

        Raises UserError for options that do not go together.
        """
        of_tags = {
            "--tags": self.tags,
            "--drop-tags": self.drop_tags is not None,
            "--underscores-to-spaces": self.underscores_to_spaces,
            "--tag-dropout": self.tag_dropout,
            "--max-tags": self.max_tags is not None,
        }
        given = [option for option, value in of_tags.items() if value]
        if self.shuffle == "sentences" and given:
            raise UserError(
                f"--shuffle sentences does not go with {given[0]}, which is about tags; shuffle "
                f"tags, or leave {given[0]} out"
            )
        parts = Parts(
            sentences=self.shuffle == "sentences",
            drop=frozenset(tag_list("--drop-tags", self.drop_tags)),
            spaces=self.underscores_to_spaces,
            keep_first=self.keep_first,
            dropout=self.tag_dropout,
            shuffle=self.shuffle != "none",
            most=self.max_tags,
        )
        return parts if given or parts.shuffle else None

    def selected_tags(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(required, forbidden) tags of the samples to train on."""
        return require_and_forbid(self.require_tags, self.forbid_tags)

    def _check_validation(self) -> None:
        fraction = self.validation_fraction
        if fraction == 1:
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

    def resolved(self) -> "TrainConfig":
        """With the defaults that depend on the phase and the optimizer filled in."""
        unet = self.phase == "unet"
        steps, epochs = self.steps, self.epochs
        if steps is None and epochs is None:
            steps, epochs = (1_000_000, None) if unet else (None, 3.0)
        betas = {"lion": (0.9, 0.99), "adafactor": None}.get(self.optimizer, (0.9, 0.999))
        fraction = self.validation_fraction
        if fraction is None:
            fraction = 0.01 if self.validate_every else 0.0
        return replace(
            self,
            steps=steps,
            epochs=epochs,
            lr=self.rate,
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
