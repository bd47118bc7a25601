"""Build the model of a run: its weights, what trains, and the objective."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import CLIPTokenizer

from xlsd_cache.encoding.hub import repository_of
from xlsd_cache.errors import UserError
from xlsd_train.checkpoints.resume import PLACES, START, changes, other_start
from xlsd_train.checkpoints.run_folder import RunFolder
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.mixture import Mixture
from xlsd_train.model.bundle import ModelBundle
from xlsd_train.model.latent_scaling import scaling_by_statistics
from xlsd_train.model.loading import load_bundle
from xlsd_train.runs.layout import BASE
from xlsd_train.step.objective import Objective, make_objective

log = logging.getLogger("xlsd.train.training")


@dataclass(frozen=True)
class RunModel:
    """A model whose networks are on the CPU, and what it is trained to predict."""

    bundle: ModelBundle  # with the objective's scheduler config
    named: dict[str, Parameter]  # what trains
    objective: Objective  # on the CPU
    scheduler_before: dict[str, Any]  # the scheduler config that the model came with


def build_model(config: TrainConfig, run: RunFolder, store: Mixture) -> RunModel:
    """Load the model, freeze what does not train, and reinitialise what --reinit says.

    Raises UserError for a resume that asks for other weights than the checkpoint's.
    """
    check_start(config, run, store)
    bundle = open_model(config, run.checkpoint, store)
    before = bundle.scheduler_config
    objective = make_objective(
        config.objective, config.loss_weight, config.min_snr_gamma or 0, before
    )
    bundle.scheduler_config = objective.scheduler_config
    named = bundle.prepare(config.phase, config.train)
    if config.reinit is not None and not run.checkpoint:
        bundle.reinitialise(named, config.phase, config.reinit, config.seed)
    return RunModel(bundle, named, objective, before)


def open_model(config: TrainConfig, resumed: Path | None, store: Mixture) -> ModelBundle:
    """The checkpoint's model, or that of --model and its options; all of it trainable."""
    roots = [part.store.root for part in store.parts]
    if resumed:
        model = load_bundle(str(resumed), None, store.identity, roots=roots)
    else:
        model = load_bundle(
            config.model,
            config.vae,
            store.identity,
            unet=config.unet,
            text_encoder=config.text_encoder,
            tokenizer=config.tokenizer,
            ema=config.model_ema,
            tokens=config.tokens,
            roots=roots,
        )
    model.clip_skip = config.clip_skip
    if config.normalize_latents and not model.scaling.normalized:
        model.scaling = scaling_by_statistics(store)
    return model


def check_start(config: TrainConfig, run: RunFolder, store: Mixture) -> None:
    """Refuse a resume whose options ask for other weights to start from than the run's.

    A model at another place is compared by its weights. One that no longer exists is not needed.
    """
    if run.before is None or run.checkpoint is None:
        return
    other = other_start(run.before.settings, config)
    if not other:
        return
    asked = {name: getattr(config, name) for name in other}
    new = dict(asked)
    if config.force:
        log.info(
            f"--force: {run.folder} was started with {changes(other, asked)}; resuming from its "
            f"checkpoint"
        )
        return
    for name, value in list(new.items()):
        if name in PLACES and _is_gone(name, value):
            option = f"--{name.replace('_', '-')}"
            log.info(
                f"{option} {value} does not exist and is not needed: the checkpoint has the model"
            )
            new.pop(name)
    if new and not _starts_alike(config, run, store, new):
        raise UserError(
            f"{run.folder} was started with {changes(other, asked)}; leave that out, since "
            f"the checkpoint has the whole model, or use another --out"
        )


def _is_gone(name: str, value: str) -> bool:
    """Whether a value is a path that does not exist, and not a hub id or a known VAE's name."""
    path = Path(value).expanduser()
    vae_name = name == "vae" and path.name == value
    return not vae_name and not path.exists() and repository_of(value) is None


def _starts_alike(
    config: TrainConfig, run: RunFolder, store: Mixture, new: Mapping[str, Any]
) -> bool:
    """Whether the options give the weights and the tokenizer that the run was started with."""
    assert run.before is not None
    assert run.checkpoint is not None
    if not all(Path(value).expanduser().exists() for name, value in new.items() if name in PLACES):
        return False  # do not download for a comparison
    old = run.before.settings
    asked = {name: new.get(name, old.get(name)) for name in START}
    try:
        model = open_model(replace(config, **asked), None, store)
        named = model.prepare(config.phase, config.train)
        if asked["reinit"]:
            model.reinitialise(named, config.phase, asked["reinit"], config.seed)
    except UserError:
        return False
    own = CLIPTokenizer.from_pretrained(
        run.folder / BASE / "tokenizer", local_files_only=True, trust_remote_code=False
    )
    alike: bool = own.get_vocab() == model.tokenizer.get_vocab()
    return alike and model.sha256() == run.before.model["sha256"]
