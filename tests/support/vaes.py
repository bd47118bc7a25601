"""Small VAEs made from others."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(folder: Path) -> Path:
    """A small AutoencoderTiny, whose encoder is no other VAE's."""
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    ).save_pretrained(folder)
    return folder


def changed(vae: Path, target: Path, part: str, **config: Any) -> Path:
    """A copy of a VAE with the weights changed whose names begin with `part`."""
    shutil.copytree(vae, target)
    state = load_file(vae / WEIGHTS)
    touched = [name for name in state if part and name.startswith(part)]
    assert touched or not part
    save_file({k: v + 0.01 if k in touched else v for k, v in state.items()}, target / WEIGHTS)
    values = json.loads((vae / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target
