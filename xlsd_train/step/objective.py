"""The diffusion objective: latents, noise and timesteps -> noisy latents, target, loss. Pure.

Every objective mixes x_t = signal_t x_0 + sigma_t noise, and the network predicts a mixture of
both. Objectives differ in the two factors, in the prediction, and in the loss weight of timesteps.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from xlsd_cache.errors import UserError
from xlsd_train.config.optimization import Kind, Weighting, check_weighting
from xlsd_train.runs.record import ObjectiveRecord
from xlsd_train.weights.prediction_type import has_zero_snr, prediction_type, scheduler_for

_PREDICTIONS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}
SNR_CAP = 1000.0


@dataclass(frozen=True)
class Objective:
    """An objective as tables by timestep. Any slice of a batch gets the values of the whole.

    The network's timesteps are first..first + count - 1.
    """

    kind: Kind
    signal: Tensor  # f32 [first + count], factor of the latents in x_t
    sigma: Tensor  # f32, factor of the noise
    weight: Tensor  # f32, loss weight
    first: int  # the first timestep: 0, but 1 for flow, whose timestep 0 has no noise to predict
    scheduler_config: dict[str, Any]  # with which diffusers samples this model

    @property
    def count(self) -> int:
        """Number of timesteps."""
        return len(self.signal) - self.first

    def to(self, device: torch.device) -> "Objective":
        """A copy with its tables on a device."""
        signal, sigma, weight = (x.to(device) for x in (self.signal, self.sigma, self.weight))
        return replace(self, signal=signal, sigma=sigma, weight=weight)

    def record(self, before: dict[str, Any]) -> ObjectiveRecord:
        """For config.json: the prediction now, and that of the scheduler config before."""
        was, now = map(_describe, (before, self.scheduler_config))
        return {"kind": self.kind, "before": was, "anew": was != now}

    def corrupt(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, target, weight f32 [B]) of scaled latents [B, C, h, w] at timesteps [B].

        DDPM (arXiv 2006.11239) eq. 4 for eps and v; rectified flow (arXiv 2209.03003) eq. 1, in the
        direction and with the timesteps sigma = t / T of Stable Diffusion 3 (arXiv 2403.03206).
        """
        signal, sigma = (table[timesteps].view(-1, 1, 1, 1) for table in (self.signal, self.sigma))
        noisy = signal * latents + sigma * noise
        if self.kind == "eps":
            target = noise  # DDPM, eq. 14
        elif self.kind == "v":
            target = signal * noise - sigma * latents  # arXiv 2202.00512, appendix D
        else:
            target = noise - latents  # dx_t / dt of rectified flow, eq. 1
        return noisy, target, self.weight[timesteps]

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean squared error of each sample, f32 [B] (DDPM, eq. 14)."""
        return (prediction.float() - target).square().mean(dim=(1, 2, 3)) * weight


def make_objective(
    kind: Kind | None, weighting: Weighting, gamma: float, scheduler_config: dict[str, Any]
) -> Objective:
    """The objective with a model's noise scheduler. `kind` None: what the model predicts already.

    Raises UserError if the model's noise scheduler or the weighting does not allow it.
    """
    kind = kind or predicts(scheduler_config)
    check_weighting(kind, weighting)
    config = scheduler_for(kind, scheduler_config)
    if kind == "flow":
        count = int(config.get("num_train_timesteps", 1000))
        sigma = torch.arange(count + 1, dtype=torch.float32) / count
        return Objective(kind, 1 - sigma, sigma, torch.ones_like(sigma), 1, config)
    abar = alphas_cumprod(config)
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    weight = loss_weights(kind, weighting, gamma, (signal / sigma).square())
    if not torch.isfinite(weight).all():
        raise UserError(
            f"--loss-weight {weighting} is infinite at the model's last timestep, which has no "
            f"signal (rescale_betas_zero_snr); use --objective v, or --loss-weight none"
        )
    return Objective(kind, signal, sigma, weight, 0, config)


def predicts(scheduler_config: dict[str, Any]) -> Kind:
    """What a model was trained to predict. Raises UserError for an unsupported prediction."""
    kind = prediction_type(scheduler_config)
    if kind not in _PREDICTIONS:
        raise UserError(
            f"the model's scheduler has prediction_type {kind}, which is not supported; add "
            f"--objective for what the model should learn to predict"
        )
    return _PREDICTIONS[kind]


def _describe(scheduler_config: dict[str, Any]) -> str:
    kind = prediction_type(scheduler_config)
    ends = kind == "v_prediction" and not has_zero_snr(scheduler_config)
    return f"{kind} without zero terminal SNR" if ends else kind


def alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """abar_t, f32 [T] (DDPM, eq. 4); SD1.5's betas are scaled_linear.

    With rescale_betas_zero_snr that of arXiv 2305.08891, algorithm 1: abar_T is 0.
    """
    scheduler: Any = DDPMScheduler.from_config(scheduler_config)
    abar: Tensor = scheduler.alphas_cumprod
    return abar


def loss_weights(kind: Kind, weighting: Weighting, gamma: float, snr: Tensor) -> Tensor:
    """Each timestep's loss weight, f32 [T], from its signal-to-noise ratio.

    min-snr (arXiv 2303.09556, section 3.4): min(SNR, gamma) / SNR for eps and
    min(SNR, gamma) / (SNR + 1) for v, both equal to min(SNR, gamma) on the error of x_0. So the
    last timestep of a v model, all noise, has weight 0.
    debiased (arXiv 2310.08442): 1 / sqrt(SNR) for eps. SNR is capped at 1000, as in kohya's
    sd-scripts, with which XLLSD was trained; that changes only SD1.5's first timestep.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "debiased":
        return snr.clamp(max=SNR_CAP).rsqrt()
    clamped = snr.clamp(max=gamma)
    return clamped / (snr + 1 if kind == "v" else snr)
