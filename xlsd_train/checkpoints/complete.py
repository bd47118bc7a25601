"""Whether a run has anything left to do, found out before anything is loaded."""

import json
import os

from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.resume import LENGTH, differing, other_start
from xlsd_train.config.train import TrainConfig
from xlsd_train.runs.layout import checkpoints, has_samples, step_of
from xlsd_train.runs.record import read_record
from xlsd_train.runs.validation_log import is_validated


def complete(config: TrainConfig) -> str | None:
    """What to say of a run that is where it was to end; None where there is something to do.

    Where a setting differs that counts, it is training that goes on or refuses.
    """
    if config.out is None or config.dry_run or not (found := checkpoints(config.out)):
        return None
    try:
        record = read_record(config.out)
    except UserError:
        return None
    there = record.asked()
    wanted = json.loads(json.dumps(config.resolved().to_json(), default=os.fspath))
    other = any(wanted[name] != there.get(name) for name in (*LENGTH, "data"))
    if other or differing(there, wanted) or other_start(there, config):
        return None
    step, planned = step_of(found[-1]), record.planned_steps
    if not planned or step < min(planned, config.stop_after or planned):
        return None
    if config.sample_every and not has_samples(config.out, step):
        return None  # a signal at its end left out what is due there
    if config.validate_every and not is_validated(config.out, step):
        return None
    if step < planned:
        longer = "without --stop-after, or with a higher one, it goes on"
    elif config.scheduler == "constant":
        longer = "with a longer plan, --steps or --epochs, it goes on"
    else:
        longer = f"its rate has come down to its end: a new run may begin at --model {config.out}"
    told = f"{config.out} is complete: step {step} of {planned} planned, checkpoint {found[-1]}"
    return f"{told}; {longer}"
