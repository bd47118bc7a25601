"""Parses a prompts file, one prompt per line with its own settings, for runs and for `sample`.

After the prompt a line may have our options, --size --steps --guidance --seed --negative, or those
of kohya's sd-scripts, --w --h --s --l --d --n, in any order. A value extends to the next option.
Empty lines and lines that start with # are skipped.
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

SEEDS = 2**63  # torch's generators take seeds below this, and negative ones
MOST_STEPS, MOST_GUIDANCE = 1000, 1000  # a model has 1000 timesteps
LISTED = 8  # truncated prompts that are listed one by one
OURS = ("seed", "steps", "guidance", "size", "negative")
# sd-scripts' library/train_util.py, line_to_prompt_dict
KOHYA = {"s": "steps", "l": "guidance", "d": "seed", "n": "negative", "w": "width", "h": "height"}
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z][^\s=]*)(?=[\s=]|$)")
_NUMBERS = {"guidance": (float, r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", "a number")}
_WHOLE = (int, r"[+-]?\d{1,30}", "a whole number")
# Prompt syntax of other programs, which has no effect here.
_WEIGHTS = re.compile(
    r"\([^()]*:\s*[\d.]+\s*\)|\(\(|\[\[|\[[^\[\]]*:[^\[\]]*\]|<(lora|lyco|hypernet):"
)


def read_lines(path: Path, option: str, comments: bool = False) -> list[str]:
    """The lines of a prompts file with their settings; with `comments`, comment lines too.

    Raises UserError for a file without prompts.
    """
    if path.suffix.lower() in {".json", ".toml"}:
        raise UserError(f"{option} {path}: write the prompts to a text file, one a line")
    lines = texts.read_lines(path, option)
    prompts = [line for line in lines if comments or not line.startswith("#")]
    if not prompts:
        raise UserError(f"{option} {path} is empty; write one prompt a line")
    return prompts


def read_pictures(path: Path, option: str, default: Picture) -> list[Picture]:
    """Parse a prompts file; settings that a line does not give are those of `default`.

    Prompt i (from 0) has the default's seed + i. Raises UserError with the number of the first
    prompt whose settings are invalid.
    """
    lines = read_lines(path, option)
    return [
        _picture(line, replace(default, seed=default.seed + i), f"{path}, prompt {i + 1}")
        for i, line in enumerate(lines)
    ]


def remarks(pictures: list[Picture], tokenizer: Any, tokens: int) -> list[str]:
    """Warnings about prompts: those that are truncated, and weights that have no effect."""
    texts: dict[str, str] = {}  # text -> where it is first
    for i, picture in enumerate(pictures):
        texts.setdefault(picture.prompt, f"prompt {i + 1}")
        texts.setdefault(picture.negative, f"the negative prompt of prompt {i + 1}")
    lengths = token_counts(tokenizer, list(texts)).tolist()
    truncated = [
        f"{where} has {length} tokens and is truncated to the text encoder's {tokens}: "
        f"{text[:60]}{'...' if len(text) > 60 else ''}"
        for (text, where), length in zip(texts.items(), lengths, strict=True)
        if length > tokens
    ]
    lines = truncated[:LISTED]
    if len(truncated) > LISTED:
        lines.append(f"{len(truncated) - LISTED} more prompts are truncated to {tokens} tokens")
    weighted = next((where for text, where in texts.items() if _WEIGHTS.search(text)), None)
    if weighted:
        lines.append(
            f"{weighted} has A1111's prompt syntax, e.g. (word:1.2); here brackets and numbers are "
            f"plain text"
        )
    return lines


def _picture(line: str, default: Picture, where: str) -> Picture:
    prompt, *rest = _OPTION.split(line)  # prompt, name, value, name, value, ...
    settings: dict[str, Any] = {}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        field = name.lower() if name.lower() in OURS else KOHYA.get(name.lower())
        if field is None:
            raise UserError(
                f"{where}: --{name} is not supported; a line takes "
                f"{' '.join(f'--{each}' for each in OURS)}, and kohya's "
                f"{' '.join(f'--{each}' for each in KOHYA)}"
            )
        if field in settings:
            raise UserError(f"{where}: --{name} sets the {field} a second time; remove one")
        value = text.strip().removeprefix("=").strip()
        settings[field] = _value(field, value, f"{where}: --{name}")
    size = settings.pop("size", None)
    if size is not None and settings.keys() & {"width", "height"}:
        raise UserError(f"{where}: --size and --w or --h both set the size; remove one")
    picture = replace(default, prompt=prompt.strip(), **settings)
    width, height = size_of(size or f"{picture.width}x{picture.height}", where)
    return _checked(replace(picture, width=width, height=height), where)


def _value(field: str, text: str, where: str) -> Any:
    if field in {"negative", "size"}:
        return text
    kind, pattern, noun = _NUMBERS.get(field, _WHOLE)
    if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        raise UserError(f"{where} {text!r} is not {noun}; give one, or remove the option")
    return kind(text)


def _checked(picture: Picture, where: str) -> Picture:
    """The picture. Raises UserError for a number that is out of range."""
    steps, guidance, seed = picture.steps, picture.guidance, picture.seed
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"{where}: --steps {steps} is not from 1 to {MOST_STEPS}; give another")
    if math.isnan(guidance) or not 0 <= guidance <= MOST_GUIDANCE:
        raise UserError(
            f"{where}: --guidance {guidance:g} is not from 0 to {MOST_GUIDANCE}; give another"
        )
    if not 0 <= seed < SEEDS:
        raise UserError(f"{where}: --seed {seed} is not from 0 to {SEEDS - 1}; give another")
    return picture
