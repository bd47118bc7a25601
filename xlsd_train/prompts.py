"""What `xlsd-train sample` is asked to draw: a file of prompts, with settings of their own."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

from xlsd_cache import UserError
from xlsd_train.model_commands import SampleConfig
from xlsd_train.picture import Picture
from xlsd_train.sample import read_lines

SEEDS = 2**63  # what torch's generators take, but for negative ones
_OPTION = re.compile(r"(?:^|\s)--([a-z][a-z-]*)(?:\s|$)")
_KINDS: dict[str, Callable[[str], object]] = {
    "seed": int,
    "steps": int,
    "guidance": float,
    "negative": str,
    "size": str,
}


def pictures(config: SampleConfig) -> list[Picture]:
    """The pictures of --prompts, in order. Raises UserError naming the one that cannot be drawn."""
    lines = read_lines(config.prompts, "--prompts")
    return [_picture(line, config, number) for number, line in enumerate(lines)]


def _picture(line: str, config: SampleConfig, number: int) -> Picture:
    where = f"{config.prompts}, prompt {number + 1}"
    prompt, *rest = _OPTION.split(line)  # prompt, name, value, name, value, ...
    own = dict(zip(rest[::2], (value.strip() for value in rest[1::2]), strict=True))
    for name in own.keys() - _KINDS.keys():
        raise UserError(f"{where}: --{name} is none of {', '.join(f'--{k}' for k in _KINDS)}")
    try:
        told = {name: _KINDS[name](value) for name, value in own.items()}
    except ValueError as error:
        raise UserError(f"{where}: {error}; give a number") from error
    width, height = _size(str(told.pop("size", config.size)), where if "size" in own else "--size")
    asked = Picture(
        prompt.strip(),
        config.negative,
        config.seed + number,
        config.steps,
        config.guidance,
        width,
        height,
        config.scheduler,
    )
    asked = replace(asked, **told)  # type: ignore[arg-type]
    if asked.steps < 1 or not 0 <= asked.guidance < math.inf:
        raise UserError(
            f"{where}: --steps {asked.steps} --guidance {asked.guidance:g} cannot be drawn; give "
            f"1 step or more and a guidance of 0 or more"
        )
    if not 0 <= asked.seed < SEEDS:
        raise UserError(f"{where}: --seed {asked.seed} is not from 0 to {SEEDS - 1}; give another")
    return asked


def _size(text: str, where: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not width or not height or width % 8 or height % 8:
        raise UserError(f"{where}: {text!r} is no size in multiples of 8; give say 512x768")
    return width, height
