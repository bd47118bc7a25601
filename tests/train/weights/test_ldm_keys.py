"""Keys of SD1.5's single file, compared with a list written from latent-diffusion's side."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from tests.support.ldm_keys import Shapes, ldm_text_encoder, ldm_unet, ldm_vae, published
from xlsd_train.config import sd15
from xlsd_train.weights import ldm_keys as names

ATTENDED = [False, True, True, True]


def diffusers_shapes(kind: type, config: dict[str, object]) -> Shapes:
    with init_empty_weights():
        module = kind.from_config(config)  # type: ignore[attr-defined]
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_the_expected_list_is_sd15s() -> None:
    assert [len(ldm_unet()), len(ldm_vae()), len(ldm_text_encoder())] == [686, 248, 197]
    assert len(published()) == 686 + 248 + 197 + 12
    weights = sum(torch.Size(shape).numel() for shape in ldm_unet().values())
    assert weights == 859_520_964  # SD1.5's own number


def test_every_unet_weight_has_ldms_name_and_shape() -> None:
    ours = diffusers_shapes(UNet2DConditionModel, sd15.UNET)
    assert {names.unet_name(name, 2, ATTENDED): shape for name, shape in ours.items()} == ldm_unet()


def test_every_vae_weight_has_ldms_name_and_shape() -> None:
    ours = diffusers_shapes(AutoencoderKL, sd15.VAE)
    renamed = {
        names.vae_name(name, 4): (*shape, 1, 1) if names.is_vae_conv(name) else shape
        for name, shape in ours.items()
    }
    assert renamed == ldm_vae()


def test_diffusers_own_conversion_undoes_ours() -> None:
    """Not only the set of names: each goes back to the very weight it came from."""
    unet = diffusers_shapes(UNet2DConditionModel, sd15.UNET)
    marked = {
        names.UNET + names.unet_name(name, 2, ATTENDED): torch.tensor(i)
        for i, name in enumerate(unet)
    }
    back = convert_ldm_unet_checkpoint(marked, {"layers_per_block": 2})
    assert {name: int(value) for name, value in back.items()} == {n: i for i, n in enumerate(unet)}
    vae = diffusers_shapes(AutoencoderKL, sd15.VAE)
    ranks = {name: 4 if names.is_vae_conv(name) else 1 for name in vae}
    tagged = {
        names.VAE + names.vae_name(name, 4): torch.full((1,) * ranks[name], i)
        for i, name in enumerate(vae)
    }
    back = convert_ldm_vae_checkpoint(tagged, sd15.VAE)
    assert {name: int(value) for name, value in back.items()} == {n: i for i, n in enumerate(vae)}


def test_moving_averages_have_names_without_dots() -> None:
    assert names.ema_name("input_blocks.0.0.weight") == (
        "model_ema.diffusion_modelinput_blocks00weight"
    )


def test_older_folders_call_the_vaes_attention_otherwise() -> None:
    new = diffusers_shapes(AutoencoderKL, sd15.VAE)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = list(new)
    for today, before in old.items():
        renamed = [name.replace(today, before) for name in renamed]
    assert len(set(renamed) - set(new)) == 16
    assert [names.modern_vae_name(name) for name in renamed] == list(new)


@pytest.mark.parametrize("name", ["add_embedding.linear_1.weight", "down_blocks.0.motion.0.weight"])
def test_names_that_sd15_has_not_are_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        names.unet_name(name, 2, ATTENDED)
