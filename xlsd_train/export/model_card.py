"""What is known of a model that is exported: for its metadata, and as a model card for people."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from xlsd_cache import __version__
from xlsd_train.runs.json_files import objects_in
from xlsd_train.runs.layout import CONFIG, METRICS, STATE, VALIDATION, grid_of, run_of
from xlsd_train.runs.record import EMPTY, RunRecord, read_record, read_state
from xlsd_train.runs.validation_log import SETS
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
class History:
    """Where a model comes from, as far as its run's folder tells; {} and None without a run."""

    source: str
    record: RunRecord
    state: dict[str, Any]  # of the checkpoint
    last: dict[str, Any]  # its line of metrics.jsonl
    validation: dict[str, Any]  # the newest line of validation.jsonl up to the checkpoint
    date: str | None  # of the checkpoint
    grid: Path | None  # its run's sample grid

    @classmethod
    def of(cls, source: str, checkpoint: Path | None) -> "History":
        """Of a checkpoint in its run; what is missing there is left out."""
        if checkpoint is None:
            return cls(source, EMPTY, {}, {}, {}, None, None)
        run, state = run_of(checkpoint), checkpoint / STATE
        seen = read_state(checkpoint)
        grid = grid_of(run)
        return cls(
            source,
            read_record(run) if (run / CONFIG).is_file() else EMPTY,
            seen,
            _line(run / METRICS, seen["step"]),
            _line(run / VALIDATION, seen["step"]),
            datetime.fromtimestamp(int(state.stat().st_mtime), UTC).isoformat(),
            grid if grid.is_file() else None,
        )

    @property
    def _batch(self) -> Any:
        """Where --batch is auto, what was found; older runs keep none beside it."""
        return self.record.batch or self.record.config["batch"]

    @property
    def _recipe(self) -> str | None:
        """Which the run began with; older runs say nothing of it."""
        recipe = self.record.recipe
        return f"{Path(recipe['name']).name}, sha256 {recipe['sha256'][:12]}" if recipe else None

    def _of_stores(self, name: str) -> str | None:
        """What the stores' records say; None without a run, or where none does."""
        values = [dict(store).get(name) for store in self.record.stores]
        return " + ".join(str(value) for value in values if value) or None

    def metadata(self, title: str, folded: str, scheduler: dict[str, Any]) -> dict[str, str]:
        """For a safetensors header: modelspec's keys (sai_model_spec 1.0.0), and ours."""
        config = _public(self.record.config)
        prediction = prediction_type(scheduler)
        stores = self.record.stores  # 0: that of imported latents is unknown
        side = max((store.get("resolution", 0) for store in stores), default=0) or 512
        told = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.title": title,
            "modelspec.resolution": f"{side}x{side}",
            "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
            "modelspec.date": self.date,
            "modelspec.description": folded,
            "xlsd.version": __version__,
            "xlsd.source": _public(self.source),
            "xlsd.folded": folded,
            "xlsd.phase": config.get("phase"),
            "xlsd.step": self.state.get("step"),
            "xlsd.images_seen": self.state.get("images_seen"),
            "xlsd.store": self._of_stores("fingerprint"),
            "xlsd.recipe": json.dumps(config) if config else None,
        }
        return {name: str(value) for name, value in told.items() if value is not None}

    def card(
        self, title: str, folded: str, dtype: str, files: dict[str, str], grid: str | None,
        needs: str, notes: list[str],
    ) -> str:  # fmt: skip
        """README.md. `files` maps names to hashes, one alone is a single file; `grid` is a name.

        `needs` is what programs must be told, if anything, and `notes` are good to know.
        """
        config = _public(self.record.config)
        base = _public(self.record.model["source"] or self.source)
        facts = {
            "trained from": base,
            "what trained": config.get("phase"),
            "recipe": self._recipe,
            "steps": self.state.get("step"),
            "images seen": self.state.get("images_seen"),
            "images in the store": self._of_stores("images"),
            "resolution": self._of_stores("resolution"),
            "the store's fingerprint": self._of_stores("fingerprint"),
            "images selected": self._of_stores("selected"),
            "batch": config.get("batch") and f"{self._batch} x {config.get('accum', 1)}",
            "clip skip in training": config.get("clip_skip") or None,
            "optimizer": config.get("optimizer"),
            "learning rate": config.get("lr"),
            "computed in": self.record.precision or None,
            "loss, smoothed": _short(self.last.get("loss_smoothed")),
            **{
                f"validation loss, {name.replace('_', ' ')}": _short(found["mean"])
                for name, found in self.validation.items()
                if isinstance(found, dict)
            },
            "weights": dtype,
            "made by": f"xlsd {__version__}",
        }
        environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701 - Markdown
        return environment.from_string(CARD).render(
            title=title,
            heading=_cell(title),
            folded=folded,
            needs=bool(needs),
            told=[_plain(line) for line in (needs, *notes) if line],
            hub_base=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
            facts=[(name, _cell(value)) for name, value in facts.items() if value is not None],
            grid=quote(grid) if grid else None,
            prompts=[_cell(prompt) for prompt in self.record.prompts],
            recipe=json.dumps(config, indent=2) if config else None,
            single=len(files) == 1,
            files=list(files.items()),
        )


_LINE = {"step!": int, **{name: {"mean!": float} for name in (*SETS, "gap")}}


def _line(path: Path, step: int) -> dict[str, Any]:
    """A log's newest line up to this step, of the weights themselves; {} where there is none."""
    found: dict[str, Any] = {}
    for told in objects_in(path, _LINE):
        if told.get("weights", "live") == "live" and told["step"] <= step:
            found = told
    return found


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _public(value: Any) -> Any:
    """Without this machine's folders: of what names an absolute path its last part alone."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    path = Path(value) if isinstance(value, str) else Path()
    return path.name if path.is_absolute() else value


def _plain(text: str) -> str:
    """Text in which a name begins no markup; code spans stay."""
    return re.sub(r"([|<\\\[\]])", r"\\\1", " ".join(text.split()))


def _cell(value: Any) -> str:
    """Text that ends no row of a table and begins no markup."""
    return re.sub(r"([|<\\`\[\]])", r"\\\1", " ".join(str(value).split()))
