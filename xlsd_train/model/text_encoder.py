"""Text encoders: which of their states the UNet sees, and longer ones.

LongCLIP-L is CLIP-L with 248 positions in place of 77 (arXiv 2403.15378); `--tokens 248` begins
with the positions from which its authors began training theirs.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_json
from xlsd_train.runs.json_files import load_object
from xlsd_train.runs.links import refuse_leading_out
from xlsd_train.weights.hub import TOKENIZER_FILES

KEPT, FACTOR = 20, 4  # LongCLIP: positions that stay as they are; how many one of the rest becomes
TOKENIZER_CONFIG = "tokenizer_config.json"


def hidden_states(encoder: Any, input_ids: Tensor, skip: int) -> Tensor:
    """int64 [B, tokens] -> [B, tokens, width]: of `skip` layers before the last, normalised.

    The final layer norm follows whichever layer it is, as in diffusers' `clip_skip`, kohya's
    sd-scripts and AUTOMATIC1111; the latter two count from 1, so that their 2 is 1 here.
    """
    if not skip:
        states: Any = encoder(input_ids).last_hidden_state
    else:
        before = encoder(input_ids, output_hidden_states=True).hidden_states[-1 - skip]
        states = _text_model(encoder).final_layer_norm(before)
    assert isinstance(states, Tensor)
    return states


def skipped_layers(encoder: Any, skip: int) -> list[Any]:
    """The last layers, which nothing sees. Raises UserError where there are no more than those."""
    layers = list(_text_model(encoder).encoder.layers)
    if skip >= len(layers):
        raise UserError(
            f"--clip-skip {skip} leaves none of the text encoder's {len(layers)} layers; give "
            f"{len(layers) - 1} or less"
        )
    return layers[len(layers) - skip :]


def stretched(positions: Tensor) -> Tensor:  # [n, width] -> [20 + 4 (n - 20), width]
    """Knowledge-preserved stretching, LongCLIP section 3.2 (arXiv 2403.15378).

    The first 20 positions stay, for they are the well-trained ones; between each later one and the
    next come three by linear interpolation. After the last, where the paper has no next one, the
    line through the last two goes on, as in the authors' code.
    """
    rest = positions[KEPT:]
    following = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])
    share = torch.arange(FACTOR).to(rest)[:, None] / FACTOR
    between = rest[:, None] * (1 - share) + following[:, None] * share
    return torch.cat([positions[:KEPT], between.flatten(0, 1)])


def stretch(encoder: Any, tokens: int) -> None:
    """Give the encoder this many positions, if it has not; in place.

    Raises UserError for a number that stretching does not give.
    """
    config, embeddings = encoder.config, _text_model(encoder).embeddings
    there = config.max_position_embeddings
    if there == tokens:
        return
    longer = KEPT + FACTOR * (there - KEPT)
    if tokens != longer or there <= KEPT + 1:
        raise UserError(
            f"--tokens {tokens}: this text encoder reads {there} tokens, which stretching makes "
            f"{longer}; give a text encoder of 77 or {tokens} tokens, or leave --tokens out"
        )
    old = embeddings.position_embedding
    weight = stretched(old.weight.detach())
    embeddings.position_embedding = torch.nn.Embedding(*weight.shape)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(weight)
    embeddings.position_ids = torch.arange(tokens).expand((1, -1))  # a buffer, not saved
    config.max_position_embeddings = tokens


def copy_tokenizer(source: Path, target: Path, tokens: int) -> None:
    """A tokenizer's files, and in them the length that other programs cut captions to."""
    there = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in there:
        refuse_leading_out(source / name)
    target.mkdir(parents=True)
    for name in there:
        shutil.copyfile(source / name, target / name)
    path = target / TOKENIZER_CONFIG
    told: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer"}
    if path.exists():
        try:
            told = load_object(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer's {source / TOKENIZER_CONFIG} is damaged ({error}); give another "
                f"as --tokenizer"
            ) from error
    if "auto_map" in told:  # no code of others is handed on
        told = {name: value for name, value in told.items() if name != "auto_map"}
        write_json(path, told)
    if told.get("model_max_length") != tokens:
        write_json(path, {**told, "model_max_length": tokens})


def _text_model(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)  # transformers 5 has no such level any more
