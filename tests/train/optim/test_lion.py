"""Our optimizers equal those of the libraries bit for bit."""

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import lion_pytorch
import pytest
import torch
from dadaptation.dadapt_lion import DAdaptLion
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xlsd_train.optim.lion
from xlsd_train.optim.factory import allocate, finish
from xlsd_train.optim.lion import DLion, Lion, chunks

SHAPES = [(3,), (64, 32, 3, 3), (1,), (700, 33), (5, 4), (129,)]
RATES = {"Lion": 1e-3, "DLion": 1.0, "DAdaptLion": 1.0}


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    made[1].data = made[1].data.to(memory_format=torch.channels_last)
    return made


def gradients(step: int) -> list[torch.Tensor]:
    """Of very different sizes, one way with noise; at odd steps the last parameter has none."""
    made = []
    for i, shape in enumerate(SHAPES):
        way = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + i))
        made.append((way + noise) * 10.0 ** (i - 4))
    made[0][0] = 0.0
    return made[: -(step % 2)] if step % 2 else made


def steps(optimizer: Any, given: list[Parameter], count: int, first: int = 0) -> Iterator[Any]:
    """Step it `count` times; yields after each."""
    for step in range(first, first + count):
        for group in optimizer.param_groups:
            group["lr"] = RATES[type(optimizer).__name__] * min(1.0, (step + 1) / 5)
        for parameter in given:
            parameter.grad = None
        for parameter, gradient in zip(given, gradients(step), strict=False):
            parameter.grad = gradient.clone()
        optimizer.step()
        finish(optimizer)
        yield optimizer


def assert_equal(ours: Any, theirs: Any, mine: Sequence[Any], its: Sequence[Any]) -> None:
    for a, b in zip(mine, its, strict=True):
        assert torch.equal(a, b)
        for key, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][key], value), key


@pytest.mark.parametrize("chunk", [1, 20_000, 2**24])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_lion_is_lion_pytorchs_to_the_bit(
    decay: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", chunk)
    mine, its = parameters(), parameters()
    ours = Lion(mine, lr=1e-3, weight_decay=decay)
    theirs = lion_pytorch.Lion(its, lr=1e-3, weight_decay=decay)
    for _ in zip(steps(ours, mine, 6), steps(theirs, its, 6), strict=True):
        assert_equal(ours, theirs, mine, its)


@pytest.mark.parametrize("chunk", [1, 20_000, 2**24])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_dlion_is_dadaptations_to_the_bit(
    decay: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", chunk)
    mine, its = parameters(), parameters()
    ours = DLion(mine, weight_decay=decay)
    theirs = DAdaptLion(its, betas=(0.9, 0.999), weight_decay=decay)
    seen = set()
    for _ in zip(steps(ours, mine, 40), steps(theirs, its, 40), strict=True):
        assert_equal(ours, theirs, mine, its)
        for key in ("d", "k", "numerator_weighted"):
            assert ours.param_groups[0][key] == theirs.param_groups[0][key], key
        seen.add(ours.param_groups[0]["d"])
    assert len(seen) > 3, "d must have grown for this to show anything"


def test_a_step_without_any_gradient_changes_nothing() -> None:
    mine, its = parameters(), parameters()
    ours, theirs = DLion(mine), DAdaptLion(its)
    for optimizer, given in ((ours, mine), (theirs, its)):
        optimizer.step()
        finish(optimizer)
        for parameter in given:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        finish(optimizer)
    assert_equal(ours, theirs, mine, its)
    assert ours.param_groups[0]["k"] == theirs.param_groups[0]["k"] == 0


def test_d_is_capped_and_its_growth_limited() -> None:
    def ds(**limits: Any) -> list[float]:
        mine = parameters()
        return [o.param_groups[0]["d"] for o in steps(DLion(mine, **limits), mine, 40)]

    free = ds()
    assert free[-1] > 1.5 * free[0]
    capped = ds(d_max=1.2e-6)
    assert max(capped) == 1.2e-6
    slow = ds(d_growth=1.01)
    assert all(1 <= b / a <= 1.01 + 1e-12 for a, b in itertools.pairwise(slow))
    assert slow[-1] > slow[0]
    assert slow[-1] < free[-1]
    assert ds(d_max=math.inf, d_growth=math.inf) == free


def test_d_of_a_step_is_read_at_its_start_and_a_parameter_taken_once() -> None:
    mine = parameters()
    optimizer = DLion(mine)
    for _ in steps(optimizer, mine, 30):
        pass
    optimizer.zero_grad()
    before = optimizer.param_groups[0]["d"]
    assert before > 1e-5
    for parameter, gradient in zip(mine, gradients(30), strict=True):
        parameter.grad = gradient
        optimizer.step()
        assert optimizer.param_groups[0]["d"] == before
        parameter.grad = None
    mine[0].grad = gradients(30)[0]
    with pytest.raises(RuntimeError, match="stepped twice"):
        optimizer.step()


def test_chunks_are_bounded_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 150)
    made = parameters()
    for parameter in made[:-1]:
        parameter.grad = torch.zeros_like(parameter)
    found = list(chunks(made))
    assert [id(p) for chunk in found for p in chunk] == [id(p) for p in made[:-1]]
    sizes = [sum(p.numel() for p in chunk) for chunk in found]
    assert sizes == [3, 64 * 32 * 9, 1, 700 * 33, 20]
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 64 * 32 * 9 + 3)
    assert [len(chunk) for chunk in chunks(made)] == [2, 1, 1, 1]


def test_no_temporary_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at every operation of a step over many equal tensors."""
    monkeypatch.setattr(xlsd_train.optim.lion, "CHUNK", 4000)
    for kind in (Lion, DLion):
        given = [Parameter(torch.zeros(1000)) for _ in range(40)]
        optimizer = kind(given, lr=1e-3)
        allocate(optimizer)
        for parameter in given:
            parameter.grad = torch.ones_like(parameter)
        with Live() as live:
            optimizer.step()
        assert 4000 <= live.most <= 5000 + 2 * len(given) + 10, kind  # and one tensor's abs()


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements of the tensors that operations make and that still live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in before:
                self.alive[id(tensor)] = storage.nbytes() // 4
                weakref.finalize(tensor, self.alive.pop, id(tensor), None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
