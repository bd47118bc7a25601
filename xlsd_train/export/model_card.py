"""Metadata and model card of an exported model, from what its run recorded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from xlsd_cache import __version__
from xlsd_train.runs.history import CheckpointHistory
from xlsd_train.weights.prediction_type import prediction_type

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
{%- if hub_base %}
base_model: {{ hub_base }}
{%- endif %}
tags:
- stable-diffusion
- xlsd
---
# {{ heading }}

A model of SD1.5's shape. {{ folded }}
The licence is that of the base model.

{% if single -%}
Put `{{ files[0][0] }}` where your program keeps SD1.5 models
{{- "." if needs else "; it needs nothing else." }}
{%- else -%}
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{{ title }}")
```
{%- endif %}
{%- for line in told %}

{{ line }}
{%- endfor %}

| | |
|---|---|
{%- for name, value in facts %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- if grid %}

![samples: training steps down, prompts across]({{ grid }})
{% for prompt in prompts %}
- {{ prompt }}
{%- endfor %}
{%- endif %}
{%- if recipe %}

The run's settings:

```json
{{ recipe }}
```
{%- endif %}

| file | sha256 |
|---|---|
{%- for name, hash in files %}
| {{ name }} | `{{ hash }}` |
{%- endfor %}
"""


@dataclass(frozen=True)
class ModelCard:
    """Metadata and README of an exported model."""

    title: str
    source: str
    folded: str  # a sentence on the VAE's scaling
    history: CheckpointHistory

    @property
    def _batch(self) -> Any:
        """The batch size; older runs have it in their config only."""
        return self.history.record.batch or self.history.record.config["batch"]

    @property
    def _recipe(self) -> str | None:
        """The recipe that the run started with; None for older runs."""
        recipe = self.history.record.recipe
        return f"{Path(recipe['name']).name}, sha256 {recipe['sha256'][:12]}" if recipe else None

    def _of_stores(self, name: str) -> str | None:
        """A field of the stores' records; None if none has it."""
        values = [dict(store).get(name) for store in self.history.record.stores]
        return " + ".join(str(value) for value in values if value) or None

    def metadata(self, scheduler: dict[str, Any]) -> dict[str, str]:
        """For a safetensors header: modelspec's keys (sai_model_spec 1.0.0), and ours."""
        config = _public(self.history.record.config)
        prediction = prediction_type(scheduler)
        stores = self.history.record.stores  # 0: that of imported latents is unknown
        side = max((store.get("resolution", 0) for store in stores), default=0) or 512
        metadata = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.title": self.title,
            "modelspec.resolution": f"{side}x{side}",
            "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
            "modelspec.date": self.history.date,
            "modelspec.description": self.folded,
            "xlsd.version": __version__,
            "xlsd.source": _public(self.source),
            "xlsd.folded": self.folded,
            "xlsd.phase": config.get("phase"),
            "xlsd.step": self.history.state.get("step"),
            "xlsd.images_seen": self.history.state.get("images_seen"),
            "xlsd.store": self._of_stores("fingerprint"),
            "xlsd.recipe": json.dumps(config) if config else None,
        }
        return {name: str(value) for name, value in metadata.items() if value is not None}

    def markdown(
        self, dtype: str, files: dict[str, str], grid: str | None, usage: str, notes: list[str]
    ) -> str:
        """README.md. `files` maps names to sha256 (one for a single file); `grid` is a file's name.

        `usage` is what other programs must be set to, if anything; `notes` are optional reading.
        """
        config = _public(self.history.record.config)
        base = _public(self.history.record.model["source"] or self.source)
        facts = {
            "trained from": base,
            "what trained": config.get("phase"),
            "recipe": self._recipe,
            "steps": self.history.state.get("step"),
            "images seen": self.history.state.get("images_seen"),
            "images in the store": self._of_stores("images"),
            "resolution": self._of_stores("resolution"),
            "the store's fingerprint": self._of_stores("fingerprint"),
            "images selected": self._of_stores("selected"),
            "batch": config.get("batch") and f"{self._batch} x {config.get('accum', 1)}",
            "clip skip in training": config.get("clip_skip") or None,
            "optimizer": config.get("optimizer"),
            "learning rate": config.get("lr"),
            "computed in": self.history.record.precision or None,
            "loss, smoothed": _short(self.history.metrics.get("loss_smoothed")),
            **{
                f"validation loss, {name.replace('_', ' ')}": _short(entry["mean"])
                for name, entry in self.history.validation.items()
                if isinstance(entry, dict)
            },
            "weights": dtype,
            "made by": f"xlsd {__version__}",
        }
        environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
        return environment.from_string(CARD).render(
            title=self.title,
            heading=_cell(self.title),
            folded=self.folded,
            needs=bool(usage),
            told=[_plain(line) for line in (usage, *notes) if line],
            hub_base=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
            facts=[(name, _cell(value)) for name, value in facts.items() if value is not None],
            grid=quote(grid) if grid else None,
            prompts=[_cell(prompt) for prompt in self.history.record.prompts],
            recipe=json.dumps(config, indent=2) if config else None,
            single=len(files) == 1,
            files=list(files.items()),
        )


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _public(value: Any) -> Any:
    """Without this machine's folders: only the last part of absolute paths."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    path = Path(value) if isinstance(value, str) else Path()
    return path.name if path.is_absolute() else value


def _plain(text: str) -> str:
    """Escape markup in text, except code spans."""
    return re.sub(r"([|<\\\[\]])", r"\\\1", " ".join(text.split()))


def _cell(value: Any) -> str:
    """Escape a table cell."""
    return re.sub(r"([|<\\`\[\]])", r"\\\1", " ".join(str(value).split()))
