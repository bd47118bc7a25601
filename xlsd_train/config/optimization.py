"""Options of the training step: optimizer and length, objective, memory plan."""

from dataclasses import dataclass
from typing import Annotated, Literal

from xlsd_cache.console.option_checks import CheckedOptions, Count, Share, Within
from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Precision

Optimizer = Literal["lion", "dlion", "adamw"]
Scheduler = Literal["constant", "linear", "cosine", "rex"]
Rate = Annotated[float, Within(0, 3e38, above=True)]  # up to fp32's largest; TrainConfig narrows it
MOST_STEPS = 10**8 - 1  # checkpoints are named in eight digits
Kind = Literal["eps", "v", "flow"]
Weighting = Literal["none", "min-snr", "debiased"]
AttentionChoice = Literal["auto", "sdpa", "exact"]
MomentumChoice = Literal["auto", "resident", "streamed"]
Memory = Literal["fastest", "largest", "plain", "cheap", "feed-forward", "sliced"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(CheckedOptions):
    """Optimisation."""

    batch: Count | Literal["auto"] = 32
    """Images per batch, all from one bucket. auto: the largest that passes at once."""

    accum: Annotated[int, Within(1, 10**6)] = 1
    """Batches per optimizer step. Gradients are averaged over all images."""

    epochs: Annotated[float, Within(0, 10**6, above=True)] | None = None
    """Planned length in epochs, instead of --steps. Default: 3 for te and both."""

    steps: Annotated[int, Within(1, MOST_STEPS)] | None = None
    """Planned length in optimizer steps. Default: 1000000 for unet."""

    stop_after: Count | None = None
    """Stop after this step. The planned length and all learning rates stay the same."""

    optimizer: Optimizer = "lion"
    """dlion is Lion that finds its learning rate (dadaptation 3.2). adamw is torch's."""

    lr: Rate | None = None
    """Learning rate, 1e-10 to 0.1. Default: 5e-6 for unet, 3e-6 for te and both. For dlion a factor
    of the rate that it finds, 0.01 to 100. Default: 1."""

    warmup: str | None = None
    """Steps (200), percent of the plan (10%), or epochs (0.5e). Default: 10%; for unet at most
    200."""

    scheduler: Scheduler = "constant"
    """Learning rate from the end of the warm-up to the planned end. rex falls late."""

    lr_floor: Annotated[float, Within(0, 3e38)] | None = None
    """Learning rate at the planned end, for linear, cosine and rex. Default: 0."""

    betas: tuple[Share, Share] | None = None
    """Decay rates of the moving averages. Default: 0.9 0.99 for lion, else 0.9 0.999."""

    weight_decay: Annotated[float, Within(0, 1000)] = 0.0
    """Decoupled weight decay."""

    d_max: Annotated[float, Within(1e-6, 1, above=True)] | None = None
    """Upper limit of dlion's d. Default: no limit."""

    d_growth: Annotated[float, Within(1, 10**6, above=True)] | None = None
    """Largest factor by which dlion's d may grow in one step. Default: no limit."""

    ema: bool = False
    """Keep two moving averages of the weights on the CPU; `xlsd-train ema` derives others."""

    ema_every: Count | None = None
    """With --ema: update the averages every this many steps. Default: 1."""

    ema_snapshots: Count | None = None
    """With --ema: keep at most this many snapshots of the averages in RUN/ema. Default: 12."""

    def last_step(self, planned: int) -> int:
        """The step at which a run ends: its planned length, or --stop-after if that is earlier."""
        return min(planned, self.stop_after or planned)

    def check(self) -> None:
        """Raise UserError for options that contradict each other, or that have no effect."""
        kind, floor = self.optimizer, self.lr_floor
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"--steps {self.steps} and --epochs {self.epochs:g} both give the planned length; "
                f"leave one out"
            )
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {self.betas} are not within 0 to 1")
        for option, value in (("--d-max", self.d_max), ("--d-growth", self.d_growth)):
            if value is not None and kind != "dlion":
                raise UserError(f"{option} is for --optimizer dlion, not {kind}; leave it out")
        if floor is not None and self.scheduler == "constant":
            raise UserError(
                f"--lr-floor {floor:g} is never reached by a constant rate; leave it out, or use "
                f"--scheduler linear, cosine or rex"
            )
        for name in ("ema_every", "ema_snapshots"):
            if getattr(self, name) is not None and not self.ema:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} does nothing without --ema")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(CheckedOptions):
    """Objective."""

    objective: Kind | None = None
    """eps: noise. v: velocity, with zero terminal SNR. flow: rectified flow. Default: --model's
    own."""

    loss_weight: Weighting = "none"
    """Loss weight by timestep. min-snr is for eps and v (v's last timestep then weighs 0), debiased
    for eps."""

    min_snr_gamma: Annotated[float, Within(0, 10**6, above=True)] | None = None
    """With --loss-weight min-snr: timesteps of a higher SNR weigh less. Default: 5."""

    noise_offset: Annotated[float, Within(0, 10)] = 0.0
    """Standard deviation of a random shift of each noise channel, e.g. 0.05, for darker and
    brighter images."""

    timesteps: Literal["uniform", "stratified"] = "uniform"
    """uniform: sample independently per image. stratified: spread evenly across the batch, for a
    less noisy gradient."""

    normalize_latents: bool = False
    """Normalise each latent channel to mean 0 and standard deviation 1, by the store's statistics,
    which are saved with the model."""

    def check(self) -> None:
        """Raise UserError for a loss weight that the objective does not have."""
        if self.objective is not None:
            check_weighting(self.objective, self.loss_weight)
        if self.min_snr_gamma is not None and self.loss_weight != "min-snr":
            raise UserError(
                f"--min-snr-gamma {self.min_snr_gamma:g} does nothing with --loss-weight "
                f"{self.loss_weight}; add --loss-weight min-snr or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(CheckedOptions):
    """Memory and precision."""

    memory: Memory = "fastest"
    """How a batch passes; `xlsd-train plan` compares them. fastest: the fastest plan that fits.
    plain: store all activations. cheap: recompute norms and activation functions. feed-forward:
    also the feed-forward projection. sliced, largest: recompute layer by layer and step each layer
    in the backward pass; largest uses slices of one image."""

    micro_batch: Count | None = None
    """Images per pass, or per slice of the widest layers. Default: as many as fit."""

    attention: AttentionChoice = "auto"
    """sdpa: torch's scaled_dot_product_attention. Its fp32 kernel on CUDA replaces each product by
    three on TF32 tensor cores. exact: IEEE fp32 matmuls over blocks of queries. auto: the faster
    one where plans are measured, else sdpa."""

    momentum: MomentumChoice = "auto"
    """Where lion and dlion keep their state. streamed: in CPU memory, copied to the GPU when a step
    needs it, bit-equal to resident. auto: the faster one."""

    measure: bool = True
    """With --memory fastest on a GPU: time the best plans on throwaway data before step 1."""

    remeasure: bool = False
    """Measure again what was measured before with these options; and on a CPU, given --vram."""

    vram: Annotated[float, Within(1, 10**4, above=True)] | None = None
    """GPU memory in GB to plan for and not to exceed. Default: what is free; no limit on a CPU."""

    precision: Precision = "fp32"
    """fp32: TF32 off. bf16: autocast over fp32 weights."""

    channels_last: bool = False
    """Use channels-last memory for convolutions. Their kernels round differently."""

    compile: bool = False
    """Fuse norms, activation functions and additions with torch.compile, before step 1. Needs a C++
    compiler on a CPU, and Triton on a GPU."""

    def check(self) -> None:
        """Raise UserError for exact attention in a precision that is not exact."""
        if self.attention == "exact" and self.precision != "fp32":
            raise UserError(
                f"--attention exact computes in fp32, not in {self.precision}; use --attention "
                f"sdpa or --precision fp32"
            )


def check_weighting(objective: Kind, weighting: Weighting) -> None:
    """Raise UserError for a loss weight that is not defined for this objective."""
    known: dict[Weighting, tuple[Kind, ...]] = {"min-snr": ("eps", "v"), "debiased": ("eps",)}
    if objective not in known.get(weighting, (objective,)):
        raise UserError(
            f"--loss-weight {weighting} is defined for {' and '.join(known[weighting])}, not for "
            f"--objective {objective}; use --loss-weight none"
        )
