import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from tests.support import train
from tests.support.hub import serving
from tests.support.sessions import Open
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.model.loading import load_bundle


@pytest.fixture
def long_clip(model: Path, tmp_path: Path) -> Path:
    """A small CLIP of 248 tokens as zer0int/LongCLIP-L-Diffusers lies on the hub.

    A whole CLIP with its tokenizer, whose configuration says 77 tokens, as some others' does.
    """
    folder = tmp_path / "longclip"
    shutil.copytree(model / "tokenizer", folder)
    text = json.loads((model / "text_encoder/config.json").read_text())
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(3)
    whole = CLIPModel(
        CLIPConfig(text_config={**text, "max_position_embeddings": 248}, vision_config=vision)
    )
    whole.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_longclip_is_swapped_in_with_its_length(
    long_clip: Path, model: Path, store: Path, tmp_path: Path
) -> None:
    expected = load_file(long_clip / "model.safetensors")
    given = ["--batch", 4, "--data", store, "--model", model, "--sample-every", 1, "--steps", 2]
    given += ["--text-encoder", long_clip, "--sample-steps", 1, "--out", tmp_path / "run"]
    assert train("--phase", "unet", *given, "--stop-after", 1) == 0
    shutil.rmtree(long_clip)  # a run needs it no more
    assert train("--phase", "unet", *given) == 0
    with LatentStore.open(store) as ours:
        loaded = load_bundle(str(tmp_path / "run"), None, ours.identity)
    assert loaded.tokens == 248
    assert loaded.tokenizer.model_max_length == 248
    for name, value in loaded.weights("text_encoder").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["pipeline", "text encoder"])
def test_text_encoders_of_pipelines_are_taken_too(
    model: Path, tmp_path: Path, open_run: Open, layout: str
) -> None:
    """A pipeline's tokenizer comes along; a text encoder alone is read by the model's own."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    session = open_run(text_encoder=str(other if layout == "pipeline" else other / "text_encoder"))
    whose = other if layout == "pipeline" else model
    assert session.model.tokenizer_folder == whose / "tokenizer"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("gone", "no such file or directory"),
        ("empty", "config.json is missing or damaged"),
        ("truncated", "model.safetensors"),
        ("width", "is 64 wide and the UNet .* takes 32"),
    ],
)
def test_what_is_no_fitting_text_encoder_is_one_sentence(
    long_clip: Path, open_run: Open, spoil: str, told: str
) -> None:
    if spoil == "gone":
        shutil.rmtree(long_clip)
    elif spoil == "empty":
        (long_clip / "config.json").unlink()
    elif spoil == "truncated":
        path = long_clip / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        config = CLIPConfig.from_pretrained(long_clip)
        config.text_config.max_position_embeddings = 248
        config.text_config.hidden_size = 64
        CLIPModel(config).save_pretrained(long_clip)
    with pytest.raises(UserError, match=told) as error:
        open_run(text_encoder=str(long_clip))
    assert "\n" not in str(error.value)


def test_text_encoders_come_from_the_hub_too(
    long_clip: Path, open_run: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache as the hub's client has it; and what is not there is one sentence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--zer0int--LongCLIP-L-Diffusers", "1" * 40
    shutil.copytree(long_clip, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    session = open_run(text_encoder="zer0int/LongCLIP-L-Diffusers")
    assert session.model.tokens == session.source.captions.length == 248
    with pytest.raises(UserError, match="cannot fetch zer0int/Nothing") as error:
        open_run(text_encoder="zer0int/Nothing", out=tmp_path / "other")
    assert "\n" not in str(error.value)


def test_a_hub_that_refuses_and_a_path_that_is_missing_are_told_apart(
    open_run: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every option that takes a repository; and a path is never sent there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with serving(tmp_path, 401) as (endpoint, asked):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        for option, instead in (
            ("model", "give a pipeline folder, a single .safetensors file, a run or a checkpoint"),
            ("text_encoder", "give a text encoder's folder or file"),
            ("vae", "give a folder with config.json and its weights"),
        ):
            asked.clear()
            with pytest.raises(UserError, match="private or gated.*; " + instead) as error:
                open_run(**{option: "org/name"})
            assert f"cannot fetch org/name from {endpoint}" in str(error.value)
            assert asked.count("api/models/org/name") == 1
            asked.clear()
            told = r"modles/mine: no such file or directory \(did you mean models/mine\?\)"
            with pytest.raises(UserError, match=told):
                open_run(**{option: "modles/mine"})
            assert not asked
