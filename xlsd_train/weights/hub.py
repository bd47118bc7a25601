"""What is taken of a model hub's repositories."""

from collections.abc import Sequence
from pathlib import Path

from xlsd_cache.encoding.hub import fetch

# Of the hub's folder only what is used: no fp16 copies, no pickles.
FILES = (
    "model_index.json scheduler/*.json tokenizer/* text_encoder/config.json "
    "text_encoder/model.safetensors unet/config.json unet/diffusion_pytorch_model*.safetensors "
    "unet/*.index.json"
).split()
NEEDED = (
    "scheduler/*.json tokenizer/* text_encoder/config.json text_encoder/model.safetensors "
    "unet/config.json unet/diffusion_pytorch_model*.safetensors"
).split()
VAE_FILES = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
TOKENIZER_FILES = (
    "vocab.json merges.txt tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json"
).split()
# Of a text encoder's repository: a CLIP, its tokenizer beside it, or a pipeline.
TEXT_ENCODER_FILES = [*TOKENIZER_FILES, "config.json", "model.safetensors", "tokenizer/*",
                      "text_encoder/config.json", "text_encoder/model.safetensors"]  # fmt: skip
TEXT_ENCODER_NEEDED = ["config.json|text_encoder/config.json",
                       "model.safetensors|text_encoder/model.safetensors"]  # fmt: skip
INSTEAD = {
    "--model": "a pipeline folder, a single .safetensors file, a run or a checkpoint",
    "--text-encoder": "a text encoder's folder or file",
    "--tokenizer": "a folder with vocab.json and merges.txt",
    "--clip": "a folder with a CLIP",
}


def fetch_model(repository: str, files: Sequence[str], needed: Sequence[str], flag: str) -> Path:
    """The folder of a hub's repository with these files in it, from the cache or fetched.

    Raises UserError where it cannot be had, naming the flag that takes a folder instead.
    """
    return fetch(repository, files, needed, f"give {INSTEAD[flag]} as {flag}")
