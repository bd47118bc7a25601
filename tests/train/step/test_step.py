import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from lion_pytorch import Lion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel

from tests.support.sessions import Open
from xlsd_train.data.loader import Batch
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.blocks import Attention
from xlsd_train.step.step import Step
from xlsd_train.training.session import Session

PHASES = ["unet", "te", pytest.param("both", marks=pytest.mark.slow)]


def batches(session: Session, count: int, first: int = 0) -> list[Batch]:
    return [session.source.make(session.batch_order.slot(first + n)) for n in range(count)]


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
    session = open_run()
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


ATTENTIONS: tuple[Attention, ...] = ("sdpa", "exact")
PLANS = [
    MemoryPlan("plain", 2),
    MemoryPlan("cheap", 4),
    MemoryPlan("cheap", 3),
    MemoryPlan("feed-forward", 4),
    MemoryPlan("feed-forward", 1),
    MemoryPlan("sliced", 4),
    MemoryPlan("sliced", 2),
    MemoryPlan("sliced", 1),
]
PLANS += [MemoryPlan(PLANS[i].way, PLANS[i].micro_batch, "exact") for i in (0, 1, 3, 6)]
EXACT = [plan for plan in PLANS if plan[:2] in {("cheap", 4), ("feed-forward", 4)}]  # equal sums


def one_step(session: Session, parts: list[Batch], plan: MemoryPlan) -> tuple[Any, ...]:
    """Loss, gradients and updated weights of one step by a plan; the weights are put back."""
    step, before = session.take_step, weights(session)
    gradients: dict[str, torch.Tensor] = {}
    names = {parameter: name for name, parameter in session.named.items()}

    def look(*_: Any) -> None:
        """Gradients as the optimizer sees them, for some or all parameters."""
        found = {names[p]: p.grad.clone() for p in names if p.grad is not None}
        assert not gradients.keys() & found.keys(), "stepped twice"
        gradients.update(found)

    step.plan = plan
    hook = step.optimizer.register_step_pre_hook(look)
    loss, norm = step(parts, 1e-4)
    hook.remove()
    after = weights(session)
    with torch.no_grad():
        for name, value in session.named.items():
            value.copy_(before[name])
            step.optimizer.state[value]["exp_avg"].zero_()
    return loss.item(), norm.item(), gradients, after


def distance(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> float:
    """Relative difference of all gradients as one vector."""
    assert these.keys() == those.keys()
    pairs = [(these[name].double(), those[name].double()) for name in these]
    squares = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(squares / sum(float(b.square().sum()) for _, b in pairs))


def test_only_what_train_says_trains(open_run: Open) -> None:
    session = open_run(train="unet.attn2,unet.conv_in")
    before = copy.deepcopy(session.model.unet.state_dict())
    for batch in batches(session, 3):
        session.take_step([batch], 1e-3)
    after = session.model.unet.state_dict()
    changed = {f"unet.{key}" for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == session.named.keys()


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_every_plan_gives_the_plain_steps_gradients(open_run: Open, phase: str, accum: int) -> None:
    session = open_run(phase=phase, caption_dropout=0.2)
    parts = batches(session, accum, first=1)
    whole = {x: one_step(session, parts, MemoryPlan("plain", 4, x)) for x in ATTENTIONS}
    loss, norm, gradients, _ = whole["sdpa"]
    for plan in PLANS:
        got_loss, got_norm, got, got_after = one_step(session, parts, plan)
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert got_norm == pytest.approx(norm, rel=1e-5)
        assert distance(got, gradients) < 1e-5, plan
        if plan in EXACT:
            _, _, same, after = whole[plan.attention]
            for name, gradient in same.items():
                assert torch.equal(got[name], gradient), (plan, name)
                assert torch.equal(got_after[name], after[name]), (plan, name)


@pytest.mark.parametrize("phase", PHASES)
def test_in_float64_every_plan_is_the_plain_step_to_rounding(open_run: Open, phase: str) -> None:
    """So what differs in float32 is the order of sums: no worse than in the plain step itself."""
    session = open_run(phase=phase)
    parts = batches(session, 1, first=1)
    single = {plan: one_step(session, parts, plan)[2] for plan in [MemoryPlan("plain", 4), *PLANS]}
    for module in (session.model.unet, session.model.text_encoder):
        module.double()
    for state in session.take_step.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
    twice = [replace(x, latents=x.latents.double(), noise=x.noise.double()) for x in parts]
    tables = {
        name: getattr(session.take_step.objective, name).double()
        for name in ("signal", "sigma", "weight")
    }
    session.take_step.objective = replace(session.take_step.objective, **tables)
    _, _, exact, _ = one_step(session, twice, MemoryPlan("plain", 4))
    own = distance(single.pop(MemoryPlan("plain", 4)), exact)
    for plan, gradients in single.items():
        _, _, got, _ = one_step(session, twice, plan)
        assert distance(got, exact) < 1e-12, plan
        assert distance(gradients, exact) < 2 * own < 1e-5, plan


@pytest.mark.parametrize(
    "optimizer", ["lion", "dlion", pytest.param("adamw", marks=pytest.mark.slow)]
)
def test_stepping_inside_backward_changes_no_bit(
    open_run: Open, optimizer: str, tmp_path: Path
) -> None:
    """The same sliced gradients, stepped layer by layer or all at the end, over three steps."""
    results = []
    for inside in (True, False):
        session = open_run(phase="both", optimizer=optimizer, out=tmp_path / str(inside))
        step = session.take_step
        step.plan = MemoryPlan("sliced", 2)
        for n, batch in enumerate(batches(session, 3)):
            if inside:
                step([batch], 1e-4 * (n + 1))
            else:
                step_at_the_end(step, batch, 1e-4 * (n + 1))
        results.append(weights(session))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def step_at_the_end(step: Step, batch: Batch, lr: float) -> None:
    """One step of all weights, after the backward pass."""
    for group in step.optimizer.param_groups:
        group["lr"] = lr
    kept: dict[Any, torch.Tensor] = {}
    backend = step.backend

    class Keeping(DeviceBackend):
        def apply(self, optimizer: Any, parameters: Any) -> Any:
            for p in parameters:
                if p.grad is not None:
                    kept[p], p.grad = p.grad, None
            return []

    assert isinstance(backend, DeviceBackend)
    step.backend = Keeping(backend.accelerator, step.plan)
    step._sliced([batch], batch.images)
    step.backend = backend
    for p, gradient in kept.items():
        p.grad = gradient
    backend.apply(step.optimizer, list(kept))
    backend.finish(step.optimizer)


class Full(TorchDispatchMode):
    """Memory that is full: no tensor of more than `elements` is given."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.refused = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
        return out


@pytest.mark.parametrize(
    ("plan", "tighter"),
    [
        (MemoryPlan("plain", 4), MemoryPlan("plain", 2)),
        (MemoryPlan("cheap", 4), MemoryPlan("cheap", 2)),
        (MemoryPlan("sliced", 4), MemoryPlan("sliced", 2)),
    ],
)
def test_out_of_memory_tightens_the_plan_and_repeats_the_same_data(
    open_run: Open, plan: MemoryPlan, tighter: MemoryPlan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xlsd")
    session = open_run(phase="both")
    parts = batches(session, 1, first=1)
    loss, _, expected, _ = one_step(session, parts, tighter)
    widest = 4 * session.model.unet.config.block_out_channels[0] * parts[0].latents[0, 0].numel()
    with Full(5 * widest) as full:  # the feed-forward's projection of four does not fit
        got_loss, _, got, _ = one_step(session, parts, plan)
    assert full.refused
    assert session.take_step.plan == tighter
    assert "out of memory with" in caplog.text
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert distance(got, expected) < 1e-5


def test_out_of_memory_in_the_tightest_plan_is_an_error(open_run: Open) -> None:
    session = open_run()
    with Full(100), pytest.raises(torch.OutOfMemoryError):
        one_step(session, batches(session, 1), MemoryPlan("sliced", 1))


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


def test_channels_last_is_the_same_step_to_rounding(open_run: Open, tmp_path: Path) -> None:
    usual = open_run()
    parts = batches(usual, 1, first=1)
    loss, _, expected, _ = one_step(usual, parts, MemoryPlan("plain", 4))
    AcceleratorState._reset_state(reset_partial_state=True)
    other = open_run(channels_last=True, out=tmp_path / "channels last")
    weight = other.model.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for plan in (MemoryPlan("plain", 4), MemoryPlan("cheap", 2), MemoryPlan("sliced", 1)):
        got_loss, _, got, _ = one_step(other, parts, plan)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert distance(got, expected) < 1e-5


def test_precision_changes_the_arithmetic_and_never_the_weights_type(
    open_run: Open, tmp_path: Path
) -> None:
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
