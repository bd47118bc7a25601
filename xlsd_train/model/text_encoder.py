"""Text encoders: clip skip, and longer contexts.

LongCLIP-L is CLIP-L with 248 positions in place of 77 (arXiv 2403.15378). `--tokens 248` starts
from the same stretched positions from which its authors started training.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json
from xlsd_train.runs.links import refuse_leading_out
from xlsd_train.weights.hub import TOKENIZER_FILES
from xlsd_train.weights.network import read_json

KEPT, FACTOR = 20, 4  # LongCLIP: first positions that stay; how many each later one becomes
TOKENIZER_CONFIG = "tokenizer_config.json"


def hidden_states(encoder: Any, input_ids: Tensor, skip: int) -> Tensor:
    """int64 [B, tokens] -> [B, tokens, width]: the states `skip` layers before the last, normed.

    The final layer norm is applied to them, as in diffusers' `clip_skip`, kohya's sd-scripts and
    AUTOMATIC1111. The latter two count from 1: their 2 is 1 here.
    """
    if not skip:
        states: Any = encoder(input_ids).last_hidden_state
    else:
        before = encoder(input_ids, output_hidden_states=True).hidden_states[-1 - skip]
        states = _text_model(encoder).final_layer_norm(before)
    assert isinstance(states, Tensor)
    return states


def skipped_layers(encoder: Any, skip: int) -> list[Any]:
    """The last layers, which clip skip leaves unused. Raises UserError if it leaves none used."""
    layers = list(_text_model(encoder).encoder.layers)
    if skip >= len(layers):
        raise UserError(
            f"--clip-skip {skip} leaves none of the text encoder's {len(layers)} layers; give "
            f"{len(layers) - 1} or less"
        )
    return layers[len(layers) - skip :]


def stretched(positions: Tensor) -> Tensor:  # [n, width] -> [20 + 4 (n - 20), width]
    """Knowledge-preserved stretching, LongCLIP section 3.2 (arXiv 2403.15378).

    The first 20 positions, which are well trained, stay. Three are interpolated linearly between
    each later one and the next. After the last, for which the paper gives no rule, the line through
    the last two is extrapolated, as in the authors' code.
    """
    rest = positions[KEPT:]
    following = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])
    share = torch.arange(FACTOR).to(rest)[:, None] / FACTOR
    between = rest[:, None] * (1 - share) + following[:, None] * share
    return torch.cat([positions[:KEPT], between.flatten(0, 1)])


def stretch(encoder: Any, tokens: int) -> None:
    """Stretch the encoder to this many positions, in place, if it has fewer.

    Raises UserError for a number that stretching does not give.
    """
    config, embeddings = encoder.config, _text_model(encoder).embeddings
    current = config.max_position_embeddings
    if current == tokens:
        return
    longer = KEPT + FACTOR * (current - KEPT)
    if tokens != longer or current <= KEPT + 1:
        raise UserError(
            f"--tokens {tokens}: this text encoder reads {current} tokens and can be stretched to "
            f"{longer}; use a text encoder of 77 or {tokens} tokens, or leave --tokens out"
        )
    old = embeddings.position_embedding
    weight = stretched(old.weight.detach())
    embeddings.position_embedding = torch.nn.Embedding(*weight.shape)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(weight)
    embeddings.position_ids = torch.arange(tokens).expand((1, -1))  # a buffer, not saved
    config.max_position_embeddings = tokens


def copy_tokenizer(source: Path, target: Path, tokens: int) -> None:
    """Copy a tokenizer's files, and set in them the length that programs truncate captions to."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        refuse_leading_out(source / name)
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    path = target / TOKENIZER_CONFIG
    config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer"}
    if path.exists():
        config = read_json(source / TOKENIZER_CONFIG, "tokenizer", "another tokenizer")
    if "auto_map" in config:  # it would make programs run code that came with the model
        config = {name: value for name, value in config.items() if name != "auto_map"}
        write_json(path, config)
    if config.get("model_max_length") != tokens:
        write_json(path, {**config, "model_max_length": tokens})


def _text_model(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)  # transformers 5 removed this level
