from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.demo.pipeline import make_networks
from xlsd_cache.errors import UserError
from xlsd_train.config import sd15
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.loader import Batch
from xlsd_train.memory import meta_step
from xlsd_train.memory.choose import asked, cap_card, choose, largest, mean_size, memory_limit
from xlsd_train.memory.gpus import CARDS, card_named, device_name, known_as, shown_cards
from xlsd_train.memory.meta_step import CudaMode, MetaStep
from xlsd_train.memory.planner import GIB, WAYS, Asked, Planner, last
from xlsd_train.step.backend import MemoryPlan
from xlsd_train.step.blocks import Mode

UNET = TrainConfig(phase="unet").resolved()
SIZE = (32, 32)


@cache
def configs() -> tuple[Any, Any]:
    unet, text_encoder = make_networks("nano", 600)
    return unet.config, text_encoder.config.to_dict()


@cache
def planner(phase: str = "unet", optimizer: str = "lion") -> Planner:
    config: Any = TrainConfig(phase=phase, optimizer=optimizer)  # type: ignore[arg-type]
    return Planner(config.resolved(), *configs(), workspaces=False)


@cache
def sd15_planner() -> Planner:
    return Planner(UNET, {"in_channels": 4, **sd15.UNET}, sd15.TEXT_ENCODER)


@pytest.mark.slow
def test_less_is_kept_the_more_is_done_again() -> None:
    found = [
        planner().predict(MemoryPlan(way, 8), 8, SIZE) for way in ("plain", "cheap", "feed-forward")
    ]
    sliced = planner().predict(MemoryPlan("sliced", 1), 8, SIZE)
    peaks = [x.peak for x in (*found, sliced)]
    assert peaks == sorted(peaks, reverse=True)
    assert found[0].factor == found[1].factor == 1 < found[2].factor < 1.06
    assert 1.2 < sliced.factor < 1.4


@pytest.mark.slow
def test_items_add_up_and_are_what_they_say() -> None:
    unet, text_encoder = make_networks("nano", 600)
    nbytes, frozen = (sum(4 * p.numel() for p in m.parameters()) for m in (unet, text_encoder))
    items = planner().predict(MemoryPlan("cheap", 2), 8, SIZE).items
    for name, exact in (("weights", nbytes), ("gradients", nbytes), ("optimizer", nbytes)):
        assert exact <= items[name] < 1.1 * exact, name  # each tensor takes multiples of 512 bytes
    assert frozen <= items["frozen weights"] < 1.1 * frozen
    assert planner("unet", "dlion").predict(MemoryPlan("cheap", 2), 8, SIZE).items["optimizer"] == (
        2 * items["optimizer"]
    )
    sliced = planner().predict(MemoryPlan("sliced", 2), 8, SIZE).items
    assert sliced.get("gradients", 0) < 0.5 * nbytes  # only one layer's, where the most is held


def test_a_second_micro_batch_finds_the_gradients_of_the_first() -> None:
    once = planner().predict(MemoryPlan("cheap", 4), 4, SIZE)
    twice = planner().predict(MemoryPlan("cheap", 4), 8, SIZE)
    assert twice.peak > once.peak
    assert planner().predict(MemoryPlan("cheap", 4), 12, SIZE).peak == twice.peak
    assert twice.tflop == pytest.approx(2 * once.tflop)


def test_the_fastest_plan_keeps_as_much_as_fits() -> None:
    plan, parts = planner(), []
    peaks = {way: plan.predict(MemoryPlan(way, 16), 16, SIZE).peak for way in ("plain", "cheap")}
    for limit in (peaks["plain"], peaks["cheap"], peaks["cheap"] - 1):
        found = plan.fastest(16, SIZE, limit, Asked())
        assert found is not None
        assert found.peak <= limit
        parts.append((found.plan, found.passes))
    assert parts[:2] == [(MemoryPlan("plain", 16), 1), (MemoryPlan("cheap", 16), 1)]
    assert parts[2][0] != MemoryPlan("cheap", 16)
    least = min(plan.predict(MemoryPlan(way, 1), 16, SIZE).peak for way in WAYS)
    assert plan.fastest(16, SIZE, least, Asked()) is not None
    assert plan.fastest(16, SIZE, least - 1, Asked()) is None


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    for way in ("plain", "cheap", "feed-forward", "sliced"):
        plan = MemoryPlan(way, 1)
        limit = planner().predict(plan, 1, SIZE).peak + 20 * 2**20
        count = planner().largest_batch(plan, SIZE, limit)
        for batch, fits in ((count, True), (count + 1, False)):
            passing = plan if way == "sliced" else MemoryPlan(way, batch)
            assert (planner().predict(passing, batch, SIZE).peak <= limit) == fits


@pytest.mark.slow
def test_interpolated_footprints_are_those_of_real_runs() -> None:
    """A batch that was never run is predicted to the byte."""
    for plan in (
        MemoryPlan("plain", 7),
        MemoryPlan("cheap", 7),
        MemoryPlan("feed-forward", 7),
        MemoryPlan("sliced", 1),
    ):
        batch = 7 if plan.way != "sliced" else 41
        meta_step = planner()._meta_step
        direct = meta_step._log(plan, batch, SIZE)
        assert meta_step(plan, batch, SIZE).peak() == direct.peak()
        assert meta_step(plan, batch, SIZE).tflop == pytest.approx(direct.tflop)


@pytest.mark.parametrize("most", [None, 1, 7, 8, 100])
@pytest.mark.parametrize("limit", [0, 1, 3, 4, 5, 8, 63])
def test_last_is_the_last_that_fits(limit: int, most: int | None) -> None:
    expected = limit if most is None else min(limit, most)
    assert last(lambda n: n <= limit, most) == expected
    assert last(lambda n: n <= limit, most, start=32) == expected


def test_what_the_run_may_take_of_a_card() -> None:
    """22 GiB of 24, as measured in practice; 11 of 12; and 1 is always left."""
    for vram, usable in ((24, 22), (12, 11), (8, 7)):
        assert memory_limit(float(vram)) == usable * GIB
    assert memory_limit(None, torch.device("cpu")) is None


def test_the_largest_pictures_decide() -> None:
    assert largest({"512x512": 9, "576x448": 100, "320x704": 5}) == (64, 64)
    assert largest({"448x576": 1, "320x704": 5}) == (72, 56)
    assert mean_size({"512x512": 1, "256x512": 3}) == (1 + 3 / 2) / 4


def test_without_a_limit_nothing_is_predicted() -> None:
    def never() -> Planner:
        raise AssertionError

    for given, plan in (
        ({}, MemoryPlan("plain", 32)),
        ({"memory": "cheap", "micro_batch": 8}, MemoryPlan("cheap", 8)),
        ({"memory": "sliced"}, MemoryPlan("sliced", 4)),
        ({"memory": "largest"}, MemoryPlan("sliced", 1)),
    ):
        config = replace(UNET, **given)
        assert choose(config, never, {"512x512": 99}, 1, None) == (32, plan, None)
    with pytest.raises(UserError, match="--batch auto needs a memory limit.*--vram"):
        choose(replace(UNET, batch="auto"), never, {"512x512": 99}, 1, None)


@pytest.mark.slow
def test_automatic_batches_are_as_many_as_pass_at_once() -> None:
    limit = planner().predict(MemoryPlan("sliced", 4), 24, SIZE).peak
    buckets = {"256x256": 1000}
    batch, plan, found = choose(replace(UNET, batch="auto"), planner, buckets, 1, limit)
    assert batch == planner().largest_batch(MemoryPlan("sliced", 4), SIZE, limit) >= 24
    assert found is not None
    assert found.plan == plan
    assert found.peak <= limit
    assert choose(replace(UNET, batch="auto"), planner, {"256x256": 5}, 1, limit)[0] == 5
    assert choose(replace(UNET, batch="auto"), planner, buckets, 2, limit)[0] == 2 * batch


def test_a_batch_that_cannot_fit_is_refused_with_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"32 images of 256x256 does not fit.* GiB.*lower --batch"):
        choose(UNET, planner, {"256x256": 99}, 1, 1000.0)


def test_sd15_on_24_gb() -> None:
    """512x512, fp32, Lion, 22.0 GiB: a single pass of 224; 32 within 12 GB, or at full speed."""
    planner, size = sd15_planner(), (64, 64)
    assert planner.predict(MemoryPlan("sliced", 4), 224, size).peak <= 22 * GIB
    assert planner.predict(MemoryPlan("sliced", 4), 32, size).peak <= 11 * GIB
    full = planner.predict(MemoryPlan("cheap", 11), 32, size)
    assert full.peak <= 22 * GIB
    assert full.factor == pytest.approx(1)


def test_streamed_momentum_lets_small_cards_train() -> None:
    """SD1.5, 512x512, fp32, Lion, batch 32: 12 GB without more FLOPs, 8 GB at all."""
    planner, size = sd15_planner(), (64, 64)
    full = planner.predict(MemoryPlan("cheap", 3, momentum="streamed"), 32, size)
    assert full.peak <= 11 * GIB
    assert full.factor == pytest.approx(1)
    least = MemoryPlan("sliced", 1, momentum="streamed")
    assert planner.predict(least._replace(momentum="resident"), 32, size).peak > 9 * GIB
    assert planner.predict(least, 32, size).peak <= 7 * GIB
    found = planner.fastest(32, size, 11 * GIB, asked(UNET))
    assert found is not None
    assert (found.plan.momentum, found.factor < 1.1) == ("streamed", True)
    assert 3.2 * GIB < found.host < 3.4 * GIB
    assert f"{found.host / GIB:.2f} GiB of pinned CPU memory" in str(found)


def test_streamed_momentum_is_chosen_only_where_it_is_faster() -> None:
    plan, both = planner(), Asked(momentum=("resident", "streamed"))
    resident = plan.predict(MemoryPlan("plain", 16), 16, SIZE)
    streamed = plan.predict(MemoryPlan("plain", 16, momentum="streamed"), 16, SIZE)
    others = {name: x for name, x in resident.items.items() if name != "optimizer"}
    assert {name: x for name, x in streamed.items.items() if name != "optimizer"} == others
    assert (resident.host, resident.tflop) == (0, streamed.tflop)
    slower = {card: streamed.seconds[card] - resident.seconds[card] for card in CARDS}
    assert all(extra >= 0 for extra in slower.values())
    found = plan.fastest(16, SIZE, resident.peak, both)
    assert found is not None
    assert found.plan == resident.plan
    assert {x.plan.momentum for x in plan.candidates(16, SIZE, resident.peak, both)} == (
        {"resident", "streamed"}
    )


def test_copies_take_time_where_nothing_else_runs() -> None:
    """3.2 GiB of state take longer over PCIe 4 than the update, but not than the backward pass."""
    planner, size = sd15_planner(), (64, 64)
    for way, longer in (("cheap", True), ("sliced", False)):
        plan = MemoryPlan(way, 4)  # type: ignore[arg-type]
        here, there = (
            planner.predict(plan._replace(momentum=x), 32, size).seconds["RTX 4090"]
            for x in ("resident", "streamed")
        )
        assert 0.05 < there - here < 0.15 if longer else there == here


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ({}, ("resident", "streamed")),
        ({"momentum": "streamed"}, ("streamed",)),
        ({"momentum": "resident"}, ("resident",)),
        ({"optimizer": "adamw"}, ("resident",)),
    ],
)
def test_where_the_momentum_may_be(given: Any, offered: tuple[str, ...]) -> None:
    assert asked(replace(UNET, **given)).momentum == offered


@pytest.mark.slow
def test_sd15s_text_encoder_on_24_gb() -> None:
    config = TrainConfig(phase="te").resolved()
    planner = Planner(config, {"in_channels": 4, **sd15.UNET}, sd15.TEXT_ENCODER)
    assert planner.predict(MemoryPlan("sliced", 4), 256, (64, 64)).peak <= 22 * GIB


@pytest.fixture
def one_card(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """A driver that has one card of 24 GiB, 18 of them free; what fractions it was asked for."""
    asked: list[tuple[float, int]] = []
    total = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: total)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (18 * GIB, 24 * GIB))
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda *x: asked.append(x), raising=False
    )
    return asked


@pytest.mark.parametrize(
    ("device", "index"), [(torch.device("cuda"), 0), (torch.device("cuda", 0), 0),
                          (torch.device("cuda", 3), 3)],
)  # fmt: skip
def test_a_card_is_limited_whether_or_not_its_device_has_an_index(
    one_card: list[tuple[float, int]], device: torch.device, index: int
) -> None:
    """Accelerate's device of the only card has none, and torch wants one."""
    cap_card(12.0, device)
    cap_card(48.0, device)
    assert one_card == [(0.5, index), (1.0, index)]


def test_the_reserve_is_the_same_without_vram(one_card: list[tuple[float, int]]) -> None:
    free = memory_limit(None, torch.device("cuda"))
    assert free == memory_limit(18.0) == 16.5 * GIB
    assert not one_card


def test_a_card_is_known_by_its_whole_name() -> None:
    assert card_named("NVIDIA GeForce RTX 4090") == CARDS["RTX 4090"]
    assert card_named("NVIDIA H100 80GB HBM3") == CARDS["H100"]
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
                 "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
                 "NVIDIA GeForce RTX 4080 SUPER", ""):  # fmt: skip
        assert card_named(name) is None


@pytest.mark.parametrize(("gib", "known"), [(8, None), (12, "RTX 3060")])
def test_a_smaller_card_of_the_same_name_is_not_known(
    gib: int, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    assert known_as(device_name()) == known
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    shown = [known] if known else []
    assert shown_cards() == [*shown, "RTX 3090", "RTX 4090", "RTX 5090", "H100"]


def test_few_blocks_take_as_long_as_one_on_each_processor() -> None:
    """Of equal ones on an H200, in ms: with 128 and fewer 60.3, with 256 75.5."""
    blocks = np.array([32.0, 48.0, 88.0, 128.0, 256.0])
    times = 75.5 * (blocks / 256) / CARDS["H200"].busy(blocks)
    assert times == pytest.approx([60.3, 60.3, 60.3, 60.3, 75.5], abs=0.05)


def test_deterministic_attention_of_few_images_leaves_a_card_idle() -> None:
    """One block for each head of an image: the nano model's two, so two images fill 4 of 128."""
    tables = {}
    for on in (True, False):
        config = TrainConfig(phase="unet", deterministic=on).resolved()
        made = Planner(config, *configs(), workspaces=False)
        tables[on] = {n: made.predict(MemoryPlan("plain", n), 64, SIZE).seconds for n in (2, 64)}
    for card in CARDS:
        slower = {n: tables[True][n][card] / tables[False][n][card] for n in (2, 64)}
        assert slower[2] >= slower[64] >= 1
    rough = TrainConfig(phase="unet", precision="bf16").resolved()
    prints = Planner(rough, *configs(), workspaces=False)._meta_step(
        MemoryPlan("plain", 2), 6, SIZE
    )
    counted = sorted({int(x) for x in prints.blocks if x})
    assert counted == [2 * 6]  # its kernel has others, so no time follows from them


ON_A_CARD: list[tuple[Any, tuple[tuple[int, ...], ...]]] = [
    (F.conv2d, ((1, 4, 8, 8), (4, 4, 3, 3))),
    (F.linear, ((2, 4), (3, 4))),
    (torch.matmul, ((2, 4), (4, 3))),
    (partial(F.group_norm, num_groups=2), ((1, 4, 8, 8),)),
    (partial(F.layer_norm, normalized_shape=(4,)), ((2, 4),)),
    (partial(F.interpolate, size=(16, 16)), ((1, 4, 8, 8),)),
    (partial(F.softmax, dim=-1), ((2, 4),)),
    (F.silu, ((2, 4),)),
    (F.gelu, ((2, 4),)),
    (torch.add, ((2, 4), (2, 4))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_on_meta_tensors_casts_as_cuda_does(dtype: torch.dtype) -> None:
    """Each function gives, under CUDA's own autocast on fake tensors, what it gives here."""
    for function, shapes in ON_A_CARD:
        with torch.autocast("cpu", torch.bfloat16), CudaMode():
            ours = function(*(torch.empty(x, dtype=dtype, device="meta") for x in shapes))
        with FakeTensorMode(), torch.no_grad():
            given = [torch.empty(x, dtype=dtype, device="cuda") for x in shapes]
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            try:
                theirs = function(*given)
            finally:
                torch.set_autocast_enabled("cuda", False)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), function


def test_all_that_cuda_casts_is_known() -> None:
    """Whatever a step calls and CUDA's autocast has a kernel for is among what is cast here."""
    called: set[str] = set()

    class Seen(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    made = MetaStep(UNET, *configs(), workspaces=False)
    step, made._backend.mode = made._step, CudaMode()
    with torch.device("meta"), made._backend.mode, Seen():
        latents = torch.empty(2, 4, 8, 8)
        ids = torch.zeros(2, 77, dtype=torch.int64)
        step._loss(Batch(0, "", 0.0, 0, 2, latents, latents, ids[:, 0], ids), Mode("cheap"))
    ops = torch._C._dispatch_get_all_op_names()
    cast = {
        name.split("::")[1].split(".")[0]
        for name in ops
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
    }
    known = {f.__name__ for f in meta_step._IN_BF16 | meta_step._IN_FP32}
    in_fp32_anyway = {"exp", "sum"}  # of timesteps, and of the loss
    assert {"conv2d", "linear", "group_norm", "layer_norm"} <= called & cast
    assert called & cast <= known | in_fp32_anyway


@pytest.mark.parametrize("way", ["cheap", "sliced"])
@pytest.mark.slow
def test_bf16_keeps_half_of_most_and_rebuilds_in_it(way: Any) -> None:
    rough = TrainConfig(phase="both", precision="bf16").resolved()
    exact = TrainConfig(phase="both").resolved()
    peaks = {}
    for config in (rough, exact):
        made = Planner(config, *configs(), workspaces=False)
        peaks[config.precision] = made.predict(MemoryPlan(way, 4), 4, SIZE).items["activations"]
    assert 0.4 < peaks["bf16"] / peaks["fp32"] < 0.95
