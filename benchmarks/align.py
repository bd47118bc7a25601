"""Does a linear map folded into the UNet warm-start a swapped VAE? Two small VAEs, one model.

    python benchmarks/align.py --photos FOLDER

A second VAE is trained from nothing as a plain autoencoder; a small SD1.5 learns the latents of the
first, `benchmarks/demo/vae`, is given the second, and goes on as it is or after each of several
warm starts: the same images, noise and seeds. What counts is how many images each needs to come to
the same held-out loss.

With z the scaled latents, z_old ~ A z_new + b by least squares over pixels of tiles that both VAEs
encoded. x_t = s z + sigma eps, so conv_in' = conv_in A takes the noise to A eps, which is white and
of the variance that the timestep says only for an orthogonal A: hence the nearest rotation, by
orthogonal Procrustes (Schoenemann 1966, Psychometrika 31). Maps of 1x1 alone, for one with taps
does not fold into 3x3.
"""

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo.distill_vae import random_crops, student
from benchmarks.demo.pipeline import VAE, Size, make_pipeline, read_captions
from benchmarks.machine import machine
from xlsd_cache import UserError
from xlsd_cache.cli import main as xlsd_cache
from xlsd_train import sd15
from xlsd_train.cli import main as xlsd_train
from xlsd_train.diffusion import alphas_cumprod
from xlsd_train.losses import read_losses

PICTURES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry")
SIDE = 64  # pixels of a tile
Fold = Callable[["Maps", dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class AlignConfig:
    """Move a model from one VAE to another, with and without a warm start."""

    photos: Path | None = None
    """A folder of photos, with captions in .txt or not. Default: six that scikit-image ships."""

    short_side: int = 384
    """Photos are resized to this many pixels, then cut into tiles of 64."""

    vae_steps: int = 1500
    """Of the second VAE's training, 8 crops each."""

    kl: float = 1e-5
    """What the second VAE's KL weighs, in nats a latent value, beside 4 mean squared errors."""

    balance: float = 0.1
    """And what the distance of its latents' covariance from the unit matrix weighs, squared; with
    0 nearly all their variance lies in one direction, as that of no VAE in use does."""

    base_steps: int = 3000
    """Optimizer steps with the first VAE."""

    steps: int = 120
    """Optimizer steps with the second, in each arm."""

    validations: int = 4
    """Spread over them."""

    images: int = 16
    """Held-out tiles that are measured, at ten timesteps each."""

    seeds: int = 3
    """Runs of each arm."""

    batch: int = 16
    """Tiles a step."""

    base_lr: float = 5e-4
    """AdamW's learning rate with the first VAE, falling to 0."""

    lr: float = 2e-4
    """And with the second, constant after 20 steps."""

    size: Size = "demo"
    """Of the model."""

    arms: tuple[str, ...] = ()
    """Only these. Default: all."""

    work: Path | None = None
    """Keep everything here, and go on from what is here. Default: a temporary folder."""


def main(config: AlignConfig, words: list[str]) -> None:
    """Cut, train two VAEs' models, move, tell."""
    torch.set_num_threads(1)
    print(f"machine: {machine('torch', 'diffusers', 'numpy')}")
    print(f"command: {shlex.join(('python', 'benchmarks/align.py', *words))}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        photos = read_photos(config.photos)
        once(folder / "tiles", lambda out: cut(photos, config.short_side, out))
        once(folder / "vae", lambda out: second_vae([p for _, _, p in photos], config, out))
        captions = read_captions(folder / "tiles")
        for name, seed in (("model", 0), ("other", 1)):
            once(folder / name, partial(write_model, config.size, captions, seed))
        for name, vae in (("old", VAE), ("new", folder / "vae")):
            once(folder / name, partial(build, folder / "tiles", vae))
        base = folder / "base"
        train(config, base, folder / "old", folder / "model", 0, config.base_steps, falling=True)
        maps = Maps.fit(*(encoded(folder / "tiles", vae) for vae in (VAE, folder / "vae")))
        tell_base(base, config)
        maps.tell()
        curves = move(config, folder, base, maps)
        tell(config, curves)
    print(f"{time.monotonic() - begun:.0f} s in all")


def once(out: Path, make: Callable[[Path], None]) -> None:
    """Make what is not there yet."""
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(out)


def read_photos(folder: Path | None) -> list[tuple[str, str, Image.Image]]:
    """(name, caption, picture) of each photo."""
    if folder is None:
        return [(x, x, Image.fromarray(np.asarray(getattr(skimage.data, x)()))) for x in PICTURES]
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in {".jpg", ".png", ".webp"}:
            text = path.with_suffix(".txt")
            caption = text.read_text().strip() if text.exists() else path.stem.replace("_", " ")
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            found.append((path.stem, caption, image))
    if not found:
        raise UserError(f"--photos {folder} has no .jpg, .png or .webp")
    return found


def cut(photos: list[tuple[str, str, Image.Image]], short: int, out: Path) -> None:
    """Write all tiles of all photos, none overlapping another."""
    out.mkdir()
    for name, caption, photo in photos:
        scale = short / min(photo.size)
        width, height = (round(side * scale) for side in photo.size)
        image = photo.resize((width, height), Image.Resampling.LANCZOS)
        for y in range(0, height - SIDE + 1, SIDE):
            for x in range(0, width - SIDE + 1, SIDE):
                image.crop((x, y, x + SIDE, y + SIDE)).save(out / f"{name}-{y}-{x}.png")
                (out / f"{name}-{y}-{x}.txt").write_text(caption)


def second_vae(photos: list[Image.Image], config: AlignConfig, out: Path) -> None:
    """The first one's blocks from other random weights; pixels and a small KL, no teacher."""
    small = [photo.copy() for photo in photos]
    for photo in small:
        photo.thumbnail((768, 768), Image.Resampling.LANCZOS)
    torch.manual_seed(1)
    rng, vae = np.random.default_rng(1), student()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    steps = config.vae_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1, pct_start=0.1)
    for _ in range(steps):
        x = random_crops(small, 8, SIDE, rng)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        flat = posterior.mean.movedim(1, -1).flatten(0, -2)
        uneven = (torch.cov(flat.T) - torch.eye(flat.shape[1])).square().sum()
        optimizer.zero_grad()
        loss = 4 * F.mse_loss(y, x) + 0.5 * edges + config.kl * kl + config.balance * uneven
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = random_crops(small, 64, 128, np.random.default_rng(2))
        z = vae.encode(x).latent_dist.mean
        error = (vae.decode(z).sample.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)) / 4
    vae.register_to_config(scaling_factor=1 / z.std().item())  # latent-diffusion's rule
    print(f"second VAE: {-10 * error.log10().mean().item():.2f} dB", file=sys.stderr)
    vae.save_pretrained(out)


def build(tiles: Path, vae: Path, out: Path) -> None:
    """Encode the tiles into a store."""
    call(xlsd_cache, "build", tiles, "--out", out, "--resolution", SIDE, "--vae", vae)


def write_model(size: Size, captions: list[str], seed: int, out: Path) -> None:
    """A small SD1.5 with random weights."""
    make_pipeline(out, size, captions, seed)


def train(
    config: AlignConfig, run: Path, data: Path, model: Path, seed: int, steps: int,
    *more: str, falling: bool = False,
) -> None:  # fmt: skip
    """Train with validation, or go on with what is there."""
    every = max(1, steps // (6 if falling else config.validations))
    call(
        xlsd_train, "--phase", "unet", "--batch", config.batch, "--data", data, "--model", model,
        "--out", run, "--optimizer", "adamw", "--lr", config.base_lr if falling else config.lr,
        "--scheduler", "linear" if falling else "constant", "--warmup", min(20, steps),
        "--steps", steps, "--seed", seed, "--sample-every", 0, "--save-every", steps, "--keep", 1,
        "--threads", 1, "--validate-every", every, "--validation-fraction", 0.05,
        "--validation-images", 32 if falling else config.images, *more,
    )  # fmt: skip


def call(command: Callable[[list[str]], int], *words: object) -> None:
    """Run a command of ours; the tables alone belong on stdout."""
    printed, sys.stdout = sys.stdout, sys.stderr
    try:
        if command(list(map(str, words))):
            raise UserError("see above")
    finally:
        sys.stdout = printed


@torch.no_grad()
def encoded(tiles: Path, folder: Path, most: int = 512) -> NDArray[np.float64]:
    """Scaled latents [pixels, channels] of some tiles."""
    vae = AutoencoderKL.from_pretrained(folder)
    paths = sorted(tiles.glob("*.png"))
    chosen = np.random.default_rng(0).permutation(len(paths))[:most]
    pixels = np.stack([np.asarray(Image.open(paths[i])) for i in chosen])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(x, 64)])
    scaled = (z * vae.config.scaling_factor).permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    found: NDArray[np.float64] = scaled.double().numpy()
    return found


@dataclass(frozen=True)
class Maps:
    """Linear maps between scaled latents as columns, fitted on half the tiles."""

    old_of_new: NDArray[np.float64]  # A, least squares
    new_of_old: NDArray[np.float64]  # least squares the other way
    rotation: NDArray[np.float64]  # orthogonal
    means: tuple[NDArray[np.float64], NDArray[np.float64]]  # of old, of new
    spreads: tuple[NDArray[np.float64], NDArray[np.float64]]  # along the covariance's directions
    r2: dict[str, NDArray[np.float64]]  # of each old channel, on the other half

    @classmethod
    def fit(cls, old: NDArray[np.float64], new: NDArray[np.float64]) -> "Maps":
        """From latents [pixels, channels] of the same tiles."""
        half = len(old) // 2
        means = (old[:half].mean(0), new[:half].mean(0))
        (u, v), (p, q) = ((old[s] - means[0], new[s] - means[1]) for s in
                          (slice(half), slice(half, None)))  # fmt: skip
        a, b = np.linalg.lstsq(v, u)[0].T, np.linalg.lstsq(u, v)[0].T
        left, _, right = np.linalg.svd(u.T @ v)
        rotation = left @ right
        maps = {"least squares": (a, q, p), "rotation": (rotation, q, p), "back": (b, p, q)}
        r2 = {
            name: 1 - np.square(y - x @ m.T).mean(0) / y.var(0) for name, (m, x, y) in maps.items()
        }
        return cls(a, b, rotation, means, (directions(old), directions(new)), r2)

    def tell(self) -> None:
        """What the spaces have in common."""
        for which, spread in zip(("old", "new"), self.spreads, strict=True):
            print(f"spread of {which} latents along their directions: {numbers(spread)}")
        print(f"R2 of old from new, by channel, least squares: {numbers(self.r2['least squares'])}")
        print(f"R2 of old from new, by channel, rotation:      {numbers(self.r2['rotation'])}")
        print(f"R2 of new from old, by channel, least squares: {numbers(self.r2['back'])}")
        print(f"singular values of the map: {numbers(np.linalg.svd(self.old_of_new)[1])}")

    def fold(
        self, unet: dict[str, Tensor], into: NDArray[np.float64], out_of: NDArray[np.float64]
    ) -> dict[str, Tensor]:
        """The UNet with `into` before its first convolution and `out_of` after its last."""
        abar = alphas_cumprod(dict(sd15.SCHEDULER))
        a, b = torch.from_numpy(into), torch.from_numpy(out_of)
        shift = torch.from_numpy(self.means[0] - into @ self.means[1]) * abar.sqrt().double().mean()
        kernel = unet["conv_in.weight"].double()
        folded = {
            "conv_in.weight": torch.einsum("oihw,ij->ojhw", kernel, a),
            "conv_in.bias": unet["conv_in.bias"].double() + kernel.sum((2, 3)) @ shift,
            "conv_out.weight": torch.einsum("ji,ichw->jchw", b, unet["conv_out.weight"].double()),
            "conv_out.bias": b @ unet["conv_out.bias"].double(),
        }
        return unet | {name: value.float().contiguous() for name, value in folded.items()}


def directions(latents: NDArray[np.float64]) -> NDArray[np.float64]:
    """The square roots of the eigenvalues of their covariance, ascending."""
    found: NDArray[np.float64] = np.sqrt(np.maximum(0, np.linalg.eigvalsh(np.cov(latents.T))))
    return found


def numbers(values: NDArray[np.float64]) -> str:
    """For a line."""
    return " ".join(f"{value:6.3f}" for value in values)


# Arm -> what it makes of the UNet's weights; None: they stay.
FOLDS: dict[str, Fold | None] = {
    "plain swap": None,
    "re-initialised": None,
    "least squares": lambda m, u: m.fold(
        u, m.old_of_new, np.linalg.pinv(m.old_of_new).astype(np.float64)
    ),
    "both ways": lambda m, u: m.fold(u, m.old_of_new, m.new_of_old),
    "rotation": lambda m, u: m.fold(u, m.rotation, m.rotation.T),
    "from nothing": None,
}


def move(config: AlignConfig, folder: Path, base: Path, maps: Maps) -> dict[str, list[list[float]]]:
    """Arm -> seed -> held-out losses, at step 0 and then evenly spread."""
    start = folder / "start"
    once(start, lambda out: call(xlsd_train, "swap", out, "--model", base, "--vae", folder / "vae"))
    curves: dict[str, list[list[float]]] = {}
    for seed in range(config.seeds):
        for arm in config.arms or tuple(FOLDS):
            model, more = begin(arm, folder, maps)
            run = folder / "runs" / f"{arm.replace(' ', '-')}-{seed}"
            train(config, run, folder / "new", model, seed, config.steps, *more)
            curves.setdefault(arm, []).append(held_out(run, config.steps, config.validations))
    return curves


def begin(arm: str, folder: Path, maps: Maps) -> tuple[Path, list[str]]:
    """The model that an arm begins with, and what else its command line says."""
    fold, start = FOLDS[arm], folder / "start"
    if arm == "from nothing":
        return folder / "other", ["--vae", str(folder / "vae")]
    if fold is None:
        anew = ["--reinit", "unet.conv_in,unet.conv_out"]
        return start, anew if arm == "re-initialised" else []

    def write(out: Path) -> None:
        shutil.copytree(start, out)
        (path,) = (out / "unet").glob("*.safetensors")
        save_file(fold(maps, load_file(path)), path, {"format": "pt"})

    folded = folder / f"start-{arm.replace(' ', '-')}"
    once(folded, write)
    return folded, []


def held_out(run: Path, steps: int, validations: int) -> list[float]:
    """The mean loss of held-out images at every validation."""
    every = max(1, steps // validations)
    losses = (read_losses(run, step) for step in sorted({*range(0, steps + 1, every), steps}))
    return [float(found["live/held_out"].mean(dtype=np.float64)) for found in losses]


def tell_base(base: Path, config: AlignConfig) -> None:
    """How far the model had come with the first VAE."""
    losses = held_out(base, config.base_steps, 6)
    store = json.loads((base / "config.json").read_text())["stores"][0]["selected"]
    print(f"{store} tiles train; with the first VAE, {config.base_steps} steps of {config.batch}:")
    print("held-out loss " + " ".join(f"{loss:.4f}" for loss in losses), flush=True)


def tell(config: AlignConfig, curves: dict[str, list[list[float]]]) -> None:
    """Losses by images, and images that an arm needs of those that the plain swap needs."""
    every = max(1, config.steps // config.validations)
    steps = sorted({*range(0, config.steps + 1, every), config.steps})
    print(f"held-out loss with the second VAE, mean over {config.seeds} seeds (spread)")
    print(f"{'images':>8}" + "".join(f"{arm:>18}" for arm in curves))
    for i, step in enumerate(steps):
        print(f"{step * config.batch:>8}", end="")
        for each in curves.values():
            found = np.array([curve[i] for curve in each])
            print(f"{found.mean():>10.4f} ({found.std():.4f})", end="")
        print()
    if "plain swap" not in curves:
        return
    print("images to the plain swap's loss, as a part of its own; each seed, then the mean")
    for part in (0.25, 0.5, 1.0):
        at = int(part * (len(steps) - 1))
        if not at:
            continue
        print(f"at its {steps[at] * config.batch} images:")
        for arm, each in curves.items():
            ratios = [
                reach(curve, plain[at], steps) / steps[at]
                for curve, plain in zip(each, curves["plain swap"], strict=True)
            ]
            known = [r for r in ratios if r < np.inf]
            mean = f"{np.mean(known):6.2f}" if len(known) == len(ratios) else "      "
            shown = " ".join(f"{r:6.2f}" if r < np.inf else " never" for r in ratios)
            print(f"{arm:>18} {shown}  {mean}")


def reach(curve: list[float], loss: float, steps: list[int]) -> float:
    """The step at which a curve first comes down to a loss, between validations by a line."""
    for i, (left, right) in enumerate(pairwise(curve)):
        if left <= loss:
            return steps[i]
        if right <= loss:
            return steps[i] + (steps[i + 1] - steps[i]) * (left - loss) / (left - right)
    return steps[-1] if curve[-1] <= loss else float("inf")


if __name__ == "__main__":
    try:
        main(tyro.cli(AlignConfig, description=__doc__), sys.argv[1:])
    except UserError as error:
        sys.exit(f"align: {error}")
