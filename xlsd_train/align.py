"""`xlsd-train align`: `swap`, with the UNet turned so that the new VAE's latents look familiar.

With z the scaled latents of both VAEs at the same pixels, z_old ~ R z_new + b for the rotation R
that is nearest by least squares (orthogonal Procrustes: Schoenemann 1966, Psychometrika 31). Folded
into conv_in and conv_out the UNet sees R x_t and its prediction is turned back by R^T. The nearest
linear map of any kind fits latents better, and helps worse than none: R alone leaves noise white
and as strong as the timestep says (benchmarks/align.py measures both).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from xlsd_cache import UserError
from xlsd_cache.decode import Rejected, decode, header_of
from xlsd_cache.encode import to_input
from xlsd_cache.precision import device_of, set_precision
from xlsd_cache.sources import image_files
from xlsd_cache.vae import Vae, load_vae, tensors_sha256
from xlsd_train import draw
from xlsd_train.captions import tokenize
from xlsd_train.diffusion import alphas_cumprod, make_objective, predicts
from xlsd_train.export import vae_in, write_model
from xlsd_train.find import Parts, completed
from xlsd_train.fold import Normalisation
from xlsd_train.merge import find_both, merged
from xlsd_train.model_commands import AlignConfig
from xlsd_train.network import build
from xlsd_train.tensors import in_memory
from xlsd_train.text import hidden_states

Pixels = NDArray[np.float64]  # [n, C], scaled latents
SIDE, LEAST = 256, 16  # pixels of the crops; images that a fit and its check need
BANDS = 4  # timesteps at which the loss is measured, evenly spread
FOLDED = ("conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias")


@dataclass(frozen=True)
class Rotation:
    """z_old ~ turn @ z_new + shift."""

    turn: NDArray[np.float64]  # [C, C], orthogonal
    shift: NDArray[np.float64]  # [C]

    @classmethod
    def fit(cls, old: Pixels, new: Pixels) -> "Rotation":
        """The best one, from latents of the same pixels."""
        means = old.mean(axis=0), new.mean(axis=0)
        left, _, right = np.linalg.svd((old - means[0]).T @ (new - means[1]))
        turn = left @ right
        return cls(turn, means[0] - turn @ means[1])

    def r2(self, old: Pixels, new: Pixels) -> NDArray[np.float64]:
        """Of each old channel what part of its variance is met; below 0: a constant is nearer."""
        missed = old - new @ self.turn.T - self.shift
        met: NDArray[np.float64] = 1 - np.square(missed).mean(axis=0) / old.var(axis=0)
        return met

    def fold(self, state: Mapping[str, Tensor], signal: float) -> dict[str, Tensor]:
        """The FOLDED tensors, f64, of a UNet that takes new latents; `state` holds the old ones'.

        x_t holds the shift times the timestep's share of signal, of which a bias can give but one.
        """
        turn, shift = torch.from_numpy(self.turn), torch.from_numpy(self.shift) * signal
        weight, bias, out_weight, out_bias = (state[name].double() for name in FOLDED)
        return {
            "conv_in.weight": torch.einsum("oihw,ij->ojhw", weight, turn),
            "conv_in.bias": bias + weight.sum(dim=(2, 3)) @ shift,
            "conv_out.weight": torch.einsum("ij,ichw->jchw", turn, out_weight),
            "conv_out.bias": out_bias @ turn,
        }


def align(config: AlignConfig) -> Path:
    """Write the model; returns `config.out`. Raises UserError before anything is encoded."""
    device = device_of(config.device)
    print(set_precision("fp32"))
    paths = _paths(config)
    parts, new = find_both(config, own_vae=True)
    old = _vae(parts)
    if predicts(parts.scheduler) != "eps":
        raise UserError(
            f"{config.model} predicts {predicts(parts.scheduler)} and align is for models that "
            f"predict noise, as SD1.5 does; use `xlsd-train swap`"
        )
    if old.sha256 == new.sha256:
        raise UserError(f"{config.model} has the VAE {config.vae} already; there is nothing to do")
    pixels = _pixels(paths)
    half = len(pixels) // 2
    trained = parts.trained or Normalisation.of(old.model.config)
    ours = _latents(old, pixels, device, trained)
    theirs = _latents(new, pixels, device, Normalisation.of(new.model.config))
    rotation = Rotation.fit(_flat(ours[:half]), _flat(theirs[:half]))
    r2 = rotation.r2(_flat(ours[half:]), _flat(theirs[half:]))
    print(
        f"fitted on {half} images; on {len(pixels) - half} others the rotation meets of each old "
        "channel's variance " + " ".join(f"{value:.3f}" for value in r2)
    )
    signal = float(alphas_cumprod(parts.scheduler).sqrt().double().mean())
    before = {name: parts.unet.tensors[name].read() for name in FOLDED}
    after = {name: value.float() for name, value in rotation.fold(before, signal).items()}
    losses = _losses(parts, theirs[half:], [before, after], device)
    print("loss on them at fixed noise: {:.4f} by swap, {:.4f} by align".format(*losses))
    tensors = {**parts.unet.tensors, **{name: in_memory(after[name]) for name in FOLDED}}
    aligned = replace(merged(parts, new), unet=replace(parts.unet, tensors=tensors))
    return write_model(aligned, config.out, False)


def _paths(config: AlignConfig) -> list[Path]:
    """Some of the folder's images, drawn evenly."""
    if not config.images.is_dir():
        raise UserError(f"--images {config.images} is no folder; name one of images")
    there = image_files(config.images)
    if len(there) < LEAST:
        raise UserError(f"--images {config.images} holds {len(there)} images; give {LEAST} or more")
    order = draw.permutation(0, "align images", len(there))[: config.most]
    return [there[i] for i in order.tolist()]


def _pixels(paths: list[Path]) -> NDArray[np.uint8]:  # [n, SIDE, SIDE, 3]
    """Central squares; what cannot be decoded is said and left out."""
    found = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            tqdm.write(f"{path} is left out: {error}")
            continue
        size = header_of(data)
        if not isinstance(size, Rejected):
            width, height = size
            left, top = (width - min(size)) / 2, (height - min(size)) / 2
            box = (left, top, width - left, height - top)
            pixels = decode(data, size, box, (SIDE, SIDE))
            if not isinstance(pixels, Rejected):
                found.append(pixels)
                continue
            size = pixels
        tqdm.write(f"{path} is left out: {size.reason}, {size.detail}")
    if len(found) < LEAST:
        raise UserError(f"of {len(paths)} images {len(found)} can be read; {LEAST} are needed")
    return np.stack(found)


def _vae(parts: Parts) -> Vae:
    """The model's own; SD's where a single file has none."""
    if parts.vae is None:
        return load_vae("sd")
    module = build(vae_in(parts)).requires_grad_(False)
    return Vae(parts.source, parts.source, module, tensors_sha256(module.state_dict()))


@torch.no_grad()
def _latents(
    vae: Vae, pixels: NDArray[np.uint8], device: torch.device, scaling: Normalisation
) -> Tensor:
    """Scaled latents, f32 [n, C, h, w], on the CPU."""
    vae.model.to(device)
    raw = [
        vae.encode(to_input(torch.from_numpy(pixels[i : i + 1])).to(device)).cpu()
        for i in tqdm(range(len(pixels)), desc=f"encoding with {vae.name}", unit="image")
    ]
    vae.model.cpu()
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (scaling.mean, scaling.std))
    return (torch.cat(raw) - mean) / std


def _flat(latents: Tensor) -> Pixels:
    flat: Pixels = latents.movedim(1, -1).reshape(-1, latents.shape[1]).double().numpy()
    return flat


@torch.no_grad()
def _losses(
    parts: Parts, latents: Tensor, folds: list[dict[str, Tensor]], device: torch.device
) -> list[float]:
    """The mean loss without a caption with each of these FOLDED tensors, on equal noise."""
    whole = completed(parts)
    assert whole.text_encoder is not None
    unet, text_encoder = build(whole.unet).to(device), build(whole.text_encoder)
    tokenizer = CLIPTokenizer.from_pretrained(str(whole.tokenizer))
    length = text_encoder.config.max_position_embeddings
    states = hidden_states(text_encoder, tokenize(tokenizer, [""], length), parts.clip_skip)
    objective = make_objective(None, "none", 0.0, parts.scheduler).to(device)
    totals: list[Any] = [[] for _ in folds]
    for band in range(BANDS):
        timestep = torch.tensor([int((band + 0.5) / BANDS * objective.count)], device=device)
        noise = draw.noise(
            0, np.arange(len(latents)) + band * len(latents), tuple(latents.shape[1:])
        )
        for total, folded in zip(totals, folds, strict=True):
            unet.load_state_dict(folded, strict=False)
            for one, its_noise in zip(latents, noise, strict=True):
                noisy, target, weight = objective.corrupt(
                    one[None].to(device), its_noise[None].to(device), timestep
                )
                predicted = unet(noisy, timestep, states.to(device), return_dict=False)[0]
                total.append(objective.loss(predicted, target, weight).item())
    return [float(np.mean(total)) for total in totals]
