"""The training step on random weights that benchmarks measure, and the device it runs on."""

import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.demo.pipeline import VAE, Size, make_networks, make_pipeline
from benchmarks.lib.machine import cpu_name
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError
from xlsd_cache.vocabulary import Precision
from xlsd_train.config import sd15
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import Captions
from xlsd_train.data.loader import Batch
from xlsd_train.memory.gpus import card_named, device_name
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.model.latent_scaling import vae_scaling
from xlsd_train.optim.factory import make_optimizer
from xlsd_train.step.backend import DeviceBackend, MemoryPlan
from xlsd_train.step.objective import make_objective
from xlsd_train.step.step import Step

VOCABULARY = {"sd15": 49408}  # the size does not matter for the small models
SMALL_VOCABULARY = 1000


def networks(size: Size, tokens: int = 77) -> tuple[Any, Any]:
    """UNet and text encoder with random weights, for captions of this many tokens."""
    unet, text_encoder = make_networks(size, VOCABULARY.get(size, SMALL_VOCABULARY))
    if tokens != text_encoder.config.max_position_embeddings:
        config = {**text_encoder.config.to_dict(), "max_position_embeddings": tokens}
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(config))
    return unet, text_encoder


def model_of(size: Size, tokens: int = 77) -> ModelBundle:
    """A model without a tokenizer, for random batches."""
    scheduler = dict(DDPMScheduler.from_config(sd15.SCHEDULER).config)
    vae = load_vae(str(VAE))
    unet, text_encoder = networks(size, tokens)
    return ModelBundle(
        unet=unet, text_encoder=text_encoder, source=size, scaling=vae_scaling(vae), vae=vae,
        tokenizer=None, scheduler_config=scheduler, tokenizer_folder=VAE,
    )  # fmt: skip


CAPTIONS = ["woman, solo, smiling, outdoors", "a cup of coffee on a wooden table. it is morning."]


def captions_of(folder: Path) -> Captions:
    """Captions read by the tokenizer of the smallest model, for a model of any size."""
    make_pipeline(folder / "demo", "nano", CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "demo" / "tokenizer")
    return Captions(tokenizer, tokenizer.model_max_length, 0, 0.0)


def step_of(
    model: ModelBundle, config: TrainConfig, plan: MemoryPlan, device: str,
    backend: type[DeviceBackend] = DeviceBackend,
) -> Step:  # fmt: skip
    """The step for resolved options, with weights and optimizer state on the device."""
    named = model.prepare(config.phase)
    model.unet.to(device)
    model.text_encoder.to(device)
    mixed = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=device == "cpu")
    optimizer = make_optimizer(config, named.values(), plan.momentum == "streamed")
    objective = make_objective("eps", "none", 0, model.scheduler_config).to(torch.device(device))
    model.scaling = model.scaling.to(torch.device(device))
    return Step(model, list(named.values()), optimizer, objective, backend(accelerator, plan))


def drawn_batch(model: ModelBundle, batch: int, size: tuple[int, int], device: str) -> Batch:
    """A random batch with latents of this height and width; always the same."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, batch, 4, *size), generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    vocabulary = model.text_encoder.config.vocab_size
    input_ids = torch.randint(0, vocabulary, (batch, model.tokens), generator=generator)
    latents /= model.vae.scaling_factor
    return Batch(0, "memory", 0.0, 0, batch, latents, noise, timesteps, input_ids).to(
        torch.device(device)
    )


def here() -> str:
    """The device of a benchmark: CUDA if there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_of(device: str) -> str:
    """CPU or GPU with driver and CUDA, and the libraries that compute."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "numpy"))
    if device == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads; {libraries}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    cudnn: Any = torch.backends.cudnn
    return f"{card}; CUDA {torch.version.cuda}, cuDNN {cudnn.version()}; {libraries}"


def peak_tflops(precision: Precision, stated: float | None, device: str) -> tuple[float, str]:
    """The peak TFLOP/s of the device at this precision, and its source."""
    if stated:
        return stated, "as stated"
    if device == "cuda":
        name = device_name()
        if card := card_named(name):
            return card.tflops(precision), f"data sheet of the {name}"
        raise UserError(f"the peak rate of {name} is unknown; give it with --peak-tflops")
    side, best = 2048, float("inf")
    a = torch.randn(side, side)
    for _ in range(20):
        begun = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best / 1e12, f"the best of 20 {side}x{side} fp32 matmuls here"
