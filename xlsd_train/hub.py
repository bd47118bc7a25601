"""What is taken of a model hub's repositories, and how: through the hub's own client."""

from pathlib import Path

from huggingface_hub import snapshot_download

from xlsd_cache import UserError

# Of the hub's folder only what is used: no fp16 copies, no pickles.
FILES = (
    "model_index.json scheduler/*.json tokenizer/* text_encoder/config.json "
    "text_encoder/model.safetensors unet/config.json unet/diffusion_pytorch_model*.safetensors "
    "unet/*.index.json"
).split()
VAE_FILES = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
TOKENIZER_FILES = (
    "vocab.json merges.txt tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json"
).split()
# Of a text encoder's repository: a CLIP, its tokenizer beside it, or a pipeline.
TEXT_ENCODER_FILES = [*TOKENIZER_FILES, "config.json", "model.safetensors", "tokenizer/*",
                      "text_encoder/config.json", "text_encoder/model.safetensors"]  # fmt: skip


def is_hub_id(source: str) -> bool:
    """ORG/NAME, which no path that was meant looks like."""
    path = Path(source).expanduser()
    return not path.is_absolute() and source.count("/") == 1 and not source.startswith(".")


def fetch(
    source: str,
    files: list[str],
    flags: str = "--model; --text-encoder and --tokenizer for what a file lacks",
) -> Path:
    """The folder of a hub's repository with these files in it.

    Raises UserError where it cannot be had, naming the flags that take a folder instead.
    """
    try:
        return Path(snapshot_download(source, allow_patterns=files))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's client raises
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch {source} from the hub: {told}; check the name and the network, or give "
            f"a local folder ({flags})"
        ) from error
