"""Exact fp32 attention: matmuls over blocks of query rows, whose scores stay in a GPU's L2 cache.

CUDA's fp32 kernel of scaled_dot_product_attention multiplies in TF32, three products for each.
Here cuBLAS multiplies, in IEEE fp32. The backward pass computes each block's scores again, as flash
attention does (arXiv 2205.14135), so that none are stored. Nothing is summed with atomics: equal
inputs give equal bits. A block belongs to one sample, so a sample's result does not depend on the
others in its batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

BLOCK = 32 * 2**20  # bytes of fp32 scores at once; a 4090 has 72 MB of L2 cache, an H100 50 MB
_EXACT = "xlsd-exact"  # to transformers


class Block(NamedTuple):
    """Query rows a:b of one sample, for all heads."""

    sample: int
    a: int
    b: int


# The blocks to compute, of all; memory/meta_step.py sets another that gives one for all.
each_block: Callable[[Sequence[Block]], Iterable[Block]] = iter


def exact_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each head; with `causal` no query sees later keys.

    q [B, n, heads * d], k and v [B, m, heads * d], as linear layers give them -> [B, n, heads * d].
    """
    out: Tensor = _ExactAttention.apply(q, k, v, heads, causal)  # type: ignore[no-untyped-call]
    return out


class _ExactAttention(Function):
    """Saves its inputs and its output, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
        mixed = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, mixed)
        ctx.heads, ctx.causal = heads, causal
        q, k, v, out = (_by_head(x, heads) for x in (q, k, v, mixed))
        scores, mask = _buffer(q, k), _mask(q, k) if causal else None
        for i, a, b in each_block(_blocks(q, k)):
            p = _softmax(q[i, :, a:b], k[i], scores, None if mask is None else mask[a:b])
            _multiply(p, v[i], out[i, :, a:b])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradients = [
            x.new_empty(x.shape) if needed else None
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        q, k, v, out, g = (_by_head(x, ctx.heads) for x in (*ctx.saved_tensors, gradient))
        to_q, to_k, to_v = (None if x is None else _by_head(x, ctx.heads) for x in gradients[:3])
        scores, products = _buffer(q, k), _buffer(q, k)
        mask, scale = _mask(q, k) if ctx.causal else None, q.shape[-1] ** -0.5
        for i, a, b in each_block(_blocks(q, k)):
            rows, to_rows, later = q[i, :, a:b], g[i, :, a:b], min(a, 1)
            p = _softmax(rows, k[i], scores, None if mask is None else mask[a:b])
            if to_v is not None:
                _multiply(p.mT, to_rows, to_v[i], beta=later)
            if to_q is None and to_k is None:
                continue
            # dS = P * (dP - D), with D the rows' sums of dO * O (arXiv 2205.14135, algorithm 4).
            ds = _multiply(to_rows, v[i].mT, products[: p.numel()].view(p.shape))
            ds.sub_((to_rows * out[i, :, a:b]).sum(-1, keepdim=True)).mul_(p)
            if to_q is not None:
                _multiply(ds, k[i], to_q[i, :, a:b], scale)
            if to_k is not None:
                _multiply(ds.mT, rows, to_k[i], scale, later)
        return *gradients[:3], None, None


def _by_head(x: Tensor, heads: int) -> Tensor:  # [B, n, heads * d] -> [B, heads, n, d], a view
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _rows(q: Tensor, k: Tensor) -> int:
    """Rows of a block: as even as possible, and the same for every batch."""
    most = max(1, BLOCK // (4 * q.shape[1] * k.shape[2]))
    return ceil(q.shape[2] / ceil(q.shape[2] / most))


def _blocks(q: Tensor, k: Tensor) -> list[Block]:
    count, rows = q.shape[2], _rows(q, k)
    starts = range(0, count, rows)
    return [Block(i, a, min(a + rows, count)) for i in range(len(q)) for a in starts]


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    """Memory for the scores of a block."""
    return q.new_empty(q.shape[1] * _rows(q, k) * k.shape[2])


def _mask(q: Tensor, k: Tensor) -> Tensor:  # bool [n, m], true where the key is later
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)


def _softmax(q: Tensor, k: Tensor, buffer: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of a block, [heads, rows, m], in the buffer; mask bool [rows, m]."""
    heads, rows, width = q.shape
    scores = buffer[: heads * rows * k.shape[1]].view(heads, rows, -1)
    _multiply(q, k.mT, scores, width**-0.5)
    if mask is not None:
        scores.masked_fill_(mask, -torch.inf)
    # In place: in torch's kernels the thread that writes an element is the last that reads it.
    return torch.softmax(scores, -1, out=scores)


def _multiply(x: Tensor, y: Tensor, out: Tensor, alpha: float = 1.0, beta: int = 0) -> Tensor:
    """Set out to beta * out + alpha * x y. BLAS takes the strides of heads: nothing is copied."""
    return torch.baddbmm(out, x, y, beta=beta, alpha=alpha, out=out)


@contextmanager
def exact_in(text_encoder: Any) -> Iterator[None]:
    """Within the block a CLIP text encoder uses exact attention."""
    before = text_encoder.config._attn_implementation  # noqa: SLF001 (no public name)
    text_encoder.set_attn_implementation(_EXACT)
    try:
        yield
    finally:
        text_encoder.set_attn_implementation(before)


def _in_transformers(
    _: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **__: Any
) -> tuple[Tensor, None]:
    """Causal attention of [B, heads, n, d] -> [B, n, heads * d]; captions are not masked."""
    assert attention_mask is None
    heads = q.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))  # views
    return exact_attention(q, k, v, heads, causal=True), None


AttentionInterface.register(_EXACT, _in_transformers)
