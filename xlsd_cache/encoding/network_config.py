"""Makes an untrusted network's config safe: it loads no code and builds in finite time."""

from collections.abc import Mapping
from typing import Any

from xlsd_cache.errors import UserError

# Keys by which libraries load code, kernels or adapters from elsewhere.
CODE = frozenset(
    "auto_map custom_pipelines attn_implementation _attn_implementation quantization_config "
    "_attn_implementation_internal experts_implementation _experts_implementation "
    "_experts_implementation_internal use_kernels".split()
)
LAYERS = ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block",
          "reverse_transformer_layers_per_block", "num_encoder_blocks",
          "num_decoder_blocks")  # fmt: skip
MOST_LAYERS, MOST_NUMBER = 100, 2**24  # the most layers, and the largest number in a config


def plain_config(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The config without keys that make a library load foreign code.

    Raises UserError for numbers that no such network has; its message begins with `what`.
    """
    for name, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            absurd = isinstance(number, int) and abs(number) > MOST_NUMBER
            absurd |= name in LAYERS and number is not None and not _is_depth(number)
            if absurd or (isinstance(value, list) and len(value) > MOST_LAYERS):
                raise UserError(
                    f"{what} of {name} {str(value)[:40]}, which no network like SD1.5 "
                    f"has; the file is damaged, or of another model"
                )
    return {name: value for name, value in config.items() if name not in CODE}


def _is_depth(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MOST_LAYERS
