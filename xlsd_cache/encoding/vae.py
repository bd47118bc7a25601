"""Loads a VAE by name, hub id, folder or single file, and hashes its weights.

Latents depend on the encoder half alone (encoder and quant_conv), which has its own hash: a VAE
with only its decoder finetuned reads and writes the same latents.
"""

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from xlsd_cache.encoding.finite import bad_values, not_finite
from xlsd_cache.encoding.hub import cached, fetch, no_such, repository_of, require
from xlsd_cache.encoding.network_config import plain_config
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.vocabulary import Padding

# short name -> hub repository, and the folder in it
NAMES = {
    "sdxl": ("stabilityai/sdxl-vae", None),
    "sdxl-fp16-fix": ("madebyollin/sdxl-vae-fp16-fix", None),
    "sd": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "vae"),
    "taesdxl": ("madebyollin/taesdxl", None),
}
CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
ENCODER = ("encoder.", "quant_conv.")  # prefixes of the encoder half's weights
WEIGHTS = "diffusion_pytorch_model"
INSTEAD = "give a folder with config.json and its weights, or a .safetensors file, as --vae"


@dataclass(frozen=True)
class Vae:
    """A loaded VAE, fp32 on the CPU, and what a store records of it.

    Raw latents are the posterior mean, unscaled. The UNet sees (raw - shift) * scaling_factor.
    AutoencoderTiny's raw latents are scaled already: its factor is 1.
    """

    name: str  # as the user gave it
    source: str  # hub repository or local path
    model: Any  # AutoencoderKL | AutoencoderTiny
    sha256: str  # of the weights as fp32, for any file format
    encoder_sha256: str  # of the encoder half's
    padding: Padding = "zeros"  # zeros | reflect

    @classmethod
    def of(cls, name: str, source: str, model: Any, padding: Padding = "zeros") -> "Vae":
        """Hash a model and set the padding of its convolutions.

        As the authors of reflection-padded VAEs do, only convolutions that pad by themselves are
        set; the encoder's downsamplers stay zero-padded on the right and bottom.
        """
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and any(module.padding):
                module.padding_mode = padding
        weights = model.state_dict()
        half = {key: value for key, value in weights.items() if key.startswith(ENCODER)}
        return cls(name, source, model, tensors_sha256(weights), tensors_sha256(half), padding)

    @property
    def class_name(self) -> str:
        """Name of the diffusers class."""
        return type(self.model).__name__

    @property
    def scaling_factor(self) -> float:
        """Factor by which raw latents are multiplied for the UNet."""
        return float(self.model.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """Subtracted from raw latents before scaling; 0 for SD and SDXL."""
        return float(self.model.config.get("shift_factor") or 0.0)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.model.config.latent_channels)

    def encode(self, x: Tensor) -> Tensor:  # f32 [B,3,H,W] in [-1,1] -> raw [B,C,H/8,W/8]
        """Raw latents: the mode of the posterior, not a random sample."""
        encoded = self.model.encode(x)
        if isinstance(self.model, AutoencoderTiny):
            return encoded.latents  # type: ignore[no-any-return]
        return encoded.latent_dist.mode()  # type: ignore[no-any-return]

    def decode(self, raw: Tensor) -> Tensor:  # raw [B,C,h,w] -> [B,3,8h,8w], about [-1,1]
        """Images of raw latents."""
        return self.model.decode(raw).sample  # type: ignore[no-any-return]


def require_vae(spec: str) -> None:
    """Raise UserError, within seconds, where there is no such VAE or the hub does not answer.

    To be called before a long scan; only `load_vae` checks that it loads.
    """
    if spec in NAMES or not Path(spec).expanduser().exists():
        source, subfolder = _on_the_hub(spec, None)
        files, needed = _files(subfolder)
        require(source, files[0], needed, INSTEAD)


def load_vae(
    spec: str,
    scaling_factor: float | None = None,
    subfolder: str | None = None,
    *,
    padding: Padding = "zeros",
    fetching: bool = True,
) -> Vae:
    """Load the VAE `spec`: a short name, a hub id, a folder or a .safetensors file.

    A folder or repository may hold the VAE or a whole pipeline. A single file without a
    config.json next to it is loaded as the architecture that SD and SDXL share, and needs
    `scaling_factor`. Without `fetching`, a hub VAE must be in the cache. Raises UserError where
    there is no such VAE, or it does not load.
    """
    path = Path(spec).expanduser()
    try:
        if spec not in NAMES and path.is_file():
            source, model = str(path.resolve()), _from_file(path, scaling_factor)
        elif spec not in NAMES and path.is_dir():
            source, model = str(path.resolve()), _from_folder(path, subfolder)
        else:
            source, subfolder = _on_the_hub(spec, subfolder)
            model = _from_folder(_repository(source, subfolder, fetching), subfolder)
    except NotImplementedError as error:  # diffusers moves a model with missing tensors
        raise UserError(
            f"cannot load the VAE {spec!r}: it lacks weights; give a complete VAE"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything for a broken config
        raise UserError(f"cannot load the VAE {spec!r}: {one_line(error, 300)}") from error
    model = model.float().requires_grad_(False).eval()
    _check_finite(spec, model)
    return Vae.of(spec, source, model, padding)


def _check_finite(spec: str, model: Any) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    state = model.state_dict()
    if bad := not_finite(state):
        raise UserError(
            f"the VAE {spec!r}: {bad[0]} has {bad_values(state[bad[0]])} that are nan or infinite; "
            f"download it again, or give another"
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes; independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_the_hub(spec: str, subfolder: str | None) -> tuple[str, str | None]:
    """The repository, and the folder in it. Raises UserError for a missing path."""
    if spec in NAMES:
        return NAMES[spec]
    repository = repository_of(spec)
    if repository is None:
        names = ", ".join(NAMES)
        raise UserError(f"no VAE {no_such(spec)}; give one of {names}, or a hub id ORG/NAME")
    return repository, subfolder


def _files(subfolder: str | None) -> tuple[list[list[str]], list[str]]:
    """Patterns to fetch, and others to try if those give no weights; patterns that must exist."""
    folders = (f"{subfolder}/",) if subfolder else ("", "vae/")
    ends = (".safetensors", ".safetensors.index.json", "-?????-of-?????.safetensors")
    config = [f"{folder}config.json" for folder in folders]
    safe = [f"{folder}{WEIGHTS}{end}" for folder in folders for end in ends]
    pickle = [f"{folder}{WEIGHTS}.bin" for folder in folders]
    return [config + safe, config + pickle], ["|".join(config), "|".join(safe + pickle)]


def _repository(repository: str, subfolder: str | None, fetching: bool) -> Path:
    """The local folder of a repository with its VAE's files. Raises UserError without them."""
    choices, needed = _files(subfolder)
    for files in choices:
        if fetching:
            folder = fetch(repository, files, needed, INSTEAD)
        elif (found := cached(repository, files, needed)) is not None:
            folder = found
        else:
            raise UserError(f"{repository} is not in the hub's cache")
        if any(path.is_file() for end in needed[1].split("|") for path in folder.glob(end)):
            return folder
    raise UserError(f"{repository} holds no VAE in diffusers' format; {INSTEAD}")


def _from_folder(folder: Path, subfolder: str | None) -> Any:
    if subfolder is None and not (folder / "config.json").exists():
        subfolder = "vae"
    config = _config(folder, subfolder)
    if config.get("_class_name") not in CLASSES:
        raise UserError(
            f"{folder} holds a {config.get('_class_name')}, which is no VAE supported here; "
            f"give an {' or '.join(CLASSES)}"
        )
    model, loading = CLASSES[config["_class_name"]].from_pretrained(
        str(folder), subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True,
        local_files_only=True,
    )  # fmt: skip
    if missing := loading["missing_keys"]:  # diffusers would use random ones
        raise UserError(f"the VAE {folder} lacks weights, {missing[0]} among them; give another")
    return model


def _config(folder: Path, subfolder: str | None) -> dict[str, Any]:
    """The VAE's config, checked. Raises UserError for numbers that no VAE has."""
    config: dict[str, Any] = AutoencoderKL.load_config(str(folder), subfolder=subfolder)
    plain_config(config, f"{folder} has a VAE")
    if "quantization_config" in config:
        raise UserError(f"{folder} holds a quantised VAE; give it in fp32 or half precision")
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    numbers = all(type(x) in {int, float} and math.isfinite(x) for x in (factor, shift))
    if not numbers or not factor:
        raise UserError(
            f"{folder} has a VAE of scaling_factor {str(factor)[:40]} and shift_factor "
            f"{str(shift)[:40]}, by which latents cannot be scaled; correct its config.json"
        )
    return config


def _from_file(path: Path, scaling_factor: float | None) -> Any:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; loading other formats can run code, so convert it "
            f"first"
        )
    if (path.parent / "config.json").exists():
        config = _config(path.parent, None)
        kind = CLASSES.get(config.get("_class_name", ""), AutoencoderKL)
        return kind.from_single_file(str(path), config=str(path.parent), local_files_only=True)
    if scaling_factor is None:
        raise UserError(
            f"{path} does not give its scaling factor and has no config.json next to it; add "
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
