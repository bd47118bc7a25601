"""What TensorBoard's own reader finds of a run: everything, and each step once."""

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from tests.support import metrics, spawn, train, wait_for
from tests.support.sessions import slow_train
from xlsd_cache.pages.thumbnails import SIDE
from xlsd_train.runs.layout import checkpoints
from xlsd_train.runs.record import read_record
from xlsd_train.runs.validation_log import BANDS

Arguments = list[object]
LOOKS: Arguments = [
    "--sample-every", 3, "--sample-steps", 1, "--validate-every", 3, "--validation-fraction", 0.4,
]  # fmt: skip


@pytest.fixture
def arguments(arguments: Arguments, tmp_path: Path) -> Arguments:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a *cup*\na cat --size 448x64\n")
    return [*arguments, *LOOKS, "--sample-prompts", prompts]


def read(run: Path) -> EventAccumulator:
    """Everything that is in a run's logs, of what TensorBoard shows."""
    every = dict.fromkeys(("scalars", "images", "tensors"), 0)
    found = EventAccumulator(str(run / "tensorboard"), size_guidance=every)
    return found.Reload()


def sessions(folder: Path) -> Any:
    """What the HParams tab lists for the runs in a folder."""
    logs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(logs, str(folder))))
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=list(api_pb2.Status.values())
    )
    return Handler(RequestContext(), context, "", asked).run().session_groups


def test_tensorboard_shows_everything(arguments: Arguments, tmp_path: Path) -> None:
    """Also in its HParams tab, without the folder that SummaryWriter.add_hparams would make."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(*arguments, "--save-every", 6) == 0
    found, lines = read(run), metrics(run)
    for name in lines[0].keys() - {"step"} | {"images_per_s", "wait_s", "peak_gib"}:
        scalars = found.Scalars(f"train/{name}")
        assert [it.step for it in scalars] == [1, 2, 3, 4, 5, 6]
        if name in lines[0]:
            assert [it.value for it in scalars] == pytest.approx([line[name] for line in lines])
    validated = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    held_out = found.Scalars("validation/live/held_out")
    assert [it.value for it in held_out] == pytest.approx(
        [line["held_out"]["mean"] for line in validated]
    )
    bands = [tag for tag in found.Tags()["scalars"] if tag.startswith("validation_bands/live/")]
    assert len(bands) == BANDS
    assert bands[0].endswith("/00-10%")
    assert found.Scalars(bands[3])[2].value == pytest.approx(
        validated[2]["held_out"]["bands"][3]["mean"]
    )
    for tag, size in (("samples/00 a *cup*", 192), ("samples/01 a cat", SIDE)):
        shown = found.Images(tag)
        assert [it.step for it in shown] == [0, 3, 6]
        for it in shown:
            with Image.open(io.BytesIO(it.encoded_image_string)) as image:
                assert image.format == "JPEG"
                assert image.size == (it.width, it.height)
        assert size == max(shown[0].width, shown[0].height)
    texts = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0] for tag in found.Tags()["tensors"]
    }
    assert texts["run/text_summary"].startswith(b"Trains the UNet of ")
    assert texts["prompts/text_summary"] == b"    a *cup*\n    a cat"
    assert b'     "batch": 4,' in texts["config/text_summary"]
    options: Arguments = ["--lr", 2e-3, "--stop-after", 1, "--sample-every", 0]
    assert train(*arguments, *options, "--validate-every", 0, "--out", other) == 0
    assert not [path for path in (run / "tensorboard").iterdir() if path.is_dir()]
    listed = sessions(tmp_path)
    assert [group.hparams["lr"].number_value for group in listed] == [2e-3, 1e-3]
    assert listed[1].hparams["optimizer"].string_value == "lion"
    assert listed[1].hparams["images"].number_value == read_record(run).stores[0]["selected"]
    statuses = [group.sessions[0].status for group in listed]
    assert statuses == [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS]
    last = {value.name.tag: value.value for value in listed[1].metric_values}
    assert last["train/loss"] == pytest.approx(lines[-1]["loss"])
    assert last["validation/live/held_out"] == held_out[-1].value


def test_a_run_that_was_killed_shows_each_step_once(arguments: Arguments, tmp_path: Path) -> None:
    """Killed before its first checkpoint, and later between two of them."""
    run, log = tmp_path / "run", tmp_path / "log"
    given = [*arguments, "--steps", 16, "--save-every", 5]
    for saved, logged in ((0, 3), (1, 7)):
        process = spawn(slow_train, *given, log=log)
        wait_for(lambda logged=logged: lines(run) >= logged)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(checkpoints(run)) == saved, log.read_text()
        time.sleep(1)  # files are read in the order of their names, which begin with the second
    assert train(*given) == 0
    found = read(run)
    assert len(list((run / "tensorboard").iterdir())) == 3
    for tag in found.Tags()["scalars"]:
        of = list(range(1, 17)) if tag.startswith("train/") else [0, 3, 6, 9, 12, 15, 16]
        assert [it.step for it in found.Scalars(tag)] == of, tag
    for tag in found.Tags()["images"]:
        assert [it.step for it in found.Images(tag)] == [0, 3, 6, 9, 12, 15, 16]
    assert [it.value for it in found.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in metrics(run)]
    )
    served = plugin_event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [it.step for it in served.Tensors("run/text_summary")] == [0]  # the other keeps old ones


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
