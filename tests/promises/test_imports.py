"""Light paths load no torch. The order of the rooms is import-linter's, in pyproject.toml."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "torchvision")
SERVER = ("starlette", "uvicorn")  # which only xlsd_train.live and watch --http load
LIGHT = [
    "xlsd_cache",
    "xlsd_cache.cli",
    "xlsd_cache.commands.captions",
    "xlsd_cache.commands.info",
    "xlsd_cache.commands.export_index",
    "xlsd_cache.commands.report",
    "xlsd_cache.dataset.batch_order",
    "xlsd_cache.store.reader",
    "xlsd_train",
    "xlsd_train.cli",
    "xlsd_train.commands.sweep",
    "xlsd_train.commands.tags",
    "xlsd_train.config.recipes",
    "xlsd_train.config.train",
    "xlsd_train.live.server",
    "xlsd_train.report.page",
    "xlsd_train.runs.history",
    "xlsd_train.runs.record",
    "xlsd_train.runs.validation_log",
]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_no_torch(module: str) -> None:
    heavy = HEAVY if module == "xlsd_train.live.server" else HEAVY + SERVER
    look = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", module
