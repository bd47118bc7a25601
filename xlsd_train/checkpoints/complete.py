"""Whether a run is complete. Checked before torch is loaded."""

import json
import os

from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.resume import LENGTH, differing, other_start
from xlsd_train.config.train import TrainConfig
from xlsd_train.runs.layout import checkpoints, has_samples, step_of
from xlsd_train.runs.record import read_record
from xlsd_train.runs.validation_log import is_validated


def complete(config: TrainConfig) -> str | None:
    """What to tell the user about a complete run; None if there is something to do.

    A run with another setting that matters is left to training, which continues it or refuses.
    """
    if config.out is None or config.dry_run or not (saved := checkpoints(config.out)):
        return None
    try:
        record = read_record(config.out)
    except UserError:
        return None
    asked = record.asked()
    wanted = json.loads(json.dumps(config.resolved().to_json(), default=os.fspath))
    other = any(wanted[name] != asked.get(name) for name in (*LENGTH, "data"))
    if other or differing(asked, wanted) or other_start(asked, config):
        return None
    step, planned = step_of(saved[-1]), record.planned_steps
    if not planned or step < config.last_step(planned):
        return None
    if config.sample_every and not has_samples(config.out, step):
        return None  # a signal at its end left out the last samples
    if config.validate_every and not is_validated(config.out, step):
        return None
    if step < planned:
        longer = "to continue, leave out --stop-after or raise it"
    elif config.scheduler == "constant":
        longer = "to continue, raise --steps or --epochs"
    else:
        longer = f"its learning rate has decayed; start a new run with --model {config.out}"
    done = f"{config.out} is already complete: step {step} of {planned}, checkpoint {saved[-1]}"
    return f"{done}; {longer}"
