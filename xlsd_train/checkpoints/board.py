"""RUN/tensorboard: metrics, validation, samples, hyperparameters and texts, for TensorBoard.

Each process of a run writes a file of its own. Its first event hides what earlier files have of
later steps, so that of a resumed run each step is shown once.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter, summary

from xlsd_cache.pages.thumbnails import small
from xlsd_train.runs.record import RunRecord
from xlsd_train.runs.tracked import hyperparameters, sentence

FLUSH_S = 30  # a reader lags by this much
QUALITY = 80
PROMPT = 60  # characters of a prompt in the title of its samples


class Board:
    """Writes for one process of a run; numbers are written in a thread of their own."""

    def __init__(self, folder: Path, last: int, record: RunRecord) -> None:
        """`last`: the step to continue from; -1 for a run without a checkpoint."""
        self._writer = FileWriter(str(folder), flush_secs=FLUSH_S)
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), last + 1)
        make: Any = summary
        config = {name: each for name, each in record.config.items() if each is not None}
        _, begin, self._end = make.hparams(hyperparameters(record), {})
        if last < 0:
            for each in (
                begin,
                make.text("run", sentence(record)),
                make.text("prompts", _code("\n".join(record.prompts))),
                make.text("config", _code(json.dumps(config, indent=1, default=str))),
            ):
                self._writer.add_summary(each, 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add the numbers of a step."""
        each = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_summary(Summary(value=each), step)

    def log_samples(self, pictures: Sequence[Path], prompts: Sequence[str], step: int) -> None:
        """Add small copies of the PNGs that were drawn after a step."""
        for picture, prompt in zip(pictures, prompts, strict=True):
            tag = f"samples/{picture.stem} {prompt[:PROMPT]}"
            value = Summary.Value(tag=tag, image=_small(picture))
            self._writer.add_summary(Summary(value=[value]), step)

    def complete(self, step: int) -> None:
        """Tell that the run is complete."""
        self._writer.add_summary(self._end, step)

    def flush(self) -> None:
        """Give everything so far to the system; a kill loses what comes later."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _small(picture: Path) -> Summary.Image:
    with Image.open(picture) as image:
        copy = small(image)
    file = io.BytesIO()
    copy.save(file, "JPEG", quality=QUALITY)
    return Summary.Image(
        width=copy.width, height=copy.height, colorspace=3, encoded_image_string=file.getvalue()
    )


def _code(lines: str) -> str:
    """Markdown that shows the lines as they are."""
    return "\n".join(f"    {line}" for line in lines.splitlines())
