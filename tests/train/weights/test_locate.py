import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo.pipeline import make_pipeline
from tests.support import train
from tests.support.ldm_keys import published
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import Identity, LatentStore
from xlsd_train.model.loading import load_bundle
from xlsd_train.weights.ldm_keys import EMA, UNET, ema_name
from xlsd_train.weights.locate import fetch_missing, locate_model
from xlsd_train.weights.network import Network, build_network

Out = pytest.CaptureFixture[str]
State = dict[str, Tensor]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in a single file, its VAE as it is."""
    out = tmp_path_factory.mktemp("single") / "one.safetensors"
    options = ("--format", "single-file", "--scaling-factor", 0.13025)
    assert train("export", model, out, *options) == 0
    return out


@pytest.fixture
def foreign(single: Path, model: Path, tmp_path: Path) -> Path:
    """It as others write it, saying nothing of its sizes, which its folder's configs tell."""
    path = tmp_path / "theirs" / "model.safetensors"
    ignored = shutil.ignore_patterns("*.safetensors", "model_index.json")
    shutil.copytree(model, path.parent, ignore=ignored)
    save_file(load_file(single), path)
    return path


@pytest.fixture(scope="module")
def identity(store: Path) -> Identity:
    with LatentStore.open(store) as ours:
        return ours.identity


def held(part: Network | None) -> State:
    assert part is not None
    return {name: stored.read() for name, stored in part.tensors.items()}


def equal(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def assert_same(source: Path, model: Path, cast: torch.dtype = torch.float32) -> None:
    """Every weight of the source is the model's, bit for bit, read and in its network."""
    found = locate_model(str(source))
    for part, file in (
        (found.unet, UNET_FILE), (found.text_encoder, TEXT_FILE), (found.vae, VAE_FILE)
    ):  # fmt: skip
        there = {name: value.to(cast) for name, value in load_file(model / file).items()}
        assert equal(held(part), there)
        assert part is not None
        built = build_network(part).state_dict()
        plain = {name.removeprefix("text_model."): v.float() for name, v in there.items()}
        assert equal(dict(built), plain)


def test_a_single_file_of_ours_says_what_it_is(single: Path, model: Path) -> None:
    assert_same(single, model)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("safetensors", torch.float32),
        ("safetensors", torch.float16),
        ("ckpt", torch.float32),
        ("legacy", torch.bfloat16),
    ],
)
def test_others_single_files_give_equal_weights(
    foreign: Path, model: Path, dtype: torch.dtype, form: str
) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in load_file(foreign).items()
    }
    if form == "safetensors":
        save_file(state, foreign)
    else:
        foreign.unlink()
        foreign = foreign.with_suffix(".ckpt")
        held = {"state_dict": state, "global_step": 7}
        torch.save(held, foreign, _use_new_zipfile_serialization=form == "ckpt")
    assert_same(foreign, model, dtype)


def test_older_files_name_the_text_encoder_otherwise(foreign: Path, model: Path) -> None:
    state = {name.replace("text_model.", ""): v for name, v in load_file(foreign).items()}
    save_file(state, foreign)
    assert_same(foreign, model)


def test_moving_averages_are_taken_when_asked_for(foreign: Path, model: Path) -> None:
    state = load_file(foreign)
    with pytest.raises(UserError, match="holds no moving averages; leave out --model-ema"):
        locate_model(str(foreign), ema=True)
    told = "--model-ema: only single files hold moving averages, and .* is none"
    with pytest.raises(UserError, match=told):
        locate_model(str(model), ema=True)
    averages = {
        ema_name(name.removeprefix(UNET)): value + 1
        for name, value in state.items()
        if name.startswith(UNET)
    }
    counters = {f"{EMA}decay": torch.tensor(0.9999), f"{EMA}num_updates": torch.tensor(9)}
    save_file(state | averages | counters, foreign)
    plain = load_file(model / UNET_FILE)
    assert equal(held(locate_model(str(foreign)).unet), plain)
    taken = held(locate_model(str(foreign), ema=True).unet)
    assert equal(taken, {name: value + 1 for name, value in plain.items()})


def test_full_size_files_are_read_by_sd15s_configuration(tmp_path: Path) -> None:
    """All names and shapes of the published file, and holes where its four gigabytes are."""
    header, end = {}, 0
    for name, shape in published().items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    path, text = tmp_path / "v1-5.safetensors", json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    found = locate_model(str(path))
    assert found.text_encoder is not None
    assert found.vae is not None
    counts = [len(part.tensors) for part in (found.unet, found.text_encoder, found.vae)]
    assert counts == [686, 196, 248]
    assert found.vae.config["scaling_factor"] == 0.18215
    assert found.vae.config["_class_name"] == "AutoencoderKL"
    assert (found.tokenizer, found.scheduler["beta_end"]) == (None, 0.012)


@pytest.mark.parametrize(
    "names", ["folder", pytest.param("diffusers", marks=pytest.mark.slow), "ldm", "bare"]
)
def test_a_unet_replaces_the_models(model: Path, foreign: Path, tmp_path: Path, names: str) -> None:
    other = tmp_path / "other"
    make_pipeline(other, "nano", ["a dog"], seed=5)
    wanted = load_file(other / UNET_FILE)
    path = other
    if names == "diffusers":
        path = other / UNET_FILE
    elif names != "folder":
        assert train("export", other, tmp_path / "x.safetensors", "--format", "single-file") == 0
        state = load_file(tmp_path / "x.safetensors")
        unet = {name: value for name, value in state.items() if name.startswith(UNET)}
        if names == "bare":
            unet = {name.removeprefix(UNET): value for name, value in unet.items()}
        path = tmp_path / "unet.safetensors"
        save_file(unet, path)
    found = locate_model(str(foreign), unet=str(path))
    assert equal(held(found.unet), wanted)
    assert equal(held(found.text_encoder), load_file(model / TEXT_FILE))


@pytest.mark.parametrize("form", ["folder", "file", "ldm", "clip"])
def test_a_text_encoder_replaces_the_models(
    model: Path, foreign: Path, tmp_path: Path, form: str
) -> None:
    state = {name: value + 1 for name, value in load_file(model / TEXT_FILE).items()}
    folder = Path(shutil.copytree(model / "text_encoder", tmp_path / "te"))
    path = folder / "model.safetensors"
    stored = dict(state)
    if form == "clip":  # the whole of CLIP, as its authors publish it
        stored |= {"vision_model.x": torch.ones(1), "logit_scale": torch.ones(())}
        stored["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"text_config": config}))
    elif form == "ldm":
        stored = {f"cond_stage_model.transformer.{name}": v for name, v in state.items()}
    save_file(stored, path)
    given = folder if form in ("folder", "clip") else path
    found = locate_model(str(foreign), text_encoder=str(given))
    assert equal(held(found.text_encoder), state)
    assert equal(held(found.unet), load_file(model / UNET_FILE))


def test_a_longer_text_encoder_in_a_bare_file_says_how_long_it_is(
    model: Path, tmp_path: Path, identity: Identity
) -> None:
    state = load_file(model / TEXT_FILE)
    position = "text_model.embeddings.position_embedding.weight"
    state[position] = torch.randn(248, state[position].shape[1])
    save_file(state, tmp_path / "long.safetensors")
    loaded = load_bundle(
        str(model), None, identity, text_encoder=str(tmp_path / "long.safetensors")
    )
    assert loaded.tokens == 248
    ids = torch.randint(0, 300, (1, 248))
    with torch.inference_mode():
        assert loaded.text_encoder(ids).last_hidden_state.shape[1] == 248


def test_a_file_without_text_encoder_and_vae_takes_the_hubs_and_the_stores(
    foreign: Path, model: Path, identity: Identity, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    state = {name: v for name, v in load_file(foreign).items() if name.startswith(UNET)}
    bare = foreign.parent / "bare" / "model.safetensors"
    shutil.copytree(foreign.parent / "unet", bare.parent / "unet")
    save_file(state, bare)
    found = locate_model(str(bare))
    assert (found.text_encoder, found.vae, found.tokenizer) == (None, None, None)
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(model, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", tmp_path / "hub"
    )
    with caplog.at_level("INFO", logger="xlsd"):
        assert equal(held(fetch_missing(found).text_encoder), load_file(model / TEXT_FILE))
    assert "holds no text encoder" in caplog.text
    loaded = load_bundle(str(bare), None, identity, tokenizer=str(model))
    assert loaded.vae.sha256 == identity.vae_sha256


def test_training_begins_from_a_single_file_and_resumes(
    single: Path, model: Path, store: Path, tmp_path: Path, capsys: Out
) -> None:
    options = ("--phase", "te", "--batch", 4, "--data", store, "--model", single, "--tokenizer",
               model, "--steps", 2, "--sample-every", 0, "--out", tmp_path / "run")  # fmt: skip
    assert train(*options, "--stop-after", 1) == 0
    frozen = load_file(tmp_path / "run/checkpoints/step-00000001/unet.safetensors")
    assert equal(frozen, load_file(model / UNET_FILE))
    assert train(*options) == 0
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    assert train(*options, "--model-ema", "--out", tmp_path / "new") == 1
    assert "--model-ema" in capsys.readouterr().err
    assert train(*options, "--unet", model, "--text-encoder", model, "--dry-run", "--out",
                 tmp_path / "new") == 0  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lora", "is a LoRA"),
        ("sdxl", "is an SDXL"),
        ("sd2", "is an SD2"),
        ("inpainting", "is an inpainting model"),
        ("controlnet", "is a ControlNet"),
        ("vae", "is a VAE alone; pass it as --vae"),
        ("text encoder", "is a text encoder alone; pass it as --text-encoder"),
        ("unet", "is a UNet alone; pass it as --unet"),
        ("unknown", "is of unknown kind"),
    ],
)
def test_foreign_files_are_refused_by_what_they_are(
    foreign: Path, model: Path, tmp_path: Path, name: str, told: str
) -> None:
    state, one = load_file(foreign), torch.ones(1)
    states: dict[str, State] = {
        "lora": {"lora_unet_down_blocks_0.lora_up.weight": one, "lora_te_x.alpha": one + 1},
        "sdxl": {**state, "conditioner.embedders.1.model.positional_embedding": one},
        "sd2": {**state, "cond_stage_model.model.token_embedding.weight": one},
        "inpainting": {**state, f"{UNET}input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)},
        "controlnet": {"control_model.time_embed.0.weight": one},
        "vae": load_file(model / VAE_FILE),
        "text encoder": load_file(model / TEXT_FILE),
        "unet": load_file(model / UNET_FILE),
        "unknown": {"x": one},
    }
    path = tmp_path / "theirs.safetensors"
    save_file(states[name], path)
    with pytest.raises(UserError, match=told) as error:
        locate_model(str(path))
    assert "\n" not in str(error.value)


def test_a_file_of_other_sizes_is_refused_naming_both(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(load_file(single), path)  # no metadata and no configs: SD1.5 is assumed
    with pytest.raises(UserError, match=r"lacks \d+ weights|has shape .*, not "):
        locate_model(str(path))


@pytest.mark.parametrize(
    ("option", "file", "told"),
    [
        ("unet", VAE_FILE, "--unet .* holds no unet: it is a VAE alone"),
        ("text_encoder", UNET_FILE, "--text-encoder .* holds no text encoder: it is a UNet alone"),
        ("unet", "nothing", "--unet .*nothing: no such file or directory"),
    ],
)
def test_a_wrong_network_is_refused_by_its_option(
    model: Path, option: str, file: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        locate_model(str(model), **{option: str(model / file)})  # type: ignore[arg-type]


def test_a_text_encoder_of_another_width_is_refused(model: Path, tmp_path: Path) -> None:
    make_pipeline(tmp_path / "demo", "demo", ["a dog"])
    with pytest.raises(UserError, match="is 64 wide and the UNet .* takes 32"):
        locate_model(str(model), text_encoder=str(tmp_path / "demo"))


def test_older_folders_vaes_and_shards_are_read(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {}
    for name, value in load_file(copy / VAE_FILE).items():
        there = next((name.replace(a, b) for a, b in old.items() if a in name), name)
        renamed[there] = value
    assert renamed.keys() != load_file(copy / VAE_FILE).keys()
    save_file(renamed, copy / VAE_FILE)
    state = load_file(copy / UNET_FILE)
    halves = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, copy / "unet" / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (copy / f"{UNET_FILE}.index.json").write_text(json.dumps(index))
    (copy / UNET_FILE).unlink()
    assert_same(copy, model)
