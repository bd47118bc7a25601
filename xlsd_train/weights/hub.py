"""Which files of a model hub's repository are downloaded."""

from collections.abc import Sequence
from pathlib import Path

from xlsd_cache.encoding.hub import fetch

# Only what is used: no fp16 copies, no pickles.
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
# A text encoder's repository: a CLIP with its tokenizer next to it, or a pipeline.
TEXT_ENCODER_FILES = [*TOKENIZER_FILES, "config.json", "model.safetensors", "tokenizer/*",
                      "text_encoder/config.json", "text_encoder/model.safetensors"]  # fmt: skip
TEXT_ENCODER_NEEDED = ["config.json|text_encoder/config.json",
                       "model.safetensors|text_encoder/model.safetensors"]  # fmt: skip
INSTEAD = {  # flag -> what it takes in place of a hub id
    "--model": "a pipeline folder, a single .safetensors file, a run or a checkpoint",
    "--text-encoder": "a text encoder's folder or file",
    "--tokenizer": "a folder with vocab.json and merges.txt",
    "--clip": "a folder with a CLIP",
}


def fetch_model(repository: str, files: Sequence[str], needed: Sequence[str], flag: str) -> Path:
    """A repository's folder with these files in it, from the hub's cache or downloaded.

    Raises UserError if the hub does not give it, with what the flag takes instead.
    """
    return fetch(repository, files, needed, f"give {INSTEAD[flag]} as {flag}")
