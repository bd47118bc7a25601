"""Another text encoder in a model's place, or a longer one: `--text-encoder` and `--tokens`."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from xlsd_cache import UserError
from xlsd_train.model import Model
from xlsd_train.text import TOKENIZER, stretch

WEIGHTS = "model.safetensors"


def fit_text_encoder(model: Model, source: str | None, tokens: int | None) -> None:
    """Swap in the text encoder `source`, and stretch it to `tokens`; in place.

    Raises UserError where the UNet or the tokenizer does not fit it.
    """
    if source is not None:
        model.text_encoder, folder = load_text_encoder(source)
        if folder is not None:
            model.tokenizer_folder = folder
            model.tokenizer = CLIPTokenizer.from_pretrained(folder)
        width, wanted = model.text_encoder.config.hidden_size, model.unet.config.cross_attention_dim
        known, words = model.text_encoder.config.vocab_size, len(model.tokenizer)
        if width != wanted or known < words:
            raise UserError(
                f"--text-encoder {source} knows {known} tokens and gives states of width {width}, "
                f"and its tokenizer has {words} tokens and the UNet of {model.source} takes width "
                f"{wanted}; name one that fits"
            )
    if tokens is not None:
        stretch(model.text_encoder, tokens)
    model.tokenizer.model_max_length = model.tokens


def load_text_encoder(source: str) -> tuple[Any, Path | None]:
    """(CLIPTextModel in fp32, folder of its tokenizer or None) of a folder or a hub id.

    A folder is a pipeline's with `text_encoder/`, a text encoder's own, or a whole CLIP's with its
    tokenizer beside the weights, as zer0int/LongCLIP-L-Diffusers. Raises UserError for others.
    """
    folder = _folder(source)
    inside = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    tokenizers = [path for path in (folder / "tokenizer", folder) if _is_tokenizer(path)]
    try:
        config = CLIPTextConfig.from_pretrained(inside)  # of a whole CLIP its text part
        # The weights decide: copies of LongCLIP are about whose configuration says 77.
        config.max_position_embeddings = _positions(inside / WEIGHTS)
        encoder, told = CLIPTextModel.from_pretrained(
            inside, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = list(told["missing_keys"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the text encoder {source}: {said}; give the folder or hub id of a CLIP "
            f"with config.json and {WEIGHTS} as --text-encoder"
        ) from error
    if missing:
        raise UserError(
            f"--text-encoder {source} lacks {len(missing)} weights, {missing[0]} among them; give "
            f"a whole one"
        )
    return encoder, tokenizers[0] if tokenizers else None


def _positions(weights: Path) -> int:
    name = "embeddings.position_embedding.weight"
    with safe_open(weights, "pt") as file:
        prefixed = f"text_model.{name}"  # without it a whole CLIP's would be its vision part's
        there = prefixed if prefixed in set(file.keys()) else name
        return int(file.get_slice(there).get_shape()[0])


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or source.count("/") != 1 or source.startswith("."):
        raise UserError(
            f"no text encoder {source}: it is neither a folder nor a hub id ORG/NAME; give one as "
            f"--text-encoder"
        )
    files = [*TOKENIZER, "config.json", WEIGHTS, "text_encoder/config.json"]
    files += [f"text_encoder/{WEIGHTS}", *(f"tokenizer/{name}" for name in TOKENIZER)]
    try:
        return Path(snapshot_download(source, allow_patterns=files))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's client raises
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch the text encoder {source} from the hub: {said}; check the name and the "
            f"network, or give a local folder as --text-encoder"
        ) from error
