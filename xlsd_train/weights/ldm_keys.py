"""State dict keys: from diffusers' folders to latent-diffusion's (LDM's) single files. Pure.

LDM numbers the UNet's blocks consecutively (openaimodel.py of CompVis/latent-diffusion): a block of
diffusers with L layers is L + 1 of LDM's, the last of which downsamples; on the way up the last
also upsamples. So keys follow from the number of layers, and none are listed.
"""

import re

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODER = "cond_stage_model.transformer."
EMA = "model_ema."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OLD_VAE_ATTENTION = {  # diffusers before 0.18, and SD1.5's folder still
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_BLOCK = re.compile(
    r"(?:(encoder|decoder)\.)?(down|mid|up)_blocks?\.(?:(\d+)\.)?"
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_name(name: str, layers: int, attended: list[bool]) -> str:
    """LDM's key, without its prefix, of a weight of the UNet.

    `layers` is layers_per_block; `attended` says which up blocks have attention, first to last.
    Raises KeyError for a key that SD1.5's UNet does not have.
    """
    ends = [(ours, theirs) for ours, theirs in _UNET_ENDS.items() if name.startswith(f"{ours}.")]
    if ends:
        ours, theirs = ends[0]
        return theirs + name.removeprefix(ours)
    side, block, kind, number, rest = _block(name)
    if kind == "resnets":
        layer, _, end = rest.rpartition(".")
        rest = f"{_UNET_RESNET[layer]}.{end}"
    if side == "mid":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    last = kind in ("downsamplers", "upsamplers")
    index = block * (layers + 1) + (layers if last else number)
    if side == "down":
        module = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        return f"input_blocks.{index + 1}.{module}.{rest.removeprefix('conv.') if last else rest}"
    upsampler = "2" if attended[block] else "1"
    module = {"resnets": "0", "attentions": "1", "upsamplers": upsampler}[kind]
    return f"output_blocks.{index}.{module}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """LDM's key, without its prefix, of a weight of a VAE with `blocks` blocks in each half.

    Raises KeyError for a key that SD1.5's VAE does not have.
    """
    if "_block" not in name:
        return name.replace("conv_norm_out", "norm_out")
    side, block, kind, number, rest = _block(name)
    coder = name.partition(".")[0]
    if kind == "attentions":
        layer, _, end = rest.rpartition(".")
        return f"{coder}.mid.attn_1.{_VAE_ATTENTION[layer]}.{end}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if side == "mid":
        return f"{coder}.mid.block_{number + 1}.{rest}"
    if side == "up":  # LDM counts from the image's end
        block = blocks - 1 - block
    module = {"resnets": f"block.{number}", "downsamplers": "downsample", "upsamplers": "upsample"}
    return f"{coder}.{side}.{block}.{module[kind]}.{rest}"


def is_vae_conv(name: str) -> bool:
    """Whether this weight of diffusers' VAE, [n, m], is a 1x1 convolution [n, m, 1, 1] in LDM."""
    return ".attentions." in name and name.endswith(".weight") and "group_norm" not in name


def modern_vae_name(name: str) -> str:
    """Today's key in diffusers of a weight of the VAE; older folders have four other names."""
    layer, _, end = name.rpartition(".")
    head, _, last = layer.rpartition(".")
    if ".attentions." in name and last in _OLD_VAE_ATTENTION:
        return f"{head}.{_OLD_VAE_ATTENTION[last]}.{end}"
    return name


def ema_name(name: str) -> str:
    """The key of a UNet weight's moving average, from its LDM key without prefix (LDM's ema.py)."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


def _block(name: str) -> tuple[str, int, str, int, str]:
    """(down, mid or up; block; kind; number; the rest) of the key of a weight in a block."""
    match = _BLOCK.fullmatch(name)
    if not match:
        raise KeyError(name)
    _, side, block, kind, number, rest = match.groups()
    return side, int(block or 0), kind, int(number), rest
