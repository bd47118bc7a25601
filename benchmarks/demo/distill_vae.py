"""Distil a VAE of a few hundred thousand weights from a teacher with SDXL's latent space.

`benchmarks/demo/vae` is such a VAE: an AutoencoderKL with SDXL's 8x, 4-channel layout and scaling
factor, small enough to ship and to run on a laptop. Images decoded from its latents are
recognisable. Its teacher was TAESDXL (MIT, Ollin Boer Bohan), its images 121 free photos. It was
made by an earlier version of this script: a new run gives a similar VAE, not the same bytes.

    python -m benchmarks.demo.distill_vae PHOTOS TAESDXL_FOLDER OUT --steps 10000
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageOps
from torch import Tensor

SCALING_FACTOR = 0.13025  # SDXL's: latents times this have a spread near 1


def student() -> AutoencoderKL:
    """A VAE with SDXL's kinds of blocks and 317 k weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=512,
        scaling_factor=SCALING_FACTOR,
    )


def random_crops(photos: list[Image.Image], n: int, size: int, rng: np.random.Generator) -> Tensor:
    """N random crops at random scales, half of them mirrored: f32 [n, 3, size, size] in [-1, 1]."""
    crops = []
    for i in rng.integers(len(photos), size=n):
        photo = photos[i]
        side = size * float(rng.uniform(1, max(1.0, min(photo.size) / size)))
        x, y = (float(rng.uniform(0, length - side)) for length in photo.size)
        crop = photo.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
        crops.append(np.asarray(ImageOps.mirror(crop) if rng.random() < 0.5 else crop))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def with_latents(teacher: AutoencoderTiny, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and the teacher's latents, unscaled: TAESDXL's own scaling factor is 1."""
    return x, teacher.encode(x).latents / SCALING_FACTOR


def losses(vae: AutoencoderKL, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Losses of the latents against the teacher's, and of pixels decoded from both halves."""
    mean = vae.encode(x).latent_dist.mean
    half = len(x) // 2
    y = vae.decode(torch.cat([mean[:half], z[half:]])).sample
    edges = [F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3)]
    return {
        "latents": F.mse_loss(mean * SCALING_FACTOR, z * SCALING_FACTOR),
        "pixels": F.mse_loss(y, x) * 4,
        "edges": (edges[0] + edges[1]) * 0.5,  # differences of neighbouring pixels, against blur
    }


def main(
    photos: tyro.conf.Positional[Path],
    teacher: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    steps: int = 10_000,
    batch: int = 8,
    size: int = 96,
    lr: float = 2e-3,
    seed: int = 0,
) -> None:
    """Train for STEPS (about half a second each on one core), then save to OUT."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = []
    for path in sorted(photos.iterdir()):
        if path.suffix.lower() in {".jpg", ".png", ".webp"}:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
            images.append(image)
    held_out, images = images[::10], [image for i, image in enumerate(images) if i % 10]
    tiny = AutoencoderTiny.from_pretrained(teacher).requires_grad_(False)
    vae = student()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    # The teacher costs ten times the student, so its crops are used about 32 times each.
    pool = [with_latents(tiny, random_crops(images, 1, size, rng)) for _ in range(32 * batch)]
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = lr * min(1, (step + 1) / 200) * decay
        if step % 4 == 0:
            fresh = with_latents(tiny, random_crops(images, 1, size, rng))
            pool.append(fresh) if len(pool) < 4096 else pool.__setitem__(step // 4 % 4096, fresh)
        chosen = [pool[i] for i in rng.integers(len(pool), size=batch)]
        terms = losses(vae, torch.cat([x for x, _ in chosen]), torch.cat([z for _, z in chosen]))
        optimizer.zero_grad()
        torch.autograd.backward(list(terms.values()))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        for k, v in vae.state_dict().items():
            average[k].lerp_(v, 0.002)
        if step % 500 == 499:
            shown = " ".join(f"{k} {v.item():.4f}" for k, v in terms.items())
            print(f"step {step + 1} of {steps} {shown}", flush=True)
    vae.load_state_dict(average)
    with torch.no_grad():
        # The variance is not learned: near zero, so that sampling equals the mean.
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-20.0)
        x = random_crops(held_out, 64, 256, np.random.default_rng(1))
        z, latents = vae.encode(x).latent_dist.mean, tiny.encode(x).latents
        error = (vae.decode(z).sample.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)) / 4
        r2 = 1 - (z * SCALING_FACTOR - latents).square().mean() / latents.var()
    psnr = (-10 * error.log10()).mean()
    print(f"{step} steps; held-out photos at 256 px: {psnr:.2f} dB, R2 of the latents {r2:.3f}")
    vae.save_pretrained(out)


if __name__ == "__main__":
    tyro.cli(main)
