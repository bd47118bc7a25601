"""Environment variables that are set before CUDA starts."""

import json
import os
from pathlib import Path

import pytest

from xlsd_cache.runtime.device import set_precision


def test_engines_that_want_gigabytes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form that PyTorch reads: an operation and an engine's number a rule."""
    monkeypatch.delenv("CUDNN_ERRATA_JSON_FILE", raising=False)
    set_precision("fp32")
    rules = json.loads(Path(os.environ["CUDNN_ERRATA_JSON_FILE"]).read_text())["rules"]
    assert {rule["operation"] for rule in rules} == {"ConvFwd", "ConvBwdData", "ConvBwdFilter"}
    assert all(isinstance(rule["engine"], int) for rule in rules)


def test_a_users_own_list_of_engines_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDNN_ERRATA_JSON_FILE", "mine.json")
    set_precision("fp32")
    assert os.environ["CUDNN_ERRATA_JSON_FILE"] == "mine.json"
