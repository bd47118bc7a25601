"""Identify a file of weights that is not a whole SD1.5, by its tensors' names and shapes. Pure."""

from collections.abc import Iterable, Mapping

from xlsd_train.weights.lazy_tensors import LazyTensor

# The first entry of which any tensor name contains a mark; rarer kinds are tested first.
_BY_NAME = (
    (("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "hada_w1"), "a LoRA"),
    (("emb_params", "string_to_param"), "a textual inversion"),
    (("/exp_avg",), "an optimizer's state"),
    (("control_model.", "controlnet_cond_embedding", "input_hint_block"), "a ControlNet"),
    (("motion_modules.",), "an AnimateDiff motion module"),
    (("double_blocks.",), "a model of Flux's kind"),
    (("joint_blocks.",), "an SD3"),
    (("conditioner.embedders.0.model.",), "SDXL's refiner"),
    (("conditioner.embedders.",), "an SDXL"),
    (("add_embedding.", "label_emb."), "SDXL's UNet"),
    (("cond_stage_model.model.",), "an SD2"),
)
UNET_ALONE, VAE_ALONE = "a UNet alone", "a VAE alone"
TEXT_ENCODER_ALONE = "a text encoder alone"
_BY_PREFIX = (
    (("model.diffusion_model.", "down_blocks.0.", "input_blocks.0."), UNET_ALONE),
    (("first_stage_model.", "quant_conv.", "decoder.conv_in."), VAE_ALONE),
    (("text_model.", "cond_stage_model.", "encoder.layers.0."), TEXT_ENCODER_ALONE),
)
_INPUTS = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight")
_CONTEXT = "attn2.to_k.weight"


def identify(tensors: Mapping[str, LazyTensor]) -> str | None:
    """What these tensors are, e.g. `a LoRA`, if not a whole SD1.5; None if unknown."""
    for marks, kind in _BY_NAME:
        if _any(tensors, marks):
            return kind
    inputs = {tensors[name].shape[1] for name in _INPUTS if name in tensors}
    if inputs - {4}:
        channels = inputs.pop()
        return {9: "an inpainting model", 8: "an InstructPix2Pix"}.get(
            channels, f"a UNet of {channels} channels"
        )
    contexts = {it.shape[-1] for name, it in tensors.items() if name.endswith(_CONTEXT)}
    if 1024 in contexts:
        return "an SD2"
    if 2048 in contexts:
        return "SDXL's UNet"
    alone = [kind for marks, kind in _BY_PREFIX if any(name.startswith(marks) for name in tensors)]
    return alone[0] if len(alone) == 1 else None


def _any(names: Iterable[str], marks: tuple[str, ...]) -> bool:
    return any(mark in name for name in names for mark in marks)


def remedy(kind: str | None) -> str:
    """What to do with a file of this kind."""
    flags = {UNET_ALONE: "--unet", TEXT_ENCODER_ALONE: "--text-encoder", VAE_ALONE: "--vae"}
    if kind in flags:
        return f"; pass it as {flags[kind]} together with a whole model"
    return "; give a whole SD1.5"
