"""The VAE: found by name, hub id, folder or single file, and known by the hash of its weights.

What latents depend on is its encoder's half, which has a hash of its own: a VAE whose decoder alone
was trained further reads and writes the same latents.
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

from xlsd_cache.encoding.finite import count, unfit
from xlsd_cache.encoding.hub import cached, fetch, no_such, repository_of, require
from xlsd_cache.encoding.network_config import plain_config
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.vocabulary import Padding

# name -> hub repository, and the folder in it
NAMES = {
    "sdxl": ("stabilityai/sdxl-vae", None),
    "sdxl-fp16-fix": ("madebyollin/sdxl-vae-fp16-fix", None),
    "sd": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "vae"),
    "taesdxl": ("madebyollin/taesdxl", None),
}
CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
ENCODER = ("encoder.", "quant_conv.")  # the names of the encoder's half
WEIGHTS = "diffusion_pytorch_model"
INSTEAD = "give a folder with config.json and its weights, or a .safetensors file, as --vae"


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
    encoder_sha256: str  # of those of the encoder's half
    padding: Padding = "zeros"  # zeros | reflect

    @classmethod
    def of(cls, name: str, source: str, model: Any, padding: Padding = "zeros") -> "Vae":
        """A model with its hashes, its convolutions set to this padding.

        Reflection is set as the authors of such VAEs do it: where a convolution pads by itself.
        The encoder's downsamplers do not, and stay padded with zeros to the right and below.
        """
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and any(module.padding):
                module.padding_mode = padding
        weights = model.state_dict()
        half = {key: value for key, value in weights.items() if key.startswith(ENCODER)}
        return cls(name, source, model, tensors_sha256(weights), tensors_sha256(half), padding)

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


def require_vae(spec: str) -> None:
    """Raises UserError, within seconds, where there is no such VAE or the hub does not answer.

    For what comes before a long scan. Whether it is one that loads, `load_vae` says.
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
    """The VAE that `spec` names: a short name, a hub id, a folder or a .safetensors file.

    A folder or repository may be the VAE's own or a whole pipeline's. A single file without a
    config.json beside it is read as SD's and SDXL's common architecture, and needs
    `scaling_factor`, which its weights do not tell. Without `fetching` a hub's must be in the
    cache. Raises UserError where there is no such VAE or the file is not one.
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
    except NotImplementedError as error:  # diffusers moves a model of which tensors are missing
        raise UserError(
            f"cannot load the VAE {spec!r}: it lacks weights; give a whole VAE"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever the libraries stumble over in a config of any kind
        told = one_line(error, 300)
        raise UserError(f"cannot load the VAE {spec!r}: {told}") from error
    model = model.float().requires_grad_(False).eval()
    _refuse_unfit(spec, model)
    return Vae.of(spec, source, model, padding)


def _refuse_unfit(spec: str, model: Any) -> None:
    """Raises UserError where a weight is nan or infinite."""
    state = model.state_dict()
    if bad := unfit(state):
        raise UserError(
            f"the VAE {spec!r}: {bad[0]} has {count(state[bad[0]])} that are nan or infinite; "
            f"fetch it anew, or give another"
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes that does not depend on the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_the_hub(spec: str, subfolder: str | None) -> tuple[str, str | None]:
    """The repository, and the folder in it. Raises UserError for a path that is missing."""
    if spec in NAMES:
        return NAMES[spec]
    repository = repository_of(spec)
    if repository is None:
        names = ", ".join(NAMES)
        raise UserError(f"no VAE {no_such(spec)}; give one of {names}, or a hub id ORG/NAME")
    return repository, subfolder


def _files(subfolder: str | None) -> tuple[list[list[str]], list[str]]:
    """What to fetch of a repository, and what else where that has no weights; what is needed."""
    at = (f"{subfolder}/",) if subfolder else ("", "vae/")
    ends = (".safetensors", ".safetensors.index.json", "-?????-of-?????.safetensors")
    config = [f"{folder}config.json" for folder in at]
    safe = [f"{folder}{WEIGHTS}{end}" for folder in at for end in ends]
    pickle = [f"{folder}{WEIGHTS}.bin" for folder in at]
    return [config + safe, config + pickle], ["|".join(config), "|".join(safe + pickle)]


def _repository(repository: str, subfolder: str | None, fetching: bool) -> Path:
    """The folder of a hub's repository with its VAE's files. Raises UserError without them."""
    choices, needed = _files(subfolder)
    for files in choices:
        if fetching:
            folder = fetch(repository, files, needed, INSTEAD)
        elif there := cached(repository, files, needed):
            folder = there
        else:
            raise UserError(f"{repository} is not in the hub's cache")
        if any(path.is_file() for end in needed[1].split("|") for path in folder.glob(end)):
            return folder
    raise UserError(f"{repository} holds no VAE in the form of diffusers; {INSTEAD}")


def _from_folder(folder: Path, subfolder: str | None) -> Any:
    if subfolder is None and not (folder / "config.json").exists():
        subfolder = "vae"
    config = _config(folder, subfolder)
    if config.get("_class_name") not in CLASSES:
        raise UserError(
            f"{folder} holds a {config.get('_class_name')}, which is no VAE known here; "
            f"give an {' or '.join(CLASSES)}"
        )
    model, told = CLASSES[config["_class_name"]].from_pretrained(
        str(folder), subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True,
        local_files_only=True,
    )  # fmt: skip
    if told["missing_keys"]:  # diffusers would go on with random ones
        raise UserError(f"the VAE {folder} lacks weights, {told['missing_keys'][0]} among them")
    return model


def _config(folder: Path, subfolder: str | None) -> dict[str, Any]:
    """Of a VAE, before anything is built of it. Raises UserError for numbers that no VAE has."""
    config: dict[str, Any] = AutoencoderKL.load_config(str(folder), subfolder=subfolder)
    plain_config(config, f"{folder} has a VAE")
    if "quantization_config" in config:
        raise UserError(f"{folder} holds a quantised VAE; give it in fp32 or half precision")
    factor, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
    numbers = all(type(x) in {int, float} and math.isfinite(x) for x in (factor, shift))
    if not numbers or not factor:
        raise UserError(
            f"{folder} has a VAE of scaling_factor {str(factor)[:40]} and shift_factor "
            f"{str(shift)[:40]}, by which no latents are scaled; mend its config.json"
        )
    return config


def _from_file(path: Path, scaling_factor: float | None) -> Any:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; other formats can run code when they are "
            f"loaded: convert it first"
        )
    if (path.parent / "config.json").exists():
        config = _config(path.parent, None)
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
