"""A v-prediction file in k-diffusion, by its formulas (v 0.1.1: external.py, sampling.py)."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from xlsd_train.config import sd15
from xlsd_train.export.ldm_file import LAST_ALPHA_BAR, marks, noise_schedule, single_file
from xlsd_train.step.objective import alphas_cumprod
from xlsd_train.weights.lazy_tensors import write_tensors
from xlsd_train.weights.locate import locate_model
from xlsd_train.weights.network import build_network
from xlsd_train.weights.parts import CONFIGS
from xlsd_train.weights.prediction_type import scheduler_for

V = scheduler_for("v", sd15.SCHEDULER)
PLAIN_V = {**sd15.SCHEDULER, "prediction_type": "v_prediction"}
FLOW = scheduler_for("flow", sd15.SCHEDULER)
STEPS = 5
Network = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in a single file, as one that predicts v."""
    parts = locate_model(str(model))
    assert parts.text_encoder is not None
    assert parts.vae is not None
    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    tensors = single_file(parts.unet, parts.text_encoder, parts.vae, V, torch.float32)
    configs = {part.kind: part.config for part in (parts.unet, parts.text_encoder, parts.vae)}
    write_tensors(path, tensors, {CONFIGS: json.dumps(configs)})
    return path


@pytest.fixture(scope="module")
def network(file: Path) -> Network:
    """(x, timestep) -> what the file's UNet predicts, with the same text for all."""
    unet = build_network(locate_model(str(file)).unet)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)

    @torch.no_grad()
    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = unet(x, timestep, encoder_hidden_states=states).sample
        return out

    return predict


class Wrapper:
    """CompVisVDenoiser and CompVisDenoiser: x and sigma in, an estimate of the image out."""

    def __init__(self, network: Network, abar: Tensor, v: bool) -> None:
        self.network, self.v = network, v
        self.log_sigmas = ((1 - abar) / abar).sqrt().log()  # of DiscreteSchedule

    def sigmas(self, count: int) -> Tensor:
        """DiscreteSchedule.get_sigmas: evenly in time, and 0 at the end."""
        t = torch.linspace(len(self.log_sigmas) - 1, 0, count)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        log = (1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]
        return torch.cat([log.exp(), torch.zeros(1)])

    def timestep(self, sigma: Tensor) -> Tensor:
        """DiscreteSchedule.sigma_to_t, by interpolation."""
        distance = sigma.log() - self.log_sigmas[:, None]
        low = distance.ge(0).cumsum(0).argmax(0).clamp(max=len(self.log_sigmas) - 2)
        first, second = self.log_sigmas[low], self.log_sigmas[low + 1]
        share = ((first - sigma.log()) / (first - second)).clamp(0, 1)
        found: Tensor = ((1 - share) * low + share * (low + 1)).view(sigma.shape)
        return found

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        scale = 1 / (sigma**2 + 1).sqrt()
        out = self.network(x * scale, self.timestep(sigma[None])[0])
        image: Tensor = out * -sigma * scale + x * scale**2 if self.v else x - out * sigma
        return image


def sample_euler(denoise: Wrapper, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (following - sigma)
    return x


def by_diffusers(network: Network, noise: Tensor, sigmas: list[float] | None) -> Tensor:
    scheduler: Any = EulerDiscreteScheduler.from_config(V, timestep_spacing="linspace")
    if sigmas is None:
        scheduler.set_timesteps(STEPS)
    else:
        scheduler.set_timesteps(sigmas=sigmas)
    x: Tensor = noise * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
    return x


def test_a_v_file_samples_in_k_diffusion_as_in_diffusers(file: Path, network: Network) -> None:
    abar = load_file(file)["alphas_cumprod"]
    denoise = Wrapper(network, abar, v=True)
    sigmas = denoise.sigmas(STEPS)
    assert sigmas[0].item() == pytest.approx(4518.76, abs=0.1)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    drawn = sample_euler(denoise, noise * sigmas[0], sigmas)
    assert drawn.isfinite().all()
    theirs = by_diffusers(network, noise, sigmas.tolist())
    # Rounding over the steps: 1e-5 of the largest on some processors, 1.2e-5 on others.
    assert (drawn - theirs).abs().max() <= 3e-5 * theirs.abs().max()
    # Diffusers' own end of a schedule is another tiny number, so that its first sigma is 4096.
    default = by_diffusers(network, noise, None)
    assert (drawn - default).abs().max() <= 1e-3 * default.abs().max()


def test_a_program_that_takes_it_for_eps_computes_with_numbers_all_the_same(
    file: Path, network: Network
) -> None:
    denoise = Wrapper(network, load_file(file)["alphas_cumprod"], v=False)
    sigmas = denoise.sigmas(STEPS)
    assert sample_euler(denoise, torch.ones(1, 4, 16, 16) * sigmas[0], sigmas).isfinite().all()


@pytest.mark.parametrize("config", [sd15.SCHEDULER, V, PLAIN_V, FLOW,
                                    {**V, "num_train_timesteps": 5000}])  # fmt: skip
def test_every_buffer_is_finite_and_they_agree(config: dict[str, Any]) -> None:
    made = noise_schedule(config)
    assert all(value.isfinite().all() for value in made.values())
    bar = made["alphas_cumprod"].double()
    assert bar.min() >= torch.tensor(LAST_ALPHA_BAR)
    assert (bar.diff() <= 0).all()
    follows = {
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
    }
    for name, value in follows.items():
        assert torch.allclose(made[name].double(), value, rtol=1e-5, atol=1e-4), name
    again = (1 - made["betas"].double()).cumprod(0)
    assert torch.allclose(again, bar, rtol=1e-2, atol=1e-6)


def test_only_the_end_of_a_schedule_is_changed() -> None:
    bar = noise_schedule(V)["alphas_cumprod"]
    assert bar[-1] == torch.tensor(LAST_ALPHA_BAR)
    assert torch.allclose(bar[:-1], alphas_cumprod(V)[:-1], rtol=1e-4, atol=1e-9)


def test_v_alone_is_marked_and_zero_snr_only_where_it_is_so() -> None:
    told = {name: list(marks(it)) for name, it in
            {"v": V, "plain": PLAIN_V, "flow": FLOW, "eps": sd15.SCHEDULER}.items()}  # fmt: skip
    assert told == {"v": ["v_pred", "ztsnr"], "plain": ["v_pred"], "flow": [], "eps": []}
    assert all(value.numel() == 0 for value in marks(V).values())


def test_the_marks_are_in_the_file_and_hurt_nobody(file: Path) -> None:
    held = load_file(file)
    assert held["v_pred"].shape == held["ztsnr"].shape == (0,)
    assert held["alphas_cumprod"][-1] == torch.tensor(LAST_ALPHA_BAR)
