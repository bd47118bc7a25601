"""Choose a run's batch and memory plan by its options, its images and the GPU's free memory."""

from collections.abc import Callable, Mapping
from math import ceil

import torch

from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Bucket
from xlsd_train.config.train import TrainConfig
from xlsd_train.memory.meta_step import Size
from xlsd_train.memory.planner import GIB, REFERENCE, SLICES, WAYS, Asked, Planner, Prediction
from xlsd_train.step.backend import MemoryPlan, Momentum, Way
from xlsd_train.step.blocks import Attention

Measure = Callable[[Planner, int, Size], MemoryPlan | None]  # for so many samples of a process


def asked(config: TrainConfig) -> Asked:
    """The plans that --memory, --micro-batch, --attention and --momentum allow."""
    way: Way | None = None
    micro_batch = config.micro_batch
    if config.memory == "largest":
        way, micro_batch = "sliced", micro_batch or 1
    elif config.memory != "fastest":
        way = config.memory
    attention: Attention = "sdpa" if config.attention == "auto" else config.attention
    momentum: tuple[Momentum, ...] = ("resident", "streamed")
    if config.momentum != "auto":
        momentum = (config.momentum,)
    elif config.optimizer == "adamw":
        momentum = ("resident",)
    return Asked(way, micro_batch, (attention,), momentum)


def choose(
    config: TrainConfig, planner: Callable[[], Planner], buckets: Mapping[str, int], processes: int,
    limit: float | None, card: str | None = None, measure: Measure | None = None,
) -> tuple[int, MemoryPlan, Prediction | None]:  # fmt: skip
    """(batch, each process's plan, its prediction) of a new run.

    `buckets` maps names to numbers of images; the largest bucket decides. `limit` is in bytes;
    without one nothing is predicted. The plan is the one that `measure` finds, else the one
    predicted to be the fastest on the card. Raises UserError if nothing fits.
    """
    ask = asked(config)
    way, micro_batch = ask.way, ask.micro_batch
    if limit is None:
        if config.batch == "auto":
            raise UserError("--batch auto needs a memory limit, and no GPU was found; add --vram")
        share = ceil(config.batch / processes)
        default = SLICES[0] if way == "sliced" else share
        plan = MemoryPlan(way or "plain", micro_batch or default, ask.attention[0], ask.momentum[0])
        return config.batch, plan, None
    plans, size = planner(), largest(buckets)
    if config.batch == "auto":
        plan = MemoryPlan(way or WAYS[-1], micro_batch or SLICES[0], ask.attention[0])
        most = plans.largest_asked(plan, size, limit, ask)
        batch = max(1, min(processes * most, sum(buckets.values())))
    else:
        batch = config.batch
    share = ceil(batch / processes)
    if measure and (found := measure(plans, share, size)):
        return batch, found, plans.predict(found, share, size)
    fastest = plans.fastest(share, size, limit, ask, card or REFERENCE)
    if fastest is None:
        tightest = plans.predict(
            MemoryPlan(way or WAYS[-1], micro_batch or 1, ask.attention[0], ask.momentum[-1]),
            share, size,
        )  # fmt: skip
        raise UserError(
            f"a batch of {share} images of {8 * size[1]}x{8 * size[0]} does not fit into "
            f"{limit / GIB:.2f} GiB ({tightest}); lower --batch, leave out --memory and "
            f"--micro-batch, or raise --vram"
        )
    return batch, fastest.plan, fastest


def largest(buckets: Mapping[str, int]) -> Size:
    """Height and width of the latents of the bucket with the most pixels."""
    sizes = [Bucket.parse(name).latent_size for name in buckets]
    return max(sizes, key=lambda size: (size[0] * size[1], size[1]))


def mean_size(buckets: Mapping[str, int]) -> float:
    """Mean pixels of the images, of those of the largest bucket."""
    sizes = {name: Bucket.parse(name).latent_size for name in buckets}
    pixels = sum(sizes[name][0] * sizes[name][1] * count for name, count in buckets.items())
    height, width = largest(buckets)
    return pixels / (height * width * sum(buckets.values()))


def cap_card(gib: float, device: torch.device) -> None:
    """Let this process allocate at most `gib` GiB of a GPU."""
    # The device of the only GPU has no index, and torch needs one here.
    index = torch.cuda.current_device() if device.index is None else device.index
    share = gib * GIB / torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)


def memory_limit(vram: float | None, device: torch.device | None = None) -> float | None:
    """Bytes that torch's tensors may take of `vram` GiB, or of what a GPU has free.

    A twelfth, at least 1 GiB, is left to the CUDA context, libraries and fragmentation. None if
    `vram` is None and the device is no GPU.
    """
    if vram is None:
        if device is None or device.type != "cuda":
            return None
        vram = torch.cuda.mem_get_info(device)[0] / GIB
    return (vram - max(1.0, vram / 12)) * GIB
