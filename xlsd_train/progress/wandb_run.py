"""`--log-with wandb`: a process of its own follows the run's folder and logs it to W&B.

Training starts that process and closes its input at the end; it imports nothing of wandb. So no
crash and no hang of wandb, nor a network that is gone, reaches the run: that is one warning. The
process ends by itself when training was killed. RUN/wandb/id is the run's id in W&B, for a resume.
"""

import io
import logging
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from PIL import Image

from xlsd_cache.errors import one_line
from xlsd_cache.pages.thumbnails import thumbnail
from xlsd_cache.runtime.atomic import write_bytes
from xlsd_train.progress.events import kill
from xlsd_train.runs.json_files import Log
from xlsd_train.runs.layout import METRICS_LOG, SAMPLES, VALIDATION_LOG, WANDB, WANDB_ID, steps_in
from xlsd_train.runs.record import RunRecord, read_record
from xlsd_train.runs.tracked import hyperparameters, sentence, step_values, validation_values
from xlsd_train.step.distributed import environment_alone

log = logging.getLogger("xlsd.train.progress")

POLL_S = 1.0
FINISH_S = 60.0  # to upload the rest at the end
PROJECT = "xlsd"


@contextmanager
def following(run: Path, step: int) -> Iterator[None]:
    """While the block trains a run from a step on, another process logs it to W&B."""
    own = environment_alone()
    own.setdefault("WANDB_ERROR_REPORTING", "false")
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", __name__, str(run), str(step)], env=own, stdin=subprocess.PIPE,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        given_up = Event()
        watch = Thread(target=_warn, args=(process, output, given_up), daemon=True)
        watch.start()
        code, wait_s = b"1", 0.0  # after a second Ctrl-C it ends by itself
        try:
            yield
            code, wait_s = b"0", FINISH_S
        except Exception:
            wait_s = FINISH_S
            raise
        finally:
            try:
                process.communicate(code, wait_s)
            except subprocess.TimeoutExpired:
                given_up.set()
                if wait_s:
                    kill(process)
                    log.warning(
                        f"W&B took more than {wait_s:g} s to finish and was ended; "
                        f"`wandb sync {shlex.quote(str(run / WANDB))}` uploads the rest"
                    )
            watch.join(1)


def _warn(process: "subprocess.Popen[bytes]", output: Any, given_up: Event) -> None:
    """Wait for the process; log once why it failed, if so."""
    code = process.wait()
    if code and not given_up.is_set():
        output.seek(0)
        lines: list[bytes] = output.read().strip().splitlines()
        last = lines[-1] if lines else b"no message"
        log.warning(
            f"logging to W&B ended with code {code}: {last.decode(errors='replace')}; "
            f"training goes on, and a resume logs what is missing"
        )


class Follower:
    """Finds what is new in a run's folder, in the order of steps that W&B needs."""

    def __init__(self, run: Path, record: RunRecord, newest: int) -> None:
        """`newest`: the step that the run starts from."""
        self._run, self._record, self._newest = run, record, newest
        self._logs = {name: Log(run / name) for name in (METRICS_LOG, VALIDATION_LOG)}
        self._drawn = set[int]()
        self._waiting: list[tuple[int, dict[str, Any]]] = []

    def new(self, ended: bool = False) -> list[tuple[int, dict[str, Any]]]:
        """Steps with values; later ones than the newest line of metrics wait, unless `ended`."""
        metrics = [(line["step"], step_values(line)) for line in self._lines(METRICS_LOG)]
        self._newest = max([self._newest, *(step for step, _ in metrics)])
        for line in self._lines(VALIDATION_LOG):
            self._waiting.append((line["step"], validation_values(line)))
        for step, folder in steps_in(self._run / SAMPLES).items():
            pictures = sorted(folder.glob("[0-9]*.png"))
            if step not in self._drawn and len(pictures) == len(self._record.prompts):
                self._drawn.add(step)
                self._waiting.append((step, {"samples": pictures}))
        found = [*metrics, *self._waiting]
        ready = [it for it in found if ended or it[0] <= self._newest]
        self._waiting = [it for it in found if not (ended or it[0] <= self._newest)]
        return sorted(ready, key=lambda it: it[0])

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The next whole lines of a log."""
        for lines in self._logs[name].read():
            yield from (line for _, line in lines if line is not None)


def main(run: Path, step: int) -> None:
    """Log a run that is trained from a step on, until the input ends."""
    import wandb
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)  # the tracker asks it whether this is the main process
    record, path = read_record(run), run / WANDB_ID
    known = path.read_text().strip() if path.exists() else ""
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, (known or secrets.token_hex(4)).encode())
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=path.read_text(), resume="allow", dir=str(run), notes=sentence(record),
        name=os.environ.get("WANDB_NAME", run.name),
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, symlink=False,
            x_stats_pid=os.getppid(),
        ),
    )  # fmt: skip
    tracker.start()
    told = {name: each for name, each in record.config.items() if each is not None}
    told |= {**hyperparameters(record), "memory": record.memory, "xlsd": record.xlsd}
    tracker.store_init_configuration(told)
    first = tracker.run.step  # the next that W&B lacks; 0 offline, where it does not know
    if known and tracker.run.offline:
        first = step + 1
    follower, ended, code = Follower(run, record, step), Event(), []

    def wait() -> None:
        code.append(int(sys.stdin.read() or 1))
        ended.set()

    Thread(target=wait, daemon=True).start()
    while True:
        last = ended.wait(POLL_S)
        for at, values in follower.new(last):
            if at >= first:
                pictures = values.pop("samples", ())
                shown = [_picture(*each) for each in zip(pictures, record.prompts, strict=False)]
                tracker.log({**values, **({"samples": shown} if shown else {})}, step=at)
        if last:
            break
    tracker.run.finish(exit_code=code[0])


def _picture(path: Path, prompt: str) -> Any:
    """A small copy of a PNG, with its prompt."""
    import wandb

    image = Image.open(io.BytesIO(thumbnail(path, keep=False) or b"")).convert("RGB")
    return wandb.Image(image, caption=prompt, file_type="jpg")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
