"""The diffusion itself. Pure: latents, noise and timesteps in, noisy latents and loss out.

Every objective mixes x_t = signal_t x_0 + sigma_t noise and has the network predict a mixture of
both; they differ in the two factors, in what is predicted, and in what a timestep's error weighs.
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
    """What is trained, as tables by timestep. Calls on any slice of a batch give the same values.

    Timesteps are first..first + count - 1, and what the network is told.
    """

    kind: Kind
    signal: Tensor  # f32 [first + count], factor of the latents in x_t
    sigma: Tensor  # f32, factor of the noise
    weight: Tensor  # f32, what a timestep's squared error weighs
    first: int  # the first timestep: 0, but 1 for flow, whose timestep 0 has no noise to predict
    scheduler_config: dict[str, Any]  # what samples this model rightly in diffusers

    @property
    def count(self) -> int:
        """How many timesteps there are."""
        return len(self.signal) - self.first

    def to(self, device: torch.device) -> "Objective":
        """The same with its tables on a device."""
        signal, sigma, weight = (x.to(device) for x in (self.signal, self.sigma, self.weight))
        return replace(self, signal=signal, sigma=sigma, weight=weight)

    def record(self, before: dict[str, Any]) -> ObjectiveRecord:
        """For config.json: what is predicted, and what the scheduler's config said before."""
        said, says = map(_in_words, (before, self.scheduler_config))
        return {"kind": self.kind, "before": said, "anew": said != says}

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
    """The objective on a model's noise schedule; None is what the model predicts already.

    Raises UserError where the model's scheduler or the weighting does not allow it.
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
            f"--loss-weight {weighting} is not finite where the model's scheduler leaves no signal "
            f"(rescale_betas_zero_snr); take --objective v, or --loss-weight none"
        )
    return Objective(kind, signal, sigma, weight, 0, config)


def predicts(scheduler_config: dict[str, Any]) -> Kind:
    """What a model was trained to predict. Raises UserError for what is not trained here."""
    said = prediction_type(scheduler_config)
    if said not in _PREDICTIONS:
        raise UserError(
            f"the model's scheduler says prediction_type {said}, which is not trained here; say "
            f"what it is to learn to predict with --objective"
        )
    return _PREDICTIONS[said]


def _in_words(scheduler_config: dict[str, Any]) -> str:
    said = prediction_type(scheduler_config)
    ends = said == "v_prediction" and not has_zero_snr(scheduler_config)
    return f"{said} without zero terminal SNR" if ends else said


def alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """abar_t, f32 [T] (DDPM, eq. 4); SD1.5's betas are scaled_linear.

    With rescale_betas_zero_snr those of arXiv 2305.08891, algorithm 1: abar_T is 0.
    """
    scheduler: Any = DDPMScheduler.from_config(scheduler_config)
    abar: Tensor = scheduler.alphas_cumprod
    return abar


def loss_weights(kind: Kind, weighting: Weighting, gamma: float, snr: Tensor) -> Tensor:
    """What each timestep's squared error weighs, f32 [T], by its signal-to-noise ratio.

    min-snr (arXiv 2303.09556, section 3.4): min(SNR, gamma) / SNR for eps and
    min(SNR, gamma) / (SNR + 1) for v, both of them min(SNR, gamma) on the error of x_0. So a v
    model's last timestep, all noise, weighs nothing.
    debiased (arXiv 2310.08442): 1 / sqrt(SNR) for eps. SNR counts as at most 1000, as in kohya's
    sd-scripts, with which XLLSD was trained; of SD1.5's timesteps that changes the first.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "debiased":
        return snr.clamp(max=SNR_CAP).rsqrt()
    clamped = snr.clamp(max=gamma)
    return clamped / (snr + 1 if kind == "v" else snr)
