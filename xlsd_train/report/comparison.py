"""Models on the same prompts -> one HTML page, with any two of them one over the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xlsd_cache.pages.render import render
from xlsd_cache.pages.thumbnails import data_uri

if TYPE_CHECKING:  # it loads torch
    from xlsd_train.evaluation.images import Picture

NO_PROMPT = "(no prompt)"


def comparison(
    models: Sequence[str], pictures: Sequence["Picture"], files: Sequence[Sequence[Path]]
) -> str:
    """The HTML; `files` has each model's PNGs in the pictures' order. All text is escaped."""
    settings = [_settings(picture) for picture in pictures]
    common = [it for it in settings[0] if all(it in others for others in settings)]
    prompts = [picture.prompt or NO_PROMPT for picture in pictures]
    return render(
        __package__,
        "comparison.html",
        models=models,
        common=", ".join(common),
        pictures=[
            {
                "prompt": prompt,
                "negative": picture.negative,
                "settings": ", ".join(it for it in own if it not in common),
            }
            for prompt, picture, own in zip(prompts, pictures, settings, strict=True)
        ],
        images=[[data_uri(path.read_bytes(), "png") for path in row] for row in files],
        data={"models": models, "prompts": prompts},
    )


def _settings(picture: "Picture") -> list[str]:
    return [
        f"{picture.width}x{picture.height}",
        f"seed {picture.seed}",
        f"{picture.steps} steps",
        f"guidance {picture.guidance:g}",
    ]
