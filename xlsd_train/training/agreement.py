"""Refuse a run whose processes would not do the same, as on machines with files of their own."""

from collections.abc import Mapping
from hashlib import sha256

from xlsd_train.checkpoints.environment import NUMERIC
from xlsd_train.checkpoints.resume import PLACES
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.step.distributed import Processes
from xlsd_train.training.setup_data import RunData

# What may differ: where files are, and what only a machine's own speed and terminal depend on.
# Of the files the contents are compared.
_OWN = {
    *PLACES, "out", "data", "sample_prompts", "recipe", "vram", "threads", "quiet", "json",
    "on_event",
}  # fmt: skip


def agree_on_command(config: TrainConfig, run: RunFolder, processes: Processes) -> None:
    """Raise UserError where a process has other options, or resumes from another step."""
    options = {f"--{name.replace('_', '-')}": x for name, x in config.to_json().items()
               if name not in _OWN}  # fmt: skip
    processes.agree(options, "use the same command on all machines")
    step = f"at step {run.state()['step']}" if run.before else "not started"
    how = "put --out on a disk that all machines share, or copy the run's folder to each of them"
    processes.agree({str(run.folder): step}, how)


def agree_on_inputs(data: RunData, weights: Mapping[str, str], processes: Processes) -> None:
    """Raise UserError where a process has other stores, prompts, weights or libraries.

    `weights` are the SHA-256 of each network.
    """
    settings = data.settings
    copied = "give all machines whole copies of the same store, or let it grow and start again"
    processes.agree({"stores of fingerprint": settings["stores"]}, copied)
    prompts = {"sample prompts of sha256": sha256(repr(data.pictures).encode()).hexdigest()[:16]}
    processes.agree(prompts, "copy --sample-prompts to all machines")
    networks = {f"a {name} of sha256": digest[:16] for name, digest in weights.items()}
    processes.agree(networks, "use the same --model on all machines")
    versions = {f"{name} version": settings[f"{name} version"] for name in NUMERIC}
    processes.agree(versions, "install the same versions on all machines")
