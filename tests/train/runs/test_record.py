"""RunRecord reads config.json of every version and writes it back equal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xlsd_cache.errors import UserError
from xlsd_train.runs.record import EMPTY, FIELDS, RunRecord, record_to_resume

OLD: dict[str, Any] = {"xlsd": "0.1", "settings": {"lr": 1}, "stores": [], "config": {}, "x": [1]}


def test_a_new_record_has_every_key_but_that_of_forced_changes() -> None:
    assert list(EMPTY.to_json()) == [name for name in FIELDS if name != "changed"]
    assert list(FIELDS)[:3] == ["command", "config", "adapted"]
    forced = replace(EMPTY, changed=[{"step": 1}])
    assert list(forced.to_json()) == list(FIELDS)


def test_a_record_of_another_version_stays_as_it_is_written() -> None:
    """Its order, the keys that it lacks, and those that are not known here."""
    record = RunRecord.from_json(OLD)
    assert json.dumps(record.to_json()) == json.dumps(OLD)
    assert (record.processes, record.objective["kind"], record.recipe) == (1, "", None)
    longer = replace(record, planned_steps=9, validation={})
    assert json.dumps(longer.to_json()) == json.dumps({**OLD, "planned_steps": 9})


def test_options_as_asked_for() -> None:
    adapted = {"batch": {"from": 32, "to": 20}}
    record = replace(EMPTY, config={"batch": 20, "seed": 1}, adapted=adapted)
    assert record.asked() == {"batch": 32, "seed": 1}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "it has the wrong type"),
        ({**OLD, "stores": [{"path": "x"}]}, r"stores\[0\]\.\w+ is missing"),
        ({**OLD, "objective": {"kind": "eps"}}, r"objective\.before is missing"),
        ({**OLD, "captions": {"cut": 1}}, r"captions\.looked_at is missing"),
        ({**OLD, "step_s": ["x", "y"]}, r"step_s\[1\]"),
        ({**OLD, "recipe": {"name": 1}}, r"recipe\.sha256"),
    ],
)
def test_what_is_not_a_record_is_refused_with_its_place(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RunRecord.from_json(value)


def test_a_resume_needs_what_the_plan_was() -> None:
    with pytest.raises(UserError, match="config.json is damaged .batch is missing.; use another"):
        record_to_resume(Path("x"), OLD)
