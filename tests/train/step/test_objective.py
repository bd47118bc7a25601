import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from tests.support import files, metrics, printed, train
from tests.support.sessions import Open
from xlsd_cache.errors import UserError
from xlsd_train.step.objective import Objective, alphas_cumprod, make_objective
from xlsd_train.weights.prediction_type import scheduler_for

Config = dict[str, Any]
STEPS = torch.arange(1000)


@pytest.fixture
def config(model: Path) -> Config:
    """SD1.5's own scheduler."""
    return dict(DDPMScheduler.load_config(model / "scheduler"))


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and timesteps of 64 samples, the ends among them."""
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 64, 4, 8, 8)
    timesteps = torch.randint(1, 999, (64,))
    timesteps[:2] = torch.tensor([999, 1])
    return latents, noise, timesteps


def diffusers_weight(kind: str, gamma: float, scheduler: Any) -> torch.Tensor:
    """As diffusers' train_text_to_image.py computes it from its compute_snr."""
    snr = compute_snr(scheduler, STEPS)
    clamped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weight: torch.Tensor = clamped / (snr if kind == "eps" else snr + 1)
    return weight


def test_the_schedule_is_sd15s_formula(config: Config) -> None:
    abar = alphas_cumprod(config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert abar.shape == (1000,)
    assert torch.allclose(abar.double(), torch.cumprod(1 - betas, 0), rtol=1e-5)


def test_epsilon_is_diffusers(config: Config, drawn: tuple[torch.Tensor, ...]) -> None:
    objective = make_objective(None, "none", 0, config)
    scheduler: Any = DDPMScheduler.from_config(config)
    noisy, target, weight = objective.corrupt(*drawn)
    assert (objective.kind, objective.first, objective.count) == ("eps", 0, 1000)
    assert torch.equal(noisy, scheduler.add_noise(*drawn))
    assert torch.equal(target, drawn[1])
    assert torch.equal(weight, torch.ones(64))
    assert objective.scheduler_config == config


def test_v_is_diffusers_with_zero_terminal_snr(
    config: Config, drawn: tuple[torch.Tensor, ...]
) -> None:
    objective = make_objective("v", "none", 0, config)
    scheduler: Any = DDPMScheduler.from_config(config)
    scheduler.alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler.betas), 0)
    noisy, target, _ = objective.corrupt(*drawn)
    assert torch.equal(noisy, scheduler.add_noise(*drawn))
    assert torch.equal(target, scheduler.get_velocity(*drawn))
    # At the last timestep there is nothing but noise, so the target is -x_0.
    assert torch.equal(noisy[0], drawn[1][0])
    assert torch.equal(target[0], -drawn[0][0])


def test_flow_is_diffusers_flow_matching(config: Config, drawn: tuple[torch.Tensor, ...]) -> None:
    objective = make_objective("flow", "none", 0, config)
    latents, noise, timesteps = drawn
    timesteps[0] = 1000
    noisy, target, weight = objective.corrupt(latents, noise, timesteps)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    assert (objective.first, objective.count) == (1, 1000)
    assert torch.equal(noisy, scheduler.scale_noise(latents, timesteps.float(), noise))
    assert torch.equal(noisy[0], noise[0])
    assert torch.equal(target, noise - latents)
    assert torch.equal(weight, torch.ones(64))


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_weighs_as_diffusers_does(config: Config, kind: Any) -> None:
    objective = make_objective(kind, "min-snr", 5, config)
    scheduler: Any = DDPMScheduler.from_config(objective.scheduler_config)
    assert torch.allclose(objective.weight, diffusers_weight(kind, 5, scheduler), rtol=1e-5)
    assert torch.isfinite(objective.weight).all()
    if kind == "v":
        assert objective.weight[-1] == 0


def test_debiased_weighs_by_one_over_the_root_of_the_snr(config: Config) -> None:
    weight = make_objective("eps", "debiased", 0, config).weight
    snr = compute_snr(DDPMScheduler.from_config(config), STEPS)
    assert torch.allclose(weight[1:], 1 / snr[1:].sqrt(), rtol=1e-5)
    assert snr[0] > 1000
    assert weight[0].item() == pytest.approx(1000**-0.5)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_any_slice_of_a_batch_has_the_batchs_values(
    config: Config, drawn: tuple[torch.Tensor, ...], kind: Any
) -> None:
    weighting: Any = "none" if kind == "flow" else "min-snr"
    objective = make_objective(kind, weighting, 5, config)

    def losses(part: slice) -> torch.Tensor:
        noisy, target, weight = objective.corrupt(*(values[part] for values in drawn))
        return objective.loss(noisy.tanh().bfloat16(), target, weight)

    whole = losses(slice(None))
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([losses(slice(0, 7)), losses(slice(7, 64))]))


def test_the_loss_is_the_weighted_mean_squared_error_of_each_sample(config: Config) -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 8, 8)
    weight = torch.rand(5)
    objective = make_objective("eps", "none", 0, config)
    each = objective.loss(prediction, target, weight)
    for i in range(5):
        expected = weight[i] * torch.nn.functional.mse_loss(prediction[i], target[i])
        assert each[i].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_the_scheduler_of_samples_turns_a_right_prediction_into_the_image(
    config: Config, kind: Any
) -> None:
    """A network that knows the one image there is, sampled by diffusers from pure noise."""
    objective = make_objective(kind, "none", 0, config)
    scheduler: Any = DPMSolverMultistepScheduler.from_config(objective.scheduler_config)
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    image, x = torch.randn(2, 1, 4, 8, 8)
    for step, t in enumerate(scheduler.timesteps):
        alpha, sigma = objective.signal[t], objective.sigma[t]
        if kind == "flow":  # the solver's own sigma; timesteps are rounded down to whole ones
            sigma = scheduler.sigmas[step]
            alpha = 1 - sigma
        noise = (x - alpha * image) / sigma
        guess = {"eps": noise, "v": alpha * noise - sigma * image, "flow": noise - image}[kind]
        x = scheduler.step(guess, t, x).prev_sample
    assert (x - image).abs().max() < 1e-2


def test_a_models_own_prediction_is_the_default(config: Config) -> None:
    for kind in ("eps", "v", "flow"):
        trained = make_objective(kind, "none", 0, config).scheduler_config
        again = make_objective(None, "none", 0, trained)
        assert again.kind == kind
        assert again.scheduler_config == trained
        back = make_objective("eps", "none", 0, trained)
        assert torch.equal(back.signal, make_objective("eps", "none", 0, config).signal)


def test_a_flow_models_shift_is_kept() -> None:
    told = scheduler_for("flow", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert told["flow_shift"] == 3.0
    assert told["_class_name"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("kind", "weighting", "changes", "told"),
    [
        (None, "none", {"prediction_type": "sample"}, "prediction_type sample"),
        ("flow", "min-snr", {}, "--loss-weight min-snr is defined for eps and v"),
        ("v", "debiased", {}, "--loss-weight debiased is defined for eps, not for --objective v"),
        (None, "debiased", {"prediction_type": "v_prediction"}, "not for --objective v"),
        ("eps", "debiased", {"rescale_betas_zero_snr": True}, "is infinite at"),
        ("v", "none", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has none"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    config: Config, kind: Any, weighting: Any, changes: Config, told: str
) -> None:
    if changes.get("_class_name"):
        config = {}
    with pytest.raises(UserError, match=told):
        make_objective(kind, weighting, 5, {**config, **changes})


def test_the_tables_move_together(config: Config) -> None:
    moved = make_objective("v", "min-snr", 5, config).to(torch.device("meta"))
    assert isinstance(moved, Objective)
    assert {x.device.type for x in (moved.signal, moved.sigma, moved.weight)} == {"meta"}


@pytest.mark.parametrize("objective", [pytest.param("eps", marks=pytest.mark.slow), "v", "flow"])
def test_every_objective_trains_samples_and_says_so_to_diffusers(
    model: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    given = [
        "--phase", "unet", "--batch", 4, "--data", store, "--model", model, "--steps", 3,
        "--sample-every", 3, "--sample-steps", 2, "--lr", 1e-3, "--warmup", 0, "--threads", 1,
        "--objective", objective,
    ]  # fmt: skip
    run = tmp_path / "run"
    assert train(*given, "--out", run, "--stop-after", 1) == 0
    assert train(*given, "--out", run) == 0
    assert train(*given, "--out", tmp_path / "whole") == 0
    assert metrics(run) == metrics(tmp_path / "whole")
    last = "samples/step-00000003/*.png"
    assert files(run, last) == files(tmp_path / "whole", last)
    said = printed(capsys)
    assert f"objective {objective}, uniform timesteps" in said
    assert ("the model was trained to predict epsilon before" in said) == (objective != "eps")
    told = json.loads((run / "base/scheduler/scheduler_config.json").read_text())
    loaded = getattr(diffusers, told["_class_name"]).from_pretrained(run / "base/scheduler")
    prediction = {"eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}[objective]
    assert loaded.config.prediction_type == prediction
    if objective == "v":
        assert loaded.config.rescale_betas_zero_snr
        assert loaded.config.timestep_spacing == "trailing"


def test_every_option_of_the_objective_changes_the_loss(open_run: Open, tmp_path: Path) -> None:
    choices: list[dict[str, Any]] = [
        {}, {"objective": "v"}, {"objective": "flow"}, {"loss_weight": "min-snr"},
        {"loss_weight": "min-snr", "min_snr_gamma": 1.0}, {"loss_weight": "debiased"},
        {"noise_offset": 0.1}, {"timesteps": "stratified"}, {"normalize_latents": True},
    ]  # fmt: skip
    losses = set()
    for i, choice in enumerate(choices):
        session = open_run(out=tmp_path / str(i), **choice)
        with torch.no_grad():
            batch = session.source.make(session.batch_order.slot(0))
            losses.add(session.take_step.loss(batch).sum().item())
    assert len(losses) == len(choices)
