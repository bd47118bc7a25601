"""A file of prompts, a line each, with settings of their own: one format for runs and for `sample`.

After its prompt a line may carry our options, --size --steps --guidance --seed --negative, or those
of kohya's sd-scripts, --w --h --s --l --d --n, in any order, each up to the next. Empty lines, and
lines that begin with #, are no prompts.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlsd_cache.errors import UserError
from xlsd_cache.files import text as texts
from xlsd_train.config.model_options import size_of
from xlsd_train.data.captions import token_counts
from xlsd_train.evaluation.images import Picture

SEEDS = 2**63  # what torch's generators take, but for negative ones
MOST_STEPS, MOST_GUIDANCE = 1000, 1000  # a model has 1000 timesteps
TOLD = 8  # prompts that are cut and named one by one
OURS = ("seed", "steps", "guidance", "size", "negative")
# sd-scripts' library/train_util.py, line_to_prompt_dict
KOHYA = {"s": "steps", "l": "guidance", "d": "seed", "n": "negative", "w": "width", "h": "height"}
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z][^\s=]*)(?=[\s=]|$)")
_NUMBERS = {"guidance": (float, r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", "a number")}
_WHOLE = (int, r"[+-]?\d{1,30}", "a whole number")
# What other programs do with a prompt and nobody does here.
_WEIGHTS = re.compile(
    r"\([^()]*:\s*[\d.]+\s*\)|\(\(|\[\[|\[[^\[\]]*:[^\[\]]*\]|<(lora|lyco|hypernet):"
)


def read_lines(path: Path, option: str, comments: bool = False) -> list[str]:
    """The prompts of a text file with all that their lines carry. Raises UserError for none.

    With `comments` their lines are among them.
    """
    if path.suffix.lower() in {".json", ".toml"}:
        raise UserError(f"{option} {path}: write the prompts to a text file, one a line")
    lines = texts.read_lines(path, option)
    prompts = [line for line in lines if comments or not line.startswith("#")]
    if not prompts:
        raise UserError(f"{option} {path} is empty; write one prompt a line")
    return prompts


def read_pictures(path: Path, option: str, default: Picture) -> list[Picture]:
    """The pictures of a file of prompts, in order: as `default`, but for what their lines say.

    Prompt i has the default's seed + i. Raises UserError naming the prompt that cannot be drawn.
    """
    lines = read_lines(path, option)
    return [
        _picture(line, replace(default, seed=default.seed + i), f"{path}, prompt {i + 1}")
        for i, line in enumerate(lines)
    ]


def remarks(asked: list[Picture], tokenizer: Any, tokens: int) -> list[str]:
    """What a person should know before these are drawn: prompts that are cut, or read literally."""
    texts: dict[str, str] = {}  # each once, by where it is first
    for i, picture in enumerate(asked):
        texts.setdefault(picture.prompt, f"prompt {i + 1}")
        texts.setdefault(picture.negative, f"the negative prompt of prompt {i + 1}")
    lengths = token_counts(tokenizer, list(texts)).tolist()
    cut = [
        f"{where} has {length} tokens and is cut to the {tokens} that the text encoder reads: "
        f"{text[:60]}{'...' if len(text) > 60 else ''}"
        for (text, where), length in zip(texts.items(), lengths, strict=True)
        if length > tokens
    ]
    lines = cut[:TOLD]
    if len(cut) > TOLD:
        lines.append(f"{len(cut) - TOLD} more prompts are cut to {tokens} tokens")
    weighted = next((where for text, where in texts.items() if _WEIGHTS.search(text)), None)
    if weighted:
        lines.append(
            f"{weighted} has the syntax that A1111 reads as weights, (word:1.2): here it is part "
            f"of the text, brackets, numbers and all"
        )
    return lines


def _picture(line: str, default: Picture, where: str) -> Picture:
    prompt, *rest = _OPTION.split(line)  # prompt, name, value, name, value, ...
    told: dict[str, Any] = {}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        field = name.lower() if name.lower() in OURS else KOHYA.get(name.lower())
        if field is None:
            raise UserError(
                f"{where}: --{name} cannot be honoured; a line takes "
                f"{' '.join(f'--{each}' for each in OURS)}, and kohya's "
                f"{' '.join(f'--{each}' for each in KOHYA)}"
            )
        if field in told:
            raise UserError(f"{where}: --{name} gives the {field} twice; leave one out")
        told[field] = _value(field, text.strip().removeprefix("=").strip(), f"{where}: --{name}")
    width, height = told.pop("width", default.width), told.pop("height", default.height)
    size = told.pop("size", None)
    if size is not None and {"w", "h"} & set(map(str.lower, rest[::2])):
        raise UserError(f"{where}: --size and --w or --h both give the size; leave one out")
    width, height = size_of(size or f"{width}x{height}", where)
    return _drawable(
        replace(default, prompt=prompt.strip(), width=width, height=height, **told), where
    )


def _value(field: str, text: str, where: str) -> Any:
    if field in {"negative", "size"}:
        return text
    kind, pattern, called = _NUMBERS.get(field, _WHOLE)
    if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        raise UserError(f"{where} {text!r} is not {called}; give one, or leave it out")
    return kind(text)


def _drawable(asked: Picture, where: str) -> Picture:
    if not 1 <= asked.steps <= MOST_STEPS:
        raise UserError(f"{where}: --steps {asked.steps} is not from 1 to {MOST_STEPS}")
    if math.isnan(asked.guidance) or not 0 <= asked.guidance <= MOST_GUIDANCE:
        raise UserError(
            f"{where}: --guidance {asked.guidance:g} cannot be drawn; give 0 to {MOST_GUIDANCE}"
        )
    if not 0 <= asked.seed < SEEDS:
        raise UserError(f"{where}: --seed {asked.seed} is not from 0 to {SEEDS - 1}; give another")
    return asked
