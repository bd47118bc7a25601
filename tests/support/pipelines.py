"""Copies of pipeline folders."""

import json
import shutil
from pathlib import Path

from xlsd_train.weights.vae_fold import SD15_FACTOR


def with_factor(folder: Path, out: Path, factor: float = SD15_FACTOR) -> str:
    """Copy a pipeline's configs, and set the VAE's scaling factor to the one of SD1.5."""
    ignored = shutil.ignore_patterns("*.safetensors", "README.md")
    shutil.copytree(folder, out, ignore=ignored)
    config = json.loads((out / "vae/config.json").read_text())
    (out / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": factor}))
    return str(out)
