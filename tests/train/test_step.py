import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from lion_pytorch import Lion
from transformers import CLIPTextModel

from tests.train.conftest import Open
from xlsd_cache import UserError
from xlsd_train.batches import Batch
from xlsd_train.session import Session


def batches(session: Session, count: int, first: int = 0) -> list[Batch]:
    return [session.source.make(session.schedule.slot(first + n)) for n in range(count)]


def weights(session: Session) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in session.named.items()}


def reference_loss(model: Path, batch: Batch) -> Any:
    """diffusers' own example, written out: scale, add noise, predict, mean squared error."""
    vae = AutoencoderKL.from_pretrained(model / "vae")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    latents = batch.latents * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        states = text_encoder(batch.input_ids)[0]
    loss = torch.nn.functional.mse_loss(unet(noisy, batch.timesteps, states).sample, batch.noise)
    return loss, unet


def test_the_loss_and_the_lion_step_are_those_of_the_libraries(open_run: Open, model: Path) -> None:
    """Our loss equals diffusers' computation, and our step lion-pytorch's on its gradients."""
    session = open_run(gradient_checkpointing=False)
    (batch,) = batches(session, 1)
    loss, unet = reference_loss(model, batch)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in unet.parameters()])
    Lion(unet.parameters(), lr=1e-4).step()

    got, got_norm = session.take_step([batch], 1e-4)
    assert got == pytest.approx(loss.item(), rel=1e-6)
    assert got_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, value in unet.named_parameters():
        ours = session.named[f"unet.{name}"]
        changed = (ours != value).float().mean().item()
        assert changed < 1e-3, name  # Lion takes signs: rounding of a zero may flip one


@pytest.mark.parametrize("phase", ["unet", "te", "both"])
def test_only_what_the_phase_says_trains(open_run: Open, phase: str) -> None:
    session = open_run(phase=phase)
    model = session.model
    before = {
        name: copy.deepcopy(getattr(model, name).state_dict()) for name in ("unet", "text_encoder")
    }
    session.take_step(batches(session, 1), 1e-3)
    for name, trains in (("unet", phase != "te"), ("text_encoder", phase != "unet")):
        after = getattr(model, name).state_dict()
        changed = [key for key, value in before[name].items() if not torch.equal(value, after[key])]
        assert bool(changed) == trains
        if trains:  # everything that a caption and a latent reach
            assert len(changed) > 0.9 * len(after)
        assert all(p.grad is None for p in getattr(model, name).parameters())


def test_only_what_train_says_trains(open_run: Open) -> None:
    session = open_run(train="unet.attn2,unet.conv_in")
    before = copy.deepcopy(session.model.unet.state_dict())
    for batch in batches(session, 3):
        session.take_step([batch], 1e-3)
    after = session.model.unet.state_dict()
    changed = {f"unet.{key}" for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == session.named.keys()


@pytest.mark.parametrize("phase", ["unet", "te", "both"])
def test_checkpointing_changes_not_one_bit(open_run: Open, tmp_path: Path, phase: str) -> None:
    results = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        session = open_run(phase=phase, gradient_checkpointing=checkpointing, out=out)
        losses = [session.take_step([batch], 1e-3) for batch in batches(session, 3)]
        results.append((losses, weights(session)))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_checkpointing_is_really_on_in_every_phase(
    open_run: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers drops it from modules in eval mode, as a frozen UNet might be left."""
    import torch.utils.checkpoint as checkpointing

    calls = []
    original = checkpointing.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    for phase in ("unet", "te", "both"):
        session = open_run(phase=phase, out=tmp_path / phase)
        calls.clear()
        session.take_step(batches(session, 1), 1e-3)
        assert len(calls) >= 8, phase


def test_accumulating_is_one_larger_batch(open_run: Open) -> None:
    """Also over batches of different sizes and shapes: every image weighs the same."""
    session = open_run()
    parts = batches(session, 4)
    assert len({(batch.bucket, batch.images) for batch in parts}) > 1
    images = sum(batch.images for batch in parts)
    expected = torch.cat([session.take_step.loss(batch).detach() for batch in parts]).mean()
    total = sum(session.take_step.loss(batch).sum() for batch in parts) / images
    assert isinstance(total, torch.Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: value.grad.clone() for name, value in session.named.items() if value.grad is not None
    }
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    session.take_step.optimizer.zero_grad()
    loss, got = session.take_step(parts, 0.0)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert got == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_reaches_no_weight(open_run: Open, value: float) -> None:
    session = open_run()
    (batch,) = batches(session, 1)
    before = weights(session)
    batch.latents[0, 0, 0, 0] = value
    with pytest.raises(UserError, match="the loss of batch 0 is nan|inf"):
        session.take_step([batch], 1e-3)
    assert all(torch.equal(before[name], value) for name, value in weights(session).items())


def test_precision_changes_the_arithmetic_and_never_the_weights_type(
    open_run: Open, tmp_path: Path
) -> None:
    from accelerate.state import AcceleratorState

    exact = open_run()
    (batch,) = batches(exact, 1)
    expected = exact.take_step.loss(batch).detach()
    AcceleratorState._reset_state(reset_partial_state=True)
    rough = open_run(precision="bf16", out=tmp_path / "bf16")
    got = rough.take_step.loss(batch).detach()
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.05
    rough.take_step([batch], 1e-3)
    assert {value.dtype for value in rough.named.values()} == {torch.float32}


def test_every_switch_of_fp32_is_set(open_run: Open) -> None:
    open_run()
    backends: Any = torch.backends
    for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
                    backends.mkldnn.conv, backends.mkldnn.matmul):  # fmt: skip
        assert backend.fp32_precision == "ieee"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flags act on CUDA cards only")
def test_fp32_convolutions_and_matmuls_are_fp32_on_the_card(open_run: Open) -> None:
    open_run(device="cuda")
    torch.manual_seed(0)
    x, w = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), w.double())
    got = torch.nn.functional.conv2d(x.cuda(), w.cuda()).double().cpu()
    assert (got - exact).abs().max() / exact.std() < 1e-5  # TF32 gives about 1e-3
    a = torch.randn(512, 512)
    got = (a.cuda() @ a.cuda()).double().cpu()
    exact = a.double() @ a.double()
    assert (got - exact).abs().max() / exact.std() < 1e-5


def test_an_empty_share_of_a_batch_is_no_loss(open_run: Open) -> None:
    session = open_run()
    (batch,) = batches(session, 1)
    none = Batch(**{
        **batch.__dict__, "latents": batch.latents[:0], "noise": batch.noise[:0],
        "timesteps": batch.timesteps[:0], "input_ids": batch.input_ids[:0],
    })  # fmt: skip
    assert session.take_step.loss(none).shape == (0,)
