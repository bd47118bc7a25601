"""The prediction type of a model, from a scheduler's config or by the conventions of single files.

A single file has no scheduler. Its prediction type is in the first of these that has one:

  NAME.yaml next to it       model.params.parameterization, which A1111 and Forge read
  its keys v_pred and ztsnr  empty tensors, which Forge, ComfyUI (for SDXL) and others read
  its header                 our configs; modelspec.prediction_type; sd-scripts'
                             ss_v_parameterization and ss_zero_terminal_snr
  scheduler/ next to it      as in a pipeline's folder
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

V_PRED, ZTSNR = "v_pred", "ztsnr"  # keys of empty tensors
# The keys of a scheduler's config that depend on the objective; the others are the noise schedule.
_OBJECTIVE = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "use_flow_sigmas")
_ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_TYPES = {  # a spelling, in lower case and with underscores -> diffusers' prediction_type
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
_NEARLY_ZERO = 1e-6  # final alpha bar: lower with zero terminal SNR; SD1.5's own is 0.0047


@dataclass(frozen=True)
class Declared:
    """What one place declares; None for what it does not say."""

    where: str
    prediction: str | None  # diffusers' prediction_type
    zero_snr: bool | None = None


def prediction_type(scheduler_config: Mapping[str, Any]) -> str:
    """Diffusers' prediction_type of a scheduler's config, or flow_prediction."""
    if str(scheduler_config.get("_class_name", "")).startswith("FlowMatch"):
        return "flow_prediction"
    return str(scheduler_config.get("prediction_type", "epsilon"))


def known_scheduler(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config. Raises UserError for a class or a value that no SD1.5-like model has."""
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
        raise UserError(f"{where} has an unsupported noise schedule: {why}; use SD1.5's scheduler")
    return config


def has_zero_snr(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether the noise schedule ends at zero terminal SNR, in pure noise (arXiv 2305.08891)."""
    return bool(scheduler_config.get("rescale_betas_zero_snr"))


def scheduler_for(kind: Kind, scheduler_config: dict[str, Any]) -> dict[str, Any]:
    """The model's scheduler config, changed to a new prediction type and how to sample it.

    v: zero terminal SNR and trailing timesteps, following arXiv 2305.08891, sections 3.1 to 3.3.
    flow: diffusers' DPM-Solver with sigma = t / T, which StableDiffusionPipeline can drive;
    FlowMatchEulerDiscreteScheduler lacks methods that this pipeline calls.
    Raises UserError for a flow model's scheduler, which has no betas to train eps or v on.
    """
    current = prediction_type(scheduler_config)
    if kind == "eps" and current == "epsilon":
        return scheduler_config
    if kind != "flow" and current == "flow_prediction" and "beta_start" not in scheduler_config:
        raise UserError(
            f"--objective {kind} needs a noise schedule, and the model's "
            f"{scheduler_config['_class_name']} has none; use --objective flow"
        )
    kept = {key: value for key, value in scheduler_config.items() if key not in _OBJECTIVE}
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
    nearby: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """A single file's scheduler config, from all that declares it; None if nothing does.

    `own` is the one in its header, `nearby` that of its folder. Warns if two places disagree.
    """
    declared = [*_by_yaml(path.with_suffix(".yaml")), *_by_keys(tensors)]
    if own:
        declared.append(Declared("its own scheduler", prediction_type(own), has_zero_snr(own)))
    declared += _by_header(path, header)
    if nearby:
        kind, zero = prediction_type(nearby), has_zero_snr(nearby)
        declared.append(Declared("scheduler/ next to it", kind, zero))
    base = own or nearby
    if not declared:
        return base
    prediction = _first(path, "prediction type", [(it.where, it.prediction) for it in declared])
    agreeing = [it for it in declared if it.prediction in (None, prediction)]
    zero_snr = _first(path, "zero terminal SNR", [(it.where, it.zero_snr) for it in agreeing])
    if zero_snr is None:
        zero_snr = _ends_in_noise(tensors)
    return _scheduler(str(prediction or "epsilon"), bool(zero_snr), base or sd15.SCHEDULER)


def _scheduler(prediction: str, zero_snr: bool, base: dict[str, Any]) -> dict[str, Any]:
    """A config with both; `base` itself if it has them already."""
    if prediction == prediction_type(base) and (
        prediction == "flow_prediction" or zero_snr == has_zero_snr(base)
    ):
        return base
    if prediction == "flow_prediction":
        return scheduler_for("flow", base)
    if prediction_type(base) == "flow_prediction" and "beta_start" not in base:
        base = sd15.SCHEDULER
    kept = {key: value for key, value in base.items() if key not in _OBJECTIVE}
    kept["prediction_type"] = prediction
    if zero_snr:  # SD1.5's own scheduler, PNDM, does not support it
        kept |= {"_class_name": "DPMSolverMultistepScheduler", **_ZERO}
    return kept


def _first(path: Path, what: str, values: list[tuple[str, Any]]) -> Any:
    """The first place's value that is not None; warns if another place disagrees."""
    known = [(where, value) for where, value in values if value is not None]
    for where, value in known[1:]:
        if value != known[0][1]:
            sidecar = path.with_suffix(".yaml").name
            remedy = f"; to override, put {sidecar} next to it with model.params.parameterization"
            log.warning(
                f"{path}: two places disagree on its {what}: {known[0][0]} says {known[0][1]} and "
                f"{where} {value}: using the first" + remedy * (known[0][0] != sidecar)
            )
            break
    return known[0][1] if known else None


def _by_keys(tensors: Mapping[str, LazyTensor]) -> Iterator[Declared]:
    """By two keys: ztsnr alone leaves the prediction type open."""
    zero = True if ZTSNR in tensors else None
    if V_PRED in tensors:
        yield Declared(f"its key {V_PRED}", "v_prediction", zero)
    elif zero:
        yield Declared(f"its key {ZTSNR}", None, zero)


def _by_header(path: Path, header: Mapping[str, str]) -> Iterator[Declared]:
    name = "modelspec.prediction_type"
    if name in header:
        yield Declared(name, _type_of(path, name, header[name]))
    names = ("ss_v_parameterization", "ss_zero_terminal_snr")
    v, zero = (_boolean(header.get(name)) for name in names)
    if v is not None:
        yield Declared(names[0], "v_prediction" if v else "epsilon")
    if zero is not None:
        yield Declared(names[1], None, zero)


def _by_yaml(path: Path) -> Iterator[Declared]:
    """LDM's config, or sgm's denoiser scaling. Raises UserError for invalid YAML."""
    if not path.is_file():
        return
    try:
        config = _yaml(read_text(path, "the configuration"))
    except (ValueError, yaml.YAMLError) as error:
        why = one_line(error)
        raise UserError(
            f"cannot read {path}, which gives the prediction type of the model next to it: {why}; "
            f"correct or remove it"
        ) from error
    params = _get(config, "model", "params")
    scaling = _get(params, "denoiser_config", "params", "scaling_config", "target")
    spelling = _get(params, "parameterization")
    if spelling is None and isinstance(scaling, str):
        spelling = scaling.rpartition(".")[2].removesuffix("Scaling")
    if spelling is not None and (kind := _type_of(path, path.name, str(spelling))):
        yield Declared(path.name, kind)


def _yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError for text that is too long or nested too deep.

    Aliases are expanded to references, so they take no memory.
    """
    if len(text) > _MOST_YAML:
        raise ValueError(f"it is longer than {_MOST_YAML >> 10} KiB")
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (TypeError, AttributeError, OverflowError) as error:  # invalid keys and dates
        raise ValueError(str(error)) from None


def _get(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _type_of(path: Path, where: str, spelling: str) -> str | None:
    """Diffusers' prediction_type for a spelling; warns of an unknown one and gives None."""
    name = spelling.strip().lower().replace("-", "_").replace(" ", "_")
    if name and name not in _TYPES:
        log.warning(f"{path}: ignoring the unknown prediction type {spelling!r} in {where}")
    return _TYPES.get(name)


def _boolean(spelling: str | None) -> bool | None:
    """A boolean in a header; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(spelling).strip().lower())


def _ends_in_noise(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the noise schedule stored in a file ends at zero SNR."""
    alpha_bar = tensors.get("alphas_cumprod")
    return alpha_bar is not None and bool(alpha_bar.read().flatten()[-1] < _NEARLY_ZERO)
