from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from xlsd_train.config import sd15
from xlsd_train.export.ldm_config import ldm_config
from xlsd_train.export.other_programs import usage_notes, vae_notes
from xlsd_train.weights.lazy_tensors import LazyTensor
from xlsd_train.weights.network import POSITIONS, Network
from xlsd_train.weights.prediction_type import scheduler_for

V = scheduler_for("v", sd15.SCHEDULER)
PLAIN_V = {**sd15.SCHEDULER, "prediction_type": "v_prediction"}
FLOW = scheduler_for("flow", sd15.SCHEDULER)


def unread() -> torch.Tensor:
    raise AssertionError


def made(scheduler: dict[str, Any], tokens: int = 77) -> str | None:
    encoder = {POSITIONS: LazyTensor((tokens, 768), torch.float32, unread)}
    return ldm_config(
        Network("unet", sd15.UNET, {}, "x"),
        Network("text_encoder", sd15.TEXT_ENCODER, encoder, "x"),
        Network("vae", sd15.VAE, {}, "x"),
        scheduler,
        "v.safetensors",
    )


def test_it_is_sd15_as_ldm_has_it_predicting_v() -> None:
    """The values of v1-inference.yaml in CompVis/stable-diffusion."""
    text = made(V)
    assert text is not None
    model = yaml.safe_load(text)["model"]
    assert model["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
    params = model["params"]
    unet, vae = (params[f"{name}_config"]["params"] for name in ("unet", "first_stage"))
    assert params["parameterization"] == "v"
    assert (params["linear_start"], params["linear_end"]) == (0.00085, 0.012)
    assert (params["timesteps"], params["scale_factor"]) == (1000, 0.18215)
    assert (params["channels"], params["image_size"]) == (4, 64)
    assert params["use_ema"] is False
    assert {name: unet[name] for name in ("model_channels", "attention_resolutions",
            "num_res_blocks", "channel_mult", "num_heads", "context_dim", "legacy")} == {
        "model_channels": 320, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4], "num_heads": 8, "context_dim": 768, "legacy": False,
    }  # fmt: skip
    assert vae["embed_dim"] == 4
    assert {name: vae["ddconfig"][name] for name in ("ch", "ch_mult", "num_res_blocks",
            "z_channels", "attn_resolutions")} == {
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4,
        "attn_resolutions": [],
    }  # fmt: skip
    encoder = params["cond_stage_config"]
    assert encoder == {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def test_a_longer_text_encoder_is_told() -> None:
    text = made(V, 248)
    assert text is not None
    encoder = yaml.safe_load(text)["model"]["params"]["cond_stage_config"]
    assert encoder["params"] == {"max_length": 248}


def test_none_where_ldm_has_no_word_or_needs_none() -> None:
    assert made(FLOW) is None
    assert made(sd15.SCHEDULER) is None


@pytest.mark.parametrize(
    ("scheduler", "single", "there", "absent"),
    [
        (V, True, ("m.yaml", "ModelSamplingDiscrete (v_prediction, zsnr on)", "Default"), ()),
        (PLAIN_V, True, ("without zero terminal SNR", "zsnr off"), ("Default",)),
        (V, False, ("zsnr on",), ("m.yaml",)),
        (FLOW, True, ("ModelSamplingSD3 with shift 1.0", "0.32 or newer"), ("yaml",)),
        ({**FLOW, "flow_shift": 3.0}, False, ("shift 3.0", "0.32 or newer"), ()),
    ],
)
def test_what_programs_need_is_said(
    scheduler: dict[str, Any], single: bool, there: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    told = usage_notes("m.safetensors", scheduler, 77, single)
    assert all(text in told for text in there)
    assert not any(text in told for text in absent)


def test_an_ordinary_model_needs_nothing_else() -> None:
    assert usage_notes("m.safetensors", sd15.SCHEDULER, 77, single=True) == ""
    assert "248 tokens" in usage_notes("m.safetensors", sd15.SCHEDULER, 248, single=True)
    assert "reflect" in usage_notes("m.safetensors", sd15.SCHEDULER, 77, single=True, reflect=True)


def test_what_a_folded_vae_and_fp16_mean_is_noted() -> None:
    single, folder = (
        vae_notes(0.13025, 0.18215, single=True),
        vae_notes(0.13025, 0.13025, single=False),
    )
    for told in (single, folder):
        assert any("--no-half-vae" in line for line in told)
        assert any("from_single_file" in line for line in told)
    assert (
        vae_notes(0.18215, 0.18215, single=True) == vae_notes(0.18215, 0.18215, single=False) == []
    )
