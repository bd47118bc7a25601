"""The VAE: found by name, hub id, folder or single file, and known by the hash of its weights."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from torch import Tensor

from xlsd_cache import UserError
from xlsd_cache.identity import Identity

# name -> hub repository, and the folder in it
NAMES = {
    "sdxl": ("stabilityai/sdxl-vae", None),
    "sdxl-fp16-fix": ("madebyollin/sdxl-vae-fp16-fix", None),
    "sd": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "vae"),
    "taesdxl": ("madebyollin/taesdxl", None),
}
CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True)
class Vae:
    """A loaded VAE, fp32 on the CPU, and what a store must remember of it.

    Raw latents are the posterior mean, unscaled. The UNet sees (raw - shift) * scaling_factor.
    AutoencoderTiny's raw latents are on the scaled side already: its factor is 1.
    """

    name: str  # as it was asked for
    source: str  # the hub repository or local path it came from
    model: Any  # AutoencoderKL | AutoencoderTiny
    sha256: str  # of the weights as fp32, whatever file they came in

    @property
    def class_name(self) -> str:
        """Diffusers' class."""
        return type(self.model).__name__

    @property
    def scaling_factor(self) -> float:
        """What raw latents are multiplied by for the UNet."""
        return float(self.model.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """What is subtracted from raw latents before; 0 for SD and SDXL."""
        return float(self.model.config.get("shift_factor") or 0.0)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.model.config.latent_channels)

    def encode(self, x: Tensor) -> Tensor:  # f32 [B,3,H,W] in [-1,1] -> raw [B,C,H/8,W/8]
        """Raw latents, the mode of the posterior, so that nothing random is stored for ever."""
        encoded = self.model.encode(x)
        if isinstance(self.model, AutoencoderTiny):
            return encoded.latents  # type: ignore[no-any-return]
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]

    def decode(self, raw: Tensor) -> Tensor:  # raw [B,C,h,w] -> [B,3,8h,8w], about [-1,1]
        """Pictures of raw latents."""
        return self.model.decode(raw).sample  # type: ignore[no-any-return]


def load_vae(spec: str, scaling_factor: float | None = None, subfolder: str | None = None) -> Vae:
    """The VAE that `spec` names: a short name, a hub id, a folder or a .safetensors file.

    A folder may be the VAE's own or a whole pipeline's. A single file without a config.json beside
    it is read as SD's and SDXL's common architecture, and needs `scaling_factor`, which its weights
    do not tell. Raises UserError where there is no such VAE or the file is not one.
    """
    path = Path(spec).expanduser()
    try:
        if spec in NAMES:
            source, folder = NAMES[spec]
            model = _from_folder(source, folder)
        elif path.is_file():
            source, model = str(path.resolve()), _from_file(path, scaling_factor)
        elif path.is_dir():
            source = str(path.resolve())
            if subfolder is None and not (path / "config.json").exists():
                subfolder = "vae"
            model = _from_folder(source, subfolder)
        elif path.is_absolute() or spec.count("/") != 1 or spec.startswith("."):
            names = ", ".join(NAMES)
            raise UserError(
                f"no VAE {spec!r}: it is neither one of {names}, nor a hub id ORG/NAME, nor a "
                f"folder or file that exists"
            )
        else:
            source, model = spec, _from_folder(spec, subfolder)
    except NotImplementedError as error:  # diffusers moves a model of which tensors are missing
        raise UserError(
            f"cannot load the VAE {spec!r}: it lacks weights; give a whole VAE"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load the VAE {spec!r}: {told}") from error
    model.float().requires_grad_(False).eval()
    return Vae(spec, source, model, tensors_sha256(model.state_dict()))


def vae_of(identity: Identity, spec: str | None = None) -> Vae:
    """The VAE whose latents a store holds, from where the build found it or from `spec`.

    Raises UserError where it is not to be had or is another one.
    """
    named = identity.vae_name if identity.vae_name in NAMES else identity.vae_source
    vae = load_vae(spec or named, identity.scaling_factor)
    if vae.sha256 != identity.vae_sha256:
        raise UserError(
            f"the VAE {vae.name} ({vae.sha256[:12]}) is not the store's, {identity.vae_name} "
            f"({identity.vae_sha256[:12]}), and cannot decode its latents; name that one with --vae"
        )
    return vae


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes that does not depend on the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_folder(source: str, subfolder: str | None) -> Any:
    config = AutoencoderKL.load_config(source, subfolder=subfolder)
    if config.get("_class_name") not in CLASSES:
        raise UserError(
            f"{source} holds a {config.get('_class_name')}, which is no VAE known here; "
            f"give an {' or '.join(CLASSES)}"
        )
    model, told = CLASSES[config["_class_name"]].from_pretrained(
        source, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
    )
    if told["missing_keys"]:  # diffusers would go on with random ones
        raise UserError(f"the VAE {source} lacks weights, {told['missing_keys'][0]} among them")
    return model


def _from_file(path: Path, scaling_factor: float | None) -> Any:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; other formats can run code when they are "
            f"loaded: convert it first"
        )
    if (path.parent / "config.json").exists():
        config = AutoencoderKL.load_config(str(path.parent))
        kind = CLASSES.get(config.get("_class_name", ""), AutoencoderKL)
        return kind.from_single_file(str(path), config=str(path.parent), local_files_only=True)
    if scaling_factor is None:
        raise UserError(
            f"{path} does not say its scaling factor and no config.json lies beside it; add "
            f"--vae-scaling-factor (0.13025 for SDXL's VAE, 0.18215 for SD's)"
        )
    with tempfile.TemporaryDirectory() as folder:
        # SD's and SDXL's VAE have one architecture (CompVis/latent-diffusion, kl-f8).
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            scaling_factor=scaling_factor,
        ).save_config(folder)
        return AutoencoderKL.from_single_file(str(path), config=folder, local_files_only=True)
