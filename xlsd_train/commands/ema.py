"""`xlsd-train ema`: reconstructs an EMA of any length after training (post-hoc EMA).

Karras et al. 2024 (arXiv 2312.02696), section 3.2: fit the wanted profile by the snapshots'
profiles, by least squares, then sum the snapshots' weights with the same coefficients.
"""

import logging
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.finite import bad_values, is_finite, not_finite
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import link_or_copy, replacing_folder, write_json
from xlsd_train.config.run_options import EmaConfig
from xlsd_train.optim.ema import SIGMAS, snapshots
from xlsd_train.optim.ema_profiles import Profile, coefficients, gamma_of
from xlsd_train.runs.layout import BASE, SNAPSHOTS, STATE, checkpoint_at, checkpoints
from xlsd_train.runs.links import refuse_links
from xlsd_train.runs.record import unreadable
from xlsd_train.weights.lazy_tensors import check_length, read_tensors
from xlsd_train.weights.network import PREFIX
from xlsd_train.weights.parts import TEXT_ENCODER, UNET

log = logging.getLogger("xlsd.train.commands")


def reconstruct(config: EmaConfig) -> None:
    """Write the average to `config.out`, a folder that --model accepts.

    Raises UserError if the run has no snapshots or the folder exists.
    """
    run, out = config.run, config.out
    refuse_links(run)
    paths = snapshots(run)
    if not paths or not checkpoints(run):
        raise UserError(f"{run} has no EMA snapshots; train it with --ema")
    newest = max(paths)
    step = newest if config.step is None else config.step
    if not 0 < step <= newest:
        raise UserError(
            f"--step {step} is not from 1 to {newest}, the newest snapshot of {run}; give another"
        )
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; give a new folder")
    wanted = Profile(gamma_of(config.sigma_rel), step)
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in paths.values()]
        profiles = [
            Profile(gamma_of(float(sigma)), int(file.metadata()["step"]))
            for file in files
            for sigma in SIGMAS
        ]
        counts, error = coefficients(profiles, wanted)
        log.info(
            f"sigma_rel {config.sigma_rel:g} (gamma {wanted.gamma:.4g}) at step {step}, from "
            f"{len(files)} snapshots of {run}: error of the fitted profile {error:.1%}"
        )
        terms = [(file, sigma) for file in files for sigma in SIGMAS]
        keys = _names(run, files)
        names = [name.partition("/")[2] for name in keys if name.startswith(SIGMAS[0])]
        averaged = {
            name: _sum(run, terms, counts.tolist(), name)
            for name in progress_bar(names, unit="tensor", disable=None)
        }
    origin = {"run": str(run), "sigma_rel": config.sigma_rel, "gamma": wanted.gamma, "error": error}
    _write(run, out, step, averaged, origin)
    log.info(f"wrote {out}; use it as --model")


def _names(run: Path, files: list[Any]) -> list[str]:
    """Names of the snapshots' tensors. Raises UserError if the snapshots differ in them."""
    shapes = [{name: file.get_slice(name).get_shape() for name in file.keys()} for file in files]  # noqa: SIM118
    if not all(each == shapes[0] for each in shapes):
        raise UserError(f"the snapshots in {run / 'ema'} are of different models; train again")
    return list(shapes[0])


def _sum(run: Path, terms: list[tuple[Any, str]], counts: list[float], name: str) -> Tensor:
    """One averaged tensor, f32, summed in f64: coefficients of both signs nearly cancel."""
    total: Tensor | None = None
    for (file, sigma), times in zip(terms, counts, strict=True):
        value = file.get_tensor(f"{sigma}/{name}").double() * times
        total = value if total is None else total.add_(value)
    assert total is not None
    if not is_finite(average := total.float()):
        raise _not_finite(run, terms, name)
    return average


def _not_finite(run: Path, terms: list[tuple[Any, str]], name: str) -> UserError:
    """The error with the first snapshot that has nan or infinite values."""
    for file, sigma in terms:
        if not is_finite(value := file.get_tensor(f"{sigma}/{name}")):
            step = int(file.metadata()["step"])
            path = snapshots(run).get(step, run / SNAPSHOTS)
            return UserError(
                f"{path}: {sigma}/{name} has {bad_values(value)} that are nan or infinite; remove "
                f"this snapshot and the later ones"
            )
    return UserError(f"the average of {name} overflows fp32; give another --sigma-rel")


def _opened(path: Path) -> Any:
    try:
        check_length(path)
        file: Any = safe_open(path, "pt")
        step = (file.metadata() or {}).get("step", "")
        if not re.fullmatch("[0-9]{1,8}", step):
            raise ValueError(f"its step is {step!r}")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the snapshot {path}: {error}; remove it") from error
    return file


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _write(
    run: Path, out: Path, step: int, averaged: dict[str, Tensor], origin: dict[str, Any]
) -> None:
    """Write a run's folder with one checkpoint; its base is hard-linked if possible."""
    newest = checkpoints(run)[-1]
    with replacing_folder(out) as temporary:
        checkpoint = checkpoint_at(temporary, step)
        checkpoint.mkdir(parents=True)
        shutil.copytree(run / BASE, temporary / BASE, copy_function=link_or_copy)
        for file, part, prefix in (
            (UNET, "unet", ""),
            (TEXT_ENCODER, "text_encoder", PREFIX),
        ):
            state = _read(newest / file)
            for name in state:
                state[name] = averaged.get(f"{part}.{name.removeprefix(prefix)}", state[name])
            if bad := not_finite(state):
                raise UserError(
                    f"{newest / file}: {bad[0]} has {bad_values(state[bad[0]])} that are nan or "
                    f"infinite; remove {newest}"
                )
            save_file(state, checkpoint / file, {"format": "pt"})
        write_json(checkpoint / STATE, {"step": step, "ema": origin})
