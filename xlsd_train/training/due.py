"""What is due after a step: samples, validation, a checkpoint, the end of the run."""

from typing import NamedTuple

from xlsd_cache.runtime.signals import StopSignal
from xlsd_train.config.train import TrainConfig
from xlsd_train.runs.layout import REQUESTS, SAMPLE, SAVE, STOP, has_samples
from xlsd_train.runs.validation_log import is_validated
from xlsd_train.training.session import Session


class Due(NamedTuple):
    """What is due after a step."""

    samples: bool = False
    validates: bool = False
    saves: bool = False
    ends: bool = False

    @property
    def pauses(self) -> bool:
        """Whether anything runs between this step and the next."""
        return self.samples or self.validates or self.saves

    @classmethod
    def before_first(cls, session: Session, step: int, last: int) -> "Due":
        """What is due at step 0, or that a signal prevented after a resumed checkpoint's `step`."""
        samples, validates = _scheduled(session.config, step, step == last)
        folder, main = session.run.folder, session.main  # the main process's folder decides
        samples = main and samples and (step == 0 or not has_samples(folder, step))
        validates = main and validates and not is_validated(folder, step)
        return cls(*session.processes.any(samples, validates))

    @classmethod
    def after(cls, session: Session, stop: StopSignal, step: int, last: int) -> "Due":
        """After a signal only a checkpoint. RUN/STOP ends the run as --stop-after would."""
        asked = _requests(session, stop)
        if "signal" in asked:
            return cls(saves=True, ends=True)
        ends = step == last or STOP in asked
        samples, validates = _scheduled(session.config, step, ends)
        saves = SAVE in asked or ends or step % session.config.save_every == 0
        return cls(samples or SAMPLE in asked, validates, saves, ends)


def _scheduled(config: TrainConfig, step: int, ends: bool) -> tuple[bool, bool]:
    """Whether samples and validation are due by --sample-every and --validate-every."""
    samples, validates = (
        every > 0 and (ends or step % every == 0)
        for every in (config.sample_every, config.validate_every)
    )
    return samples, validates


def _requests(session: Session, stop: StopSignal) -> set[str]:
    """What signals and the files SAVE, SAMPLE and STOP ask for; all processes agree."""
    names = (*REQUESTS, "signal")
    flags = [session.main and session.run.take_request(name) for name in REQUESTS]
    flags = session.processes.any(*flags, stop.asked > 0)
    return {name for name, flag in zip(names, flags, strict=True) if flag}
