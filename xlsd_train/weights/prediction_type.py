"""What a model predicts: as a scheduler's config says it, and as files do, by several conventions.

A single file has no scheduler. What it predicts is said, where it is said at all, by

  NAME.yaml beside it        model.params.parameterization, which A1111 and Forge read
  its keys v_pred and ztsnr  empty tensors, which Forge, ComfyUI (for SDXL) and others read
  its header                 our configs; modelspec.prediction_type; sd-scripts'
                             ss_v_parameterization and ss_zero_terminal_snr
  scheduler/ beside it       as in a pipeline's folder

and of that order the first one counts.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from xlsd_cache.errors import UserError, one_line
from xlsd_cache.files.text import read_text
from xlsd_train.config import sd15
from xlsd_train.config.optimization import Kind
from xlsd_train.runs.json_files import misfit
from xlsd_train.weights.lazy_tensors import LazyTensor

log = logging.getLogger("xlsd.train.weights")

V_PRED, ZTSNR = "v_pred", "ztsnr"  # names of empty tensors
# What a scheduler's config says of the objective; all else in it is the noise schedule's.
_OURS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "use_flow_sigmas")
_ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_WORDS = {  # as it is written somewhere, in lower case and with underscores -> diffusers' word
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v_prediction", "v", "v_pred", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("flow_prediction", "flow", "rectified_flow"), "flow_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_SCHEDULERS = frozenset(  # diffusers' names
    "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep "
    "DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EDMDPMSolverMultistep EDMEuler "
    "EulerAncestralDiscrete EulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete "
    "FlowMatchLCM HeunDiscrete IPNDM KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM "
    "SASolver TCD UniPCMultistep".split()
)
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
_MOST_YAML = 2**18  # characters; LDM's configs have some 2000
_MOST_TIMESTEPS = 100_000
_NUMBER, _TRUTH = (None, float), (None, bool)
_SCHEDULER = {
    "_class_name": str, "num_train_timesteps": int, "beta_start": float, "beta_end": float,
    "beta_schedule": str, "trained_betas": (None, [float]), "prediction_type": str,
    "rescale_betas_zero_snr": _TRUTH, "steps_offset": int, "set_alpha_to_one": _TRUTH,
    "use_flow_sigmas": _TRUTH, "flow_shift": _NUMBER, "shift": _NUMBER, "timestep_spacing": str,
}  # fmt: skip
_NEARLY_ZERO = 1e-6  # abar of a schedule's end: of zero terminal SNR less, of SD1.5's own 0.0047


@dataclass(frozen=True)
class Declared:
    """What one place says."""

    where: str
    kind: str | None  # diffusers' word
    zero_snr: bool | None = None


def prediction_type(scheduler_config: Mapping[str, Any]) -> str:
    """As the scheduler's config says, in diffusers' words."""
    if str(scheduler_config.get("_class_name", "")).startswith("FlowMatch"):
        return "flow_prediction"
    return str(scheduler_config.get("prediction_type", "epsilon"))


def known_scheduler(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config. Raises UserError for a class or a value that no model of SD1.5's kind has."""
    name = str(config.get("_class_name", "PNDMScheduler"))
    why = misfit(config, _SCHEDULER)
    if name.removesuffix("Scheduler") not in _SCHEDULERS:
        why = f"its class is {name}"
    steps, schedule = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if not why and not 1 <= steps <= _MOST_TIMESTEPS:
        why = f"num_train_timesteps is {steps}"
    if not why and schedule not in _BETAS:
        why = f"beta_schedule is {schedule}"
    if why:
        raise UserError(
            f"{where} says of no noise schedule known here: {why}; give an SD1.5's scheduler"
        )
    return config


def has_zero_snr(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether its noise schedule ends in noise alone (arXiv 2305.08891)."""
    return bool(scheduler_config.get("rescale_betas_zero_snr"))


def scheduler_for(kind: Kind, scheduler_config: dict[str, Any]) -> dict[str, Any]:
    """The model's scheduler config, made to say what it will predict and how to sample it.

    v: zero terminal SNR and trailing timesteps, as arXiv 2305.08891, sections 3.1 to 3.3, wants.
    flow: diffusers' DPM-Solver with sigma = t / T, which StableDiffusionPipeline can drive;
    FlowMatchEulerDiscreteScheduler lacks what that pipeline asks of a scheduler.
    Raises UserError for a flow model's scheduler, which has no betas to train eps or v on.
    """
    said = prediction_type(scheduler_config)
    if kind == "eps" and said == "epsilon":
        return scheduler_config
    if kind != "flow" and said == "flow_prediction" and "beta_start" not in scheduler_config:
        raise UserError(
            f"--objective {kind} needs a noise schedule, and the model's "
            f"{scheduler_config['_class_name']} has none; take --objective flow"
        )
    kept = {key: value for key, value in scheduler_config.items() if key not in _OURS}
    if kind == "eps":
        return {**kept, "prediction_type": "epsilon"}
    kept["_class_name"] = "DPMSolverMultistepScheduler"
    if kind == "v":
        return {**kept, "prediction_type": "v_prediction", **_ZERO}
    shift = kept.pop("shift", kept.pop("flow_shift", 1.0))
    kept |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return {**kept, "flow_shift": shift}


def file_scheduler(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    header: Mapping[str, str],
    own: dict[str, Any] | None,
    beside: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The scheduler's config of a single file, from all that it says; None where nothing does.

    `own` is the one in its header, `beside` that of the folder in which it lies. Warns where two
    places disagree.
    """
    said = [*_by_yaml(path.with_suffix(".yaml")), *_by_keys(tensors)]
    said += [Declared("its own scheduler", prediction_type(own), has_zero_snr(own))] if own else []
    said += _by_header(path, header)
    if beside:
        said.append(Declared("scheduler/ beside it", prediction_type(beside), has_zero_snr(beside)))
    found = own or beside
    if not said:
        return found
    kind = _first(path, "prediction type", [(it.where, it.kind) for it in said])
    agree = [it for it in said if it.kind in (None, kind)]
    zero = _first(path, "zero terminal SNR", [(it.where, it.zero_snr) for it in agree])
    if zero is None:
        zero = _ends_in_noise(tensors)
    return _scheduler(str(kind or "epsilon"), bool(zero), found or sd15.SCHEDULER)


def _scheduler(kind: str, zero: bool, found: dict[str, Any]) -> dict[str, Any]:
    """A config that says both, as the found one where that does already."""
    if kind == prediction_type(found) and (
        kind == "flow_prediction" or zero == has_zero_snr(found)
    ):
        return found
    if kind == "flow_prediction":
        return scheduler_for("flow", found)
    if prediction_type(found) == "flow_prediction" and "beta_start" not in found:
        found = sd15.SCHEDULER
    kept = {key: value for key, value in found.items() if key not in _OURS}
    kept["prediction_type"] = kind
    if zero:  # SD1.5's own scheduler, PNDM, does not know it
        kept |= {"_class_name": "DPMSolverMultistepScheduler", **_ZERO}
    return kept


def _first(path: Path, what: str, told: list[tuple[str, Any]]) -> Any:
    """What the first place says that says anything; warns where another one disagrees."""
    known = [(where, value) for where, value in told if value is not None]
    for where, value in known[1:]:
        if value != known[0][1]:
            beside = path.with_suffix(".yaml").name
            remedy = f"; a {beside} beside it, with model.params.parameterization, would decide it"
            log.warning(
                f"{path}: two places disagree on its {what}: {known[0][0]} says {known[0][1]} and "
                f"{where} {value}: the first is taken" + remedy * (known[0][0] != beside)
            )
            break
    return known[0][1] if known else None


def _by_keys(tensors: Mapping[str, LazyTensor]) -> Iterator[Declared]:
    """Of the second alone the type is not known; where neither is, nothing is said."""
    zero = True if ZTSNR in tensors else None
    if V_PRED in tensors:
        yield Declared(f"its key {V_PRED}", "v_prediction", zero)
    elif zero:
        yield Declared(f"its key {ZTSNR}", None, zero)


def _by_header(path: Path, header: Mapping[str, str]) -> Iterator[Declared]:
    name = "modelspec.prediction_type"
    if name in header:
        yield Declared(name, _word(path, name, header[name]))
    told = {
        name: _truth(header.get(name)) for name in ("ss_v_parameterization", "ss_zero_terminal_snr")
    }
    v, zero = told.values()
    if v is not None:
        yield Declared("ss_v_parameterization", "v_prediction" if v else "epsilon")
    if zero is not None:
        yield Declared("ss_zero_terminal_snr", None, zero)


def _by_yaml(path: Path) -> Iterator[Declared]:
    """LDM's config; or sgm's, where a denoiser's scaling says it. Raises UserError for no YAML."""
    if not path.is_file():
        return
    try:
        told = _yaml(read_text(path, "the configuration"))
    except (ValueError, yaml.YAMLError) as error:
        problem = one_line(error)
        raise UserError(
            f"cannot read {path}, which says what the model beside it predicts: {problem}; mend or "
            f"remove it"
        ) from error
    params = _at(told, "model", "params")
    scaling = _at(params, "denoiser_config", "params", "scaling_config", "target")
    word = _at(params, "parameterization")
    if word is None and isinstance(scaling, str):
        word = scaling.rpartition(".")[2].removesuffix("Scaling")
    if word is not None and (kind := _word(path, path.name, str(word))):
        yield Declared(path.name, kind)


def _yaml(text: str) -> Any:
    """The value of a text. Raises ValueError for one that is too long or too deep to be parsed.

    What its aliases stand for is in memory once, however often they say it.
    """
    if len(text) > _MOST_YAML:
        raise ValueError(f"it is longer than {_MOST_YAML >> 10} KiB")
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (TypeError, AttributeError, OverflowError) as error:  # keys and dates that are none
        raise ValueError(str(error)) from None


def _at(told: Any, *names: str) -> Any:
    for name in names:
        told = told.get(name) if isinstance(told, dict) else None
    return told


def _word(path: Path, where: str, given: str) -> str | None:
    """Diffusers' word; warns of one that is unknown, and goes on without."""
    word = given.strip().lower().replace("-", "_").replace(" ", "_")
    if word and word not in _WORDS:
        log.warning(
            f"{path}: {where} says that it predicts {given!r}, which is unknown and left aside"
        )
    return _WORDS.get(word)


def _truth(given: str | None) -> bool | None:
    """Python's words in a header; None where it says neither."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(given).strip().lower())


def _ends_in_noise(tensors: Mapping[str, LazyTensor]) -> bool:
    """By the noise schedule that a file holds."""
    held = tensors.get("alphas_cumprod")
    return held is not None and bool(held.read().flatten()[-1] < _NEARLY_ZERO)
