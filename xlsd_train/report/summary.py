"""The first screen of the page: what a run is, how far it is, the verdict, what to do next.

Commands are real ones: they use the paths and the options that the run was started with. Only
--on-event is left out: whoever copies a command of another's report must not run their program.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile

from xlsd_train.config.recipes import field_of, without
from xlsd_train.report.pace import last_step
from xlsd_train.report.ranking import Standing
from xlsd_train.report.trend import Trend, diverged
from xlsd_train.runs.bootstrap import Comparison
from xlsd_train.runs.history import History
from xlsd_train.runs.layout import checkpoint_at, checkpoints, step_of
from xlsd_train.runs.validation_log import LIVE, Candidate, best_of, candidate_name, is_validated

PHASES = {"unet": "UNet", "te": "Text encoder", "both": "UNet and text encoder"}
TIED = 3  # tied checkpoints that are named


@dataclass(frozen=True)
class Summary:
    """A run in a few sentences."""

    title: str
    step: int
    last: int  # the step at which it ends; 0 if unknown
    verdict: list[str]  # sentences
    then: str  # what the command does
    command: str

    @property
    def state(self) -> str:
        """Progress in words."""
        if self.last and self.step >= self.last:
            return "finished"
        return f"step {self.step:,} of {self.last:,}" if self.last else f"step {self.step:,}"


def summary(run: History, trend: Trend | None, going: bool) -> Summary:
    """Everything that the first screen says about one run; `going`: it trains now."""
    step, last = run.last.get("step", 0), last_step(run)
    saved = [step_of(path) for path in checkpoints(run.folder)]
    measured = any(is_validated(run.folder, step) for step in saved)
    best = best_of(run.folder, (0, *saved)) if measured else None
    sentences = [_best(best) if best else "No checkpoint was validated, so there is no best one."]
    ends = diverged(run)
    sentences += [str(ends)] if ends else [trend.verdict] if trend else []
    if going and not ends:
        then, command = _meanwhile(run, saved)
    elif ends and ends.step <= 1:  # before any weight changed
        words = ["xlsd-cache", "check", *(store["path"] for store in run.record.stores[:1])]
        then, command = "Check the latents: no weight had changed yet", shlex.join(words)
    else:
        then, command = _next(run, best, trend, step >= last > 0, ends is not None)
    return Summary(_title(run), step, last, sentences, then, command)


def next_of_several(
    standings: Sequence[Standing], runs: Sequence[History], going: Sequence[bool]
) -> tuple[str, str]:
    """What to do with compared runs: train on at the best rate, or look at the same prompts."""
    best = next((run for run in standings if run.loss and run.excess is None), None)
    names = {run.name: run for run in runs}
    run = names[best.name] if best and best.best and best.best[0] else None
    if run and run.config.get("stop_after") and not going[runs.index(run)]:
        then = f"Train on with {run.name}, to its planned length{_left_out(run)}"
        return then, _resumed(run, "stop_after")
    saved = [str(run.folder) for run in runs if checkpoints(run.folder)]
    words = ["sample", *(saved or ["RUN"]), "--prompts", "prompts.txt"]
    return "Sample prompts of your own from all that have a checkpoint", _command(*words)


def _title(run: History) -> str:
    what = PHASES.get(run.config["phase"], "Model") if "phase" in run.config else "Model"
    images = sum(store["selected"] for store in run.record.stores)
    step, epoch = run.last.get("step", 0), run.last.get("epoch", 0)
    if not step:
        return f"{what}: not a step trained yet, {images:,} images"
    steps = "1 step" if step == 1 else f"{step:,} steps"
    return f"{what}, trained for {steps} on {images:,} images, {epoch:,.3g} epochs"


def _best(best: Comparison[Candidate]) -> str:
    if best.best[0] == 0:
        return "No checkpoint improved on the model that it started from."
    tied = [candidate_name(one) for one in best.tied]
    more = f" and {len(tied) - TIED} more" if len(tied) > TIED else ""
    same = f"; statistically tied: {', '.join(tied[-TIED:])}{more}" if tied else ""
    return f"Best checkpoint: {candidate_name(best.best)}, held-out loss {best.loss}{same}."


def _next(
    run: History, best: Comparison[Candidate] | None, trend: Trend | None, finished: bool,
    diverged: bool,
) -> tuple[str, str]:  # fmt: skip
    if diverged and isinstance(run.config.get("lr"), int | float):
        return _lower(run, 0.3, 0.1, 0.03)
    if not finished:
        return f"Resume, if it is not running{_left_out(run)}", _resumed(run)
    if best is None:
        words = ["sample", str(run.folder), "--prompts", "prompts.txt"]
        return "Sample prompts of your own", _command(*words)
    if best.best[0] == 0 and isinstance(run.config.get("lr"), int | float):
        return _lower(run, 1, 0.3, 0.1)
    if trend and trend.state == "falling":
        if run.config.get("stop_after"):
            return f"Train on{_left_out(run)}", _resumed(run, "stop_after")
        longer = ["--steps", str(2 * run.last.get("step", 0))]
        then = f"Train twice as long{_left_out(run)}"
        return then, _resumed(run, "steps", "epochs", more=longer)
    step, weights = best.best
    if weights != LIVE:
        words = ["ema", str(run.folder), "ema", "--sigma-rel", weights.split()[-1]]
        return "Write the best weights", _command(*words, "--step", str(step))
    source = str(checkpoint_at(run.folder, step)) if step else str(run.folder)
    words = ["export", source, "model.safetensors", "--format", "single-file"]
    return "Write the best checkpoint for ComfyUI, A1111 and Forge", _command(*words)


def _meanwhile(run: History, saved: Sequence[int]) -> tuple[str, str]:
    """What to do with a run that trains: look at what it saved, or stop it."""
    if not saved:
        return f"If you stop it with Ctrl-C, which saves, resume{_left_out(run)}", _resumed(run)
    words = ["sample", str(run.folder), "--prompts", "prompts.txt"]
    newest = f"its newest checkpoint, of step {saved[-1]:,}"
    return f"Sample prompts of your own from {newest}", _command(*words)


def _lower(run: History, *factors: float) -> tuple[str, str]:
    rates = ",".join(f"{run.config['lr'] * factor:.2g}" for factor in factors)
    words = ["sweep", *_options(run, "lr", "stop_after"), "--lr", rates]
    return f"Try lower learning rates{_left_out(run)}", _command(*words)


def _resumed(run: History, *dropped: str, more: Sequence[str] = ()) -> str:
    return _command(*_options(run, *dropped), "--out", str(run.folder), *more)


def _options(run: History, *dropped: str) -> list[str]:
    """The options of the run's command, without the command's name."""
    words = dropwhile(lambda word: not word.startswith("-"), run.record.command)
    return without(list(words), "out", "on_event", *dropped)


def _left_out(run: History) -> str:
    told = any(field_of(word) == "on_event" for word in run.record.command)
    return " (its --on-event is left out)" if told else ""


def _command(*words: str) -> str:
    return shlex.join(["xlsd-train", *words])
