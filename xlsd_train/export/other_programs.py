"""How to set up other programs for a model, beyond what its files say. Pure.

The sentences are part of exported files: changing one changes the bytes of an export.
"""

from typing import Any

from xlsd_train.weights.prediction_type import has_zero_snr, prediction_type
from xlsd_train.weights.vae_fold import SD15_FACTOR

SDXL_FACTOR = 0.13025
FLOW_DIFFUSERS = "0.32"  # the first whose DPMSolverMultistepScheduler has use_flow_sigmas


def usage_notes(
    name: str, scheduler: dict[str, Any], tokens: int, single: bool, reflect: bool = False
) -> str:
    """Settings that programs need for the model of this name, in one line; "" if none."""
    kind, lines = prediction_type(scheduler), []
    if kind == "v_prediction":
        zero = has_zero_snr(scheduler)
        lines.append(f"{name} predicts v, with{'' if zero else 'out'} zero terminal SNR.")
        node = f"ComfyUI needs the node ModelSamplingDiscrete (v_prediction, zsnr {_on(zero)})"
        if single:
            sidecar = name.removesuffix(".safetensors") + ".yaml"
            lines.append(f"A1111 and Forge read {sidecar}, which belongs next to it; {node}.")
            if zero:
                lines.append("Leave A1111's noise schedule at Default: the file has the right one.")
        else:
            lines.append(f"Diffusers reads that in its scheduler; {node}.")
    elif kind == "flow_prediction":
        shift = float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
        lines.append(
            f"{name} predicts flow: ComfyUI needs the node ModelSamplingSD3 with shift {shift}, "
            f"diffusers must be {FLOW_DIFFUSERS} or newer, and A1111 and Forge know no flow for a "
            f"model of SD1.5's shape."
        )
    elif kind != "epsilon":
        lines.append(f"{name} predicts {kind}, which your program must be told.")
    if single and kind != "epsilon":
        lines.append("For diffusers export the folder, whose scheduler says it.")
    if single and tokens != 77:
        lines.append(
            f"Its text encoder reads {tokens} tokens, and these programs make one of 77 unless an "
            f"extension for LongCLIP is there."
        )
    if reflect:
        lines.append("Its VAE's convolutions must be set to padding_mode reflect.")
    return " ".join(lines)


def vae_notes(trained: float, factor: float, single: bool) -> list[str]:
    """Sentences on the VAE, by the factor that it was trained with and this export's factor."""
    lines = []
    if trained == SDXL_FACTOR:
        lines.append(
            "SDXL's VAE overflows in fp16: where pictures are black or an error speaks of NaN, "
            "start A1111 or Forge with `--no-half-vae`, and decode in fp32 or bf16 elsewhere; "
            "sdxl-vae-fp16-fix, and models trained with it, need neither."
        )
    if single and trained != factor:
        lines.append(
            f"Diffusers' `from_single_file` takes the VAE's factor from its `config`: give it none "
            f"whose vae/config.json says another than {factor:g}, as the diffusers folder of this "
            f"same model does. Load that folder with `from_pretrained` in place of this file."
        )
    if not single and factor != SD15_FACTOR:
        lines.append(
            f"This folder is no `config` for `from_single_file` with a single file of the same "
            f"model, whose VAE is for the factor {SD15_FACTOR:g} and not this one's {factor:g}: "
            f"pictures would be wrong. Load the folder itself."
        )
    return lines


def _on(truth: bool) -> str:
    return "on" if truth else "off"
