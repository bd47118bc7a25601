from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support import train
from tests.support.sessions import Open
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.model.loading import load_bundle
from xlsd_train.model.text_encoder import hidden_states, stretch, stretched
from xlsd_train.step.blocks import Mode
from xlsd_train.step.layers import STATES
from xlsd_train.training.session import Session


@pytest.fixture
def encoder(model: Path) -> Any:
    return CLIPTextModel.from_pretrained(model / "text_encoder", num_hidden_layers=2).eval()


def ids(session: Session, *texts: str) -> torch.Tensor:
    return session.source.captions.tokenize(list(texts))


@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_is_an_encoder_with_fewer_layers(encoder: Any, skip: int) -> None:
    """Its last layers gone, its final norm kept: what the common programs compute."""
    config = type(encoder.config)(**{**encoder.config.to_dict(), "num_hidden_layers": 2 - skip})
    shorter: Any = CLIPTextModel(config).eval()
    shorter.load_state_dict(encoder.state_dict(), strict=not skip)
    input_ids = torch.randint(0, 99, (3, 77))
    expected = shorter(input_ids).last_hidden_state
    assert torch.equal(hidden_states(encoder, input_ids, skip), expected)


@pytest.mark.parametrize("settings", [{}, {"clip_skip": 1}, {"tokens": 248, "clip_skip": 1}])
def test_samples_see_the_states_that_training_sees(
    open_run: Open, tmp_path: Path, settings: dict[str, Any]
) -> None:
    session, seen = open_run(phase="te", sample_steps=1, **settings), []
    unet, step = session.model.unet, session.take_step

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None))

    with unet.register_forward_pre_hook(keep, with_kwargs=True):
        session.sampler(session.model, tmp_path, 0, session.accelerator)
    batch = session.source.make(session.batch_order.slot(0))
    (layer,) = (layer for layer in step.layers if layer.output == STATES)
    of_samples, of_training = seen, layer.run(Mode(), batch.input_ids)
    assert len(of_samples) == len(session.sampler.prompts) == 4
    length = settings.get("tokens", 77)
    assert of_training.shape[1:] == (length, 32)
    for prompt, states in zip(session.sampler.prompts, of_samples, strict=True):
        for text, got in zip(("", prompt), states, strict=True):
            assert torch.equal(got, step.model.encode(ids(session, text))[0])
    # and training's batch is what each caption alone gives, to rounding
    for one, states in zip(batch.input_ids, of_training, strict=True):
        assert torch.allclose(step.model.encode(one[None])[0], states, atol=1e-5)


def test_without_skipping_samples_are_diffusers_own(open_run: Open, tmp_path: Path) -> None:
    session = open_run(sample_steps=2)
    model = session.model
    pipeline: Any = StableDiffusionPipeline(
        vae=model.vae.model, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(model.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    prompt = session.sampler.prompts[0]
    theirs, none = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, True)
    for text, expected in ((prompt, theirs), ("", none)):
        assert torch.equal(session.model.encode(ids(session, text)), expected)


def test_what_is_skipped_does_not_train(open_run: Open, tmp_path: Path) -> None:
    session = open_run(phase="te", clip_skip=1)
    before = {key: v.clone() for key, v in session.model.text_encoder.state_dict().items()}
    assert not [name for name in session.named if "layers.1." in name]
    session.take_step([session.source.make(session.batch_order.slot(0))], 1e-3)
    changed = {
        key
        for key, value in session.model.text_encoder.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {name.removeprefix("text_encoder.") for name in session.named}
    with pytest.raises(UserError, match="--clip-skip 2 leaves none of the text encoder's 2 layers"):
        open_run(clip_skip=2, out=tmp_path / "none")


def test_skipped_layers_train_under_every_plan(open_run: Open, tmp_path: Path) -> None:
    """To the bit where the sums are the same; sliced, to a gradient's rounding."""
    results = []
    for memory in ("plain", "cheap", "sliced"):
        session = open_run(phase="te", clip_skip=1, memory=memory, out=tmp_path / memory)
        batch = session.source.make(session.batch_order.slot(0))
        loss, norm = session.take_step([batch], 1e-3)
        results.append((loss.item(), norm.item(), session.model.weights("text_encoder")))
    plain, cheap, sliced = results
    assert plain[:2] == cheap[:2]
    assert sliced[:2] == pytest.approx(plain[:2], rel=1e-5)
    for name, value in plain[2].items():
        assert torch.equal(value, cheap[2][name]), name


def written_out(positions: torch.Tensor) -> torch.Tensor:
    """The published scheme a position at a time: 20 stay, then four for each one."""
    rows, last = [], len(positions) - 1
    for place in range(20 + 4 * (len(positions) - 20)):
        if place < 20:
            rows.append(positions[place])
            continue
        whole, quarters = divmod(place - 20, 4)
        here = positions[20 + whole]
        step = positions[21 + whole] - here if 20 + whole < last else here - positions[last - 1]
        rows.append(here + step * quarters / 4)
    return torch.stack(rows)


@given(st.integers(22, 90), st.integers(1, 5), st.integers(0, 2**31))
def test_stretching_is_the_published_formula(n: int, width: int, seed: int) -> None:
    positions = torch.randn((n, width), generator=torch.Generator().manual_seed(seed))
    got = stretched(positions)
    assert got.shape == (20 + 4 * (n - 20), width)
    assert torch.allclose(got, written_out(positions), atol=1e-5)
    assert torch.equal(got[:20], positions[:20])  # exactly: they are the knowledge
    assert torch.equal(got[20::4], positions[20:])


def test_a_stretched_encoder_reads_248_tokens_and_the_first_20_alike(encoder: Any) -> None:
    input_ids = torch.randint(0, 99, (2, 77))
    before = hidden_states(encoder, input_ids, 0)
    old = encoder.embeddings.position_embedding.weight.clone()
    stretch(encoder, 248)
    assert encoder.config.max_position_embeddings == 248
    assert encoder.get_parameter("embeddings.position_embedding.weight").shape == (248, 32)
    assert torch.equal(encoder.embeddings.position_embedding.weight, stretched(old))
    after = hidden_states(encoder, torch.nn.functional.pad(input_ids, (0, 171)), 0)
    assert after.shape == (2, 248, 32)
    assert torch.allclose(after[:, :20], before[:, :20], atol=1e-5)  # causal attention
    assert not torch.allclose(after[:, 30:77], before[:, 30:77], atol=1e-3)
    stretch(encoder, 248)  # it is so already
    with pytest.raises(UserError, match="--tokens 77: this text encoder reads 248 tokens"):
        stretch(encoder, 77)


@pytest.mark.parametrize("phase", ["unet", pytest.param("te", marks=pytest.mark.slow)])
def test_a_checkpoint_of_a_stretched_encoder_needs_no_flag(
    model: Path, store: Path, tmp_path: Path, phase: str
) -> None:
    given = ["--phase", phase, "--batch", 4, "--data", store, "--sample-every", 0, "--steps", 2]
    first, second = tmp_path / "first", tmp_path / "second"
    stretched_run = [*given, "--tokens", 248, "--lr", 1e-3, "--out", first, "--model", model]
    assert train(*stretched_run, "--stop-after", 1) == 0
    assert train(*stretched_run) == 0
    assert train(*given, "--model", first, "--out", second) == 0
    tokenizer = CLIPTokenizer.from_pretrained(second / "base" / "tokenizer")
    assert tokenizer.model_max_length == 248
    with LatentStore.open(store) as ours:
        loaded = load_bundle(str(first), None, ours.identity)
    assert loaded.tokens == 248
    positions = loaded.text_encoder.embeddings.position_embedding.weight
    start = CLIPTextModel.from_pretrained(model / "text_encoder")
    expected = stretched(start.get_parameter("embeddings.position_embedding.weight").detach())
    assert torch.equal(positions, expected) == (phase == "unet")
    assert torch.allclose(positions, expected, atol=1e-2)
