import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.demo.pipeline import make_networks
from benchmarks.lib.flops import FlopCounter
from tests.support import files, train
from xlsd_train.model.text_encoder import hidden_states
from xlsd_train.step import attention
from xlsd_train.step.attention import exact_attention, exact_in

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int]  # queries, keys, heads, width of a head
BOUND = 1.3  # errors against those of torch's own attention
UNET: list[Any] = [
    (n, m, 8, d) for n, d in ((4096, 40), (1024, 80), (256, 160)) for m in (n, 77, 248)
]
UNET[0] = pytest.param(UNET[0], marks=pytest.mark.slow)
ODD = [((37, 23, 2, 5), False), ((4, 1, 3, 1), False), ((1, 1, 1, 1), True), ((19, 19, 1, 8), True)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def given(shape: Shape, batch: int = 1) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, as the linear layers give them."""
    n, m, heads, width = shape
    generator = torch.Generator().manual_seed(n + m)
    sizes = (n, m, m, n)
    return [torch.randn(batch, x, heads * width, generator=generator) for x in sizes]


def results(attend: Attend, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """The output and the gradients of queries, keys and values."""
    *inputs, ones = (x.to(dtype, copy=True) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    out = attend(*leaves)
    torch.autograd.backward(out, ones)
    return [out.detach(), *(x.grad for x in leaves)]


def check_errors(shape: Shape, batch: int, causal: bool) -> None:
    """The exact kernel's errors against float64 are at most those of torch's, times BOUND."""
    tensors, heads = given(shape, batch), shape[2]
    theirs, ours = (
        partial(sdpa, heads=heads, causal=causal),
        partial(exact_attention, heads=heads, causal=causal),
    )
    true = results(theirs, tensors, torch.float64)
    usual, exact = results(theirs, tensors), results(ours, tensors)
    for name, x, y, z in zip(("out", "q", "k", "v"), true, usual, exact, strict=True):
        error, bound = float((z - x).norm() / x.norm()), float((y - x).norm() / x.norm())
        assert error <= BOUND * bound, (name, error, bound)


@pytest.mark.parametrize("shape", UNET, ids=str)
def test_errors_are_those_of_torchs_attention(shape: Shape) -> None:
    check_errors(shape, 2 if shape[0] < 4096 else 1, causal=False)


@pytest.mark.parametrize("tokens", [77, 248])
def test_errors_of_a_text_encoders_attention_are_too(tokens: int) -> None:
    check_errors((tokens, tokens, 12, 64), 2, causal=True)


@pytest.mark.parametrize(("shape", "causal"), ODD, ids=str)
def test_blocks_of_any_size_give_the_formula(
    shape: Shape, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rows of the blocks do not divide the queries."""
    n, m, heads, _ = shape
    tensors = given(shape, 2)
    expected = results(partial(sdpa, heads=heads, causal=causal), tensors, torch.float64)
    for rows in (1, 3, n):
        monkeypatch.setattr(attention, "BLOCK", 4 * heads * m * rows)
        got = results(partial(exact_attention, heads=heads, causal=causal), tensors, torch.float64)
        for x, y in zip(got, expected, strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-13)


def test_its_gradients_are_its_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 4 * 2 * 5 * 2)  # two rows
    inputs = [x.double().requires_grad_() for x in given((7, 5, 2, 3), 2)[:3]]
    for causal in (False, True):
        pairs = inputs if not causal else [x[:, :5] for x in inputs]
        assert torch.autograd.gradcheck(partial(exact_attention, heads=2, causal=causal), pairs)


@pytest.mark.parametrize("shape", [(1024, 1024, 8, 40), (300, 77, 8, 40)], ids=str)
def test_bits_depend_neither_on_the_run_nor_on_the_batch(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on what the memory held before: with NaN in it nothing changes."""
    monkeypatch.setattr(attention, "BLOCK", 2**21)
    tensors, ours = given(shape, 3), partial(exact_attention, heads=shape[2])
    first = results(ours, tensors)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    again = results(ours, tensors)
    alone = results(ours, [x[1:2].clone() for x in tensors])
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[1:2], z)


def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    """And the others are the same bits."""
    *inputs, ones = given((64, 32, 2, 8))
    counts, expected = [], results(partial(exact_attention, heads=2), [*inputs, ones])[1:]
    for needed in [(True, True, True), (True, False, False), (False, False, True)]:
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        q, k, v = leaves
        out = exact_attention(q, k, v, heads=2)
        with FlopCounter() as counter:
            torch.autograd.backward(out, ones)
        counts.append(counter.total)
        for leaf, need, gradient in zip(leaves, needed, expected, strict=True):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    product = 2 * 2 * 64 * 32 * 8
    assert counts == [5 * product, 3 * product, 2 * product]


def test_scores_take_a_block_at_most() -> None:
    """No tensor is larger, whatever the batch; torch's own formula stores all pairs."""
    tensors = given((2048, 1024, 8, 8), 3)
    largest = 0

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Sizes():  # type: ignore[no-untyped-call]
        results(partial(exact_attention, heads=8), tensors)
    assert largest == attention.BLOCK < 4 * 3 * 8 * 2048 * 1024


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("tokens", [77, 248])
@torch.no_grad()
def test_a_text_encoder_attends_exactly_where_it_is_told_to(tokens: int, skip: int) -> None:
    encoder = make_networks("nano", 600)[1]
    config = {**encoder.config.to_dict(), "max_position_embeddings": tokens}
    encoder = CLIPTextModel(CLIPTextConfig.from_dict(config))
    ids = torch.randint(0, 600, (3, tokens), generator=torch.Generator().manual_seed(0))
    usual = hidden_states(encoder, ids, skip)
    with exact_in(encoder):
        exact = hidden_states(encoder, ids, skip)
        saved = encoder.config.to_dict()
    assert torch.equal(hidden_states(encoder, ids, skip), usual)
    assert saved == encoder.config.to_dict()
    assert not torch.equal(exact, usual)
    true = hidden_states(encoder.double(), ids, skip)
    errors = [float((x - true).norm() / true.norm()) for x in (exact, usual)]
    assert errors[0] <= BOUND * errors[1]
    assert math.isclose(errors[1], 0, abs_tol=1e-6)


def test_a_run_with_exact_attention_resumes_to_the_bit(
    arguments: list[object], tmp_path: Path
) -> None:
    """And differs from one without it."""
    usual_words = [*arguments, "--phase", "both", "--steps", 4]
    words = [*usual_words, "--attention", "exact"]
    assert train(*words, "--out", tmp_path / "whole") == 0
    assert train(*words, "--stop-after", 2) == 0
    assert train(*words) == 0
    assert train(*usual_words, "--out", tmp_path / "usual") == 0
    whole, resumed, usual = (
        files(tmp_path / name, "checkpoints/*4/*.safetensors") for name in ("whole", "run", "usual")
    )
    assert len(whole) == 3
    assert whole == resumed != usual
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["plan"][2] == "exact"
    assert "exact attention; only sample images" in record["precision"]
