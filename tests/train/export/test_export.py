import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo.pipeline import make_pipeline, read_captions
from tests.support import printed, train
from tests.support.ldm_keys import published
from tests.support.pipelines import with_factor
from xlsd_train.config import sd15
from xlsd_train.config.optimization import Kind
from xlsd_train.export.conversions import fold_vae
from xlsd_train.export.ldm_file import single_file
from xlsd_train.weights.lazy_tensors import LazyTensor
from xlsd_train.weights.ldm_keys import UNET as PREFIX
from xlsd_train.weights.ldm_keys import ema_name
from xlsd_train.weights.locate import locate_model
from xlsd_train.weights.network import Network, build_network, empty_network, full_config, shapes_of
from xlsd_train.weights.prediction_type import scheduler_for
from xlsd_train.weights.vae_fold import SD15_FACTOR

Out = pytest.CaptureFixture[str]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
FILES = (UNET, VAE, TEXT_ENCODER)


@pytest.fixture(scope="module")
def keys(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with exactly SD1.5's keys in all three parts, and its scaling factor."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_pipeline(folder, "keys", read_captions(photos))
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    small = {**sd15.VAE, "block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4}
    AutoencoderKL.from_config(small).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def keys_file(keys: Path) -> Path:
    """It in a single file."""
    return export(keys, keys.parent / "one.safetensors", "--format", "single-file")


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its real VAE in a single file, which folds the factor."""
    out = tmp_path_factory.mktemp("single") / "one.safetensors"
    return export(model, out, "--format", "single-file")


@pytest.fixture(scope="module")
def ours(model: Path) -> NDArray[np.float32]:
    """What the small model draws."""
    torch.set_num_threads(1)
    return draw(StableDiffusionPipeline.from_pretrained(model))


@pytest.fixture(scope="module")
def run(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with samples."""
    out = tmp_path_factory.mktemp("run") / "first"
    options = ("--phase", "both", "--steps", 2, "--batch", 4, "--lr", 1e-3, "--warmup", 0)
    samples = ("--sample-every", 2, "--sample-steps", 2)
    assert train(*options, *samples, "--data", store, "--model", model, "--out", out) == 0
    return out


def export(source: Path, out: Path, *options: object) -> Path:
    assert train("export", source, out, *options) == 0
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return {f"{file}/{k}": v for file in FILES for k, v in load_file(folder / file).items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def draw(pipeline: Any) -> NDArray[np.float32]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        made = pipeline(
            "a cat", width=64, height=64, num_inference_steps=4, generator=generator,
            output_type="np",
        )  # fmt: skip
    images: NDArray[np.float32] = made.images[0]
    return images


def test_a_folder_through_a_single_file_is_equal_in_every_tensor(
    keys: Path, keys_file: Path, tmp_path: Path
) -> None:
    folder = export(keys_file, tmp_path / "folder", "--tokenizer", keys)
    assert equal(weights(folder), weights(keys))
    assert {name: len(load_file(keys / name)) for name in FILES} == {
        UNET: 686, VAE: 248, TEXT_ENCODER: 196
    }  # fmt: skip
    assert load_file(keys_file).keys() == published().keys()


def test_the_full_size_file_has_sd15s_names_and_shapes() -> None:
    def unread() -> Tensor:
        raise AssertionError

    parts = {}
    configs = {"unet": sd15.UNET, "text_encoder": sd15.TEXT_ENCODER, "vae": sd15.VAE}
    for kind, config in configs.items():
        network = empty_network(kind, config)  # type: ignore[arg-type]
        shapes = shapes_of(kind, network)  # type: ignore[arg-type]
        tensors = {name: LazyTensor(shape, torch.float32, unread) for name, shape in shapes.items()}
        full = full_config(kind, network, config)  # type: ignore[arg-type]
        parts[kind] = Network(kind, full, tensors, "SD1.5")  # type: ignore[arg-type]
    made = single_file(**parts, scheduler=sd15.SCHEDULER, dtype=torch.float16)
    assert {name: stored.shape for name, stored in made.items()} == published()


def test_the_noise_schedule_is_the_one_that_is_trained_with(keys_file: Path) -> None:
    held = load_file(keys_file)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)
    assert torch.allclose(held["alphas_cumprod"].double(), bar, atol=1e-6)
    assert torch.allclose(held["betas"].double(), betas, rtol=1e-6)
    before = torch.cat([torch.ones(1), held["alphas_cumprod"][:-1]])
    assert torch.equal(held["alphas_cumprod_prev"], before)
    mean = held["posterior_mean_coef1"] + held["posterior_mean_coef2"]
    assert mean[0] == pytest.approx(1)  # the last step's mean is x_0 itself
    ids = held["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(77)[None])


def test_a_loader_that_knows_one_factor_draws_our_picture(
    model: Path, single: Path, ours: NDArray[np.float32], tmp_path: Path
) -> None:
    """diffusers' from_single_file, told that the VAE is SD1.5's; without the fold it fails."""
    config = with_factor(model, tmp_path / "sd15")
    theirs = draw(StableDiffusionPipeline.from_single_file(str(single), config=config))
    assert np.abs(theirs - ours).max() <= 1 / 255
    naive = export(
        model, tmp_path / "naive.safetensors", "--format", "single-file",
        "--scaling-factor", 0.13025,
    )  # fmt: skip
    wrong = draw(StableDiffusionPipeline.from_single_file(str(naive), config=config))
    assert np.abs(wrong - ours).max() > 10 / 255


def test_a_folder_keeps_the_factor_in_its_config(
    model: Path, ours: NDArray[np.float32], tmp_path: Path
) -> None:
    folder = export(model, tmp_path / "folder")
    assert equal(weights(folder), weights(model))
    assert json.loads((folder / "vae/config.json").read_text())["scaling_factor"] == 0.13025
    assert all(name.startswith("text_model.") for name in load_file(folder / TEXT_ENCODER))
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    # Not to the bit: where a tensor lies in a memory-mapped file decides how sums are cut.
    assert np.abs(draw(StableDiffusionPipeline.from_pretrained(folder)) - ours).max() < 1e-5
    other = export(model, tmp_path / "other", "--scaling-factor", SD15_FACTOR)
    assert not torch.equal(load_file(other / VAE)["quant_conv.weight"],
                           load_file(model / VAE)["quant_conv.weight"])  # fmt: skip
    drawn = draw(StableDiffusionPipeline.from_pretrained(other))
    assert np.abs(drawn - ours).max() <= 1 / 255


def test_unfolding_gives_the_vae_back(model: Path, single: Path, tmp_path: Path) -> None:
    options = ("--scaling-factor", 0.13025, "--tokenizer", model / "tokenizer")
    back = weights(export(single, tmp_path / "back", *options))
    for name, value in weights(model).items():
        close = torch.allclose(back[name], value, rtol=1e-6, atol=1e-7)
        assert close if "quant_conv" in name else torch.equal(back[name], value)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_half_precision_is_one_rounding_of_the_networks(
    model: Path, tmp_path: Path, dtype: str, torch_dtype: str
) -> None:
    single = export(
        model, tmp_path / "one.safetensors", "--format", "single-file", "--dtype", dtype
    )
    half = getattr(torch, torch_dtype)
    kinds = {name.split(".")[0]: value.dtype for name, value in load_file(single).items()}
    assert kinds["model"] == kinds["first_stage_model"] == half
    assert kinds["betas"] == torch.float32  # half would move the noise levels
    folder = export(model, tmp_path / "folder", "--dtype", dtype)
    rounded = {name: value.to(half) for name, value in weights(model).items()}
    assert equal(weights(folder), rounded)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert np.isfinite(draw(pipeline)).all()
    assert json.loads((folder / "text_encoder/config.json").read_text())["torch_dtype"] == (
        torch_dtype
    )


def test_a_run_exports_its_newest_checkpoint_with_card_and_metadata(
    run: Path, tmp_path: Path, capsys: Out
) -> None:
    folder = export(run, tmp_path / "mine")
    checkpoint = run / "checkpoints" / "step-00000002"
    assert equal(load_file(folder / UNET), load_file(checkpoint / "unet.safetensors"))
    trained = load_file(checkpoint / "text_encoder.safetensors")
    assert equal(load_file(folder / TEXT_ENCODER), trained)
    assert (folder / "samples.png").read_bytes() == (run / "samples/grid.png").read_bytes()
    card = (folder / "README.md").read_text()
    record = json.loads((run / "config.json").read_text())
    seen = json.loads((checkpoint / "state.json").read_text())["images_seen"]
    for fact in ("| what trained | both |", "| steps | 2 |", f"| images seen | {seen} |",
                 record["stores"][0]["fingerprint"], "![samples"):  # fmt: skip
        assert fact in card
    for prompt in record["prompts"]:
        assert prompt in card
    assert str(run.parent) not in card  # nobody's folders
    said = printed(capsys)
    with safe_open(folder / UNET, "pt") as file:
        told = file.metadata()
    assert told["modelspec.sai_model_spec"] == "1.0.0"
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert (told["modelspec.title"], told["modelspec.implementation"]) == ("mine", "diffusers")
    assert (told["xlsd.phase"], told["xlsd.step"]) == ("both", "2")
    assert told["xlsd.store"] == record["stores"][0]["fingerprint"]
    assert json.loads(told["xlsd.recipe"])["lr"] == 1e-3
    import hashlib

    digest = hashlib.sha256((folder / UNET).read_bytes()).hexdigest()
    assert digest in said
    assert digest in card
    data = (folder / UNET).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert told["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[begin:]).hexdigest()


def test_a_single_file_says_what_was_folded_and_is_the_same_every_time(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    first, second = (tmp_path / name / "one.safetensors" for name in "ab")
    for out in (first, second):
        export(checkpoint, out, "--format", "single-file")
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        told = file.metadata()
    assert "0.13025 is folded" in told["xlsd.folded"]
    assert told["modelspec.title"] == "one"
    assert "the factor 0.18215 is right" in first.with_suffix(".md").read_text()
    assert sorted(path.name for path in first.parent.iterdir()) == [
        "one.md", "one.safetensors", "one.samples.png"
    ]  # fmt: skip


def test_the_metadata_say_the_stores_resolution_and_nobodys_folders(
    run: Path, model: Path, tmp_path: Path
) -> None:
    with safe_open(export(run, tmp_path / "mine") / UNET, "pt") as file:
        assert file.metadata()["modelspec.resolution"] == "128x128"
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for kind in ("unet", "text_encoder", "vae"):
        config = json.loads((copy / kind / "config.json").read_text())
        told = {**config, "_name_or_path": "/home/somebody/secret"}
        (copy / kind / "config.json").write_text(json.dumps(told))
    folder = export(copy, tmp_path / "folder")
    single = export(copy, tmp_path / "one.safetensors", "--format", "single-file")
    for path in (single, *(path for path in folder.rglob("*") if path.is_file())):
        assert b"somebody" not in path.read_bytes()
    with safe_open(single, "pt") as file:
        assert file.metadata()["modelspec.resolution"] == "512x512"  # SD1.5's, where none is known


def test_a_models_name_begins_no_markup_in_its_card(model: Path, tmp_path: Path) -> None:
    card = (export(model, tmp_path / "my <img src=x> [a](b) | c") / "README.md").read_text()
    assert "\n# my \\<img src=x> \\[a\\](b) \\| c\n" in card


def test_moving_averages_are_exported_when_asked_for(
    single: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    held, path = load_file(single), tmp_path / "full" / "model.safetensors"
    shutil.copytree(model, path.parent, ignore=shutil.ignore_patterns("*.safetensors"))
    averages = {
        ema_name(name.removeprefix(PREFIX)): value + 1
        for name, value in held.items()
        if name.startswith(PREFIX)
    }
    save_file({**held, **averages}, path)
    for words in (("export", path, tmp_path / "a"), ("swap", tmp_path / "b", "--model", path,
                  "--vae", model / "vae")):  # fmt: skip
        assert train(*words, "--model-ema") == 0
    for out in ("a", "b"):
        taken, plain = load_file(tmp_path / out / UNET), load_file(model / UNET)
        assert equal(taken, {name: value + 1 for name, value in plain.items()})
    assert train("export", model, tmp_path / "c", "--model-ema") == 1
    assert "--model-ema: only single files hold moving averages" in capsys.readouterr().err


def test_a_model_without_a_vae_is_given_one_by_swap(
    model: Path, tmp_path: Path, capsys: Out
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shutil.rmtree(copy / "vae")
    (tmp_path / "prompts.txt").write_text("a cat")
    for words in (("export", copy, tmp_path / "out"),
                  ("sample", copy, "--prompts", tmp_path / "prompts.txt")):  # fmt: skip
        assert train(*words) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert f"holds no VAE; add one with `xlsd-train swap NEW --model {copy} --vae" in told
    assert train("swap", tmp_path / "new", "--model", copy, "--vae", model / "vae") == 0
    assert equal(weights(tmp_path / "new"), weights(model))


def test_a_card_shows_the_samples_of_a_model_with_spaces_in_its_name(
    run: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "my model.safetensors", "--format", "single-file")
    assert "](my%20model.samples.png)" in (tmp_path / "my model.md").read_text()
    assert (tmp_path / "my model.samples.png").is_file()


def test_a_normalisation_of_each_channel_is_folded_too(run: Path, tmp_path: Path) -> None:
    """As RUN/base/latents.json tells it: the UNet was trained on (raw - shift) * scale."""
    copy, out = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "one.safetensors"
    shift, scale = [0.3, -0.2, 0.5, 0.1], [0.1, 0.2, 0.15, 0.12]
    told = {"normalized": True, "shift": shift, "scale": scale}
    (copy / "base/latents.json").write_text(json.dumps(told))
    export(copy, out, "--format", "single-file")
    config = with_factor(export(copy, tmp_path / "folder"), tmp_path / "sd15")
    theirs = AutoencoderKL.from_single_file(str(out), config=config, subfolder="vae")
    ours = AutoencoderKL.from_pretrained(copy / "base/vae")
    folder = AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae")
    latents = torch.randn(1, 4, 8, 8)
    raw = latents / torch.tensor(scale).view(-1, 1, 1) + torch.tensor(shift).view(-1, 1, 1)
    with torch.inference_mode():
        want = ours.decode(raw).sample
        for vae, factor in ((theirs, SD15_FACTOR), (folder, 0.13025)):
            assert torch.allclose(vae.decode(latents / factor).sample, want, atol=1e-5)


def test_a_tokenizer_in_one_json_gives_vocabulary_and_merges(model: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    shutil.rmtree(copy / "tokenizer")
    tokenizer.save_pretrained(copy / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink(missing_ok=True)
    folder = export(copy, tmp_path / "out")
    for name in ("vocab.json", "merges.txt"):
        assert (folder / "tokenizer" / name).is_file()
    (folder / "tokenizer/tokenizer.json").unlink()
    again = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = "the astronaut, a cat of that name"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_vae_of_an_older_folder_has_sd15s_factor(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "vae/config.json").read_text())
    del config["scaling_factor"]
    (copy / "vae/config.json").write_text(json.dumps(config))
    vae = locate_model(str(copy)).vae
    assert vae is not None
    same, told = fold_vae(vae, SD15_FACTOR)
    assert same is vae
    assert "unchanged" in told


def test_what_a_killed_export_left_is_swept_away(model: Path, tmp_path: Path) -> None:
    import os

    dead = 4_194_304  # beyond Linux's largest process number
    for pid in (dead, os.getppid()):
        folder = tmp_path / f".folder.{pid}.tmp"
        folder.mkdir()
        (folder / "half").write_text("x")
    export(model, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".folder.{os.getppid()}.tmp", "folder"
    ]  # fmt: skip


def test_a_full_disk_is_one_sentence(
    model: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xlsd_cache.runtime.atomic.fsync_file", full)
    assert train("export", model, tmp_path / "folder") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device; nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_a_kept_vae_of_no_quant_conv_is_refused_for_a_single_file(model: Path) -> None:
    vae = locate_model(str(model)).vae
    assert vae is not None
    with pytest.raises(Exception, match="into which no scaling factor can be folded"):
        fold_vae(replace(vae, config={**vae.config, "_class_name": "AutoencoderTiny"}), 0.5)


@pytest.mark.parametrize(
    ("spoil", "options", "told"),
    [
        ("large", ("--dtype", "fp16"), "fp16 cannot hold"),
        ("cut", (), "truncated or damaged"),
        ("missing", (), "lacks 1 weights"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    model: Path, tmp_path: Path, capsys: Out, spoil: str, options: tuple[str, ...], told: str
) -> None:
    copy, out = Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "out" / "folder"
    state = load_file(copy / UNET)
    if spoil == "cut":
        (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1000])
    elif spoil == "large":
        state["conv_out.bias"][0] = 1e6
    else:
        state.pop("conv_out.bias")
    if spoil != "cut":
        save_file(state, copy / UNET, {"format": "pt"})
    assert train("export", copy, out, *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("out", "options", "told"),
    [
        ("file", (), "exists already"),
        ("model.ckpt", ("--format", "single-file"), "does not end in .safetensors"),
        ("model.safetensors", (), "use --format single-file"),
        ("new", ("--scaling-factor", 0), "--scaling-factor 0"),
    ],
)
def test_impossible_exports_are_one_sentence(
    model: Path, tmp_path: Path, capsys: Out, out: str, options: tuple[object, ...], told: str
) -> None:
    (tmp_path / "file").write_text("x")
    assert train("export", model, tmp_path / out, *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_exported_parts_load_in_diffusers_with_every_weight(model: Path, tmp_path: Path) -> None:
    folder = export(model, tmp_path / "folder")
    unet, told = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", output_loading_info=True
    )
    assert not any(told.values())
    ours = build_network(locate_model(str(model)).unet)
    assert equal(dict(unet.state_dict()), dict(ours.state_dict()))


SINGLE = ("--format", "single-file")


def predicting(model: Path, out: Path, kind: Kind) -> Path:
    """The small model, saying that it predicts this."""
    shutil.copytree(model, out)
    path = out / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(scheduler_for(kind, json.loads(path.read_bytes()))))
    return out


def test_a_v_file_says_so_to_every_program(model: Path, tmp_path: Path, capsys: Out) -> None:
    source, out = predicting(model, tmp_path / "source", "v"), tmp_path / "out" / "my.v.safetensors"
    export(source, out, *SINGLE)
    last = printed(capsys).strip().splitlines()[-1]
    card = (out.parent / "my.v.md").read_text()
    for told in (last, card):
        assert "my.v.yaml" in told
        assert "ModelSamplingDiscrete (v_prediction, zsnr on)" in told
    assert "it needs nothing else" not in card
    assert "parameterization: v\n" in (out.parent / "my.v.yaml").read_text()
    assert {"v_pred", "ztsnr"} <= load_file(out).keys()
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "my.v.md", "my.v.safetensors", "my.v.yaml"
    ]  # fmt: skip
    assert locate_model(str(out)).scheduler == locate_model(str(source)).scheduler
    # The marks are no weights, and disturb no loader.
    config = with_factor(model, tmp_path / "sd15")
    pipeline = StableDiffusionPipeline.from_single_file(str(out), config=config)
    ours = build_network(locate_model(str(source)).unet).state_dict()
    assert equal(dict(pipeline.unet.state_dict()), dict(ours))


def test_a_flow_file_has_no_yaml_and_tells_what_it_needs(
    model: Path, tmp_path: Path, capsys: Out
) -> None:
    source, out = predicting(model, tmp_path / "source", "flow"), tmp_path / "f.safetensors"
    export(source, out, *SINGLE)
    assert "ModelSamplingSD3 with shift 1.0" in printed(capsys).splitlines()[-1]
    assert "needs nothing else" not in (tmp_path / "f.md").read_text()
    assert not (tmp_path / "f.yaml").exists()
    assert "v_pred" not in load_file(out)
    export(source, tmp_path / "folder")
    assert "diffusers must be 0.32 or newer" in (tmp_path / "folder/README.md").read_text()


def test_an_eps_file_needs_nothing_else_and_both_cards_speak_of_the_factors(
    keys_file: Path, single: Path, model: Path, tmp_path: Path
) -> None:
    card = keys_file.with_suffix(".md").read_text()
    assert "it needs nothing else" in card
    assert "from_single_file" not in card  # nothing was folded
    assert not keys_file.with_suffix(".yaml").exists()
    folder = export(model, tmp_path / "folder") / "README.md"
    for path in (single.with_suffix(".md"), folder):
        assert "`from_single_file`" in path.read_text()
        assert "--no-half-vae" in path.read_text()


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_another_yaml_beside_is_refused_and_left(
    model: Path, tmp_path: Path, capsys: Out, kind: Kind
) -> None:
    """Else A1111 and Forge would read the one file by the other."""
    source, out = predicting(model, tmp_path / "source", kind), tmp_path / "out" / "m.safetensors"
    out.parent.mkdir()
    out.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert train("export", source, out, *SINGLE) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "m.yaml exists already, and A1111 and Forge would read it as m.safetensors's" in line
    assert [path.name for path in out.parent.iterdir()] == ["m.yaml"]
    assert out.with_suffix(".yaml").read_text() == "model: {params: {parameterization: v}}"


def test_a_killed_exports_own_yaml_is_no_obstacle_and_a_failed_ones_is_withdrawn(
    model: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = predicting(model, tmp_path / "source", "v")
    first, again = tmp_path / "a" / "m.safetensors", tmp_path / "b" / "m.safetensors"
    seen = []

    def full(path: Path) -> None:
        if not path.name.startswith(".m.safetensors"):
            return
        seen.extend(sorted(x.name for x in path.parent.iterdir() if x.name[0] != "."))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("xlsd_cache.runtime.atomic.fsync_file", full)
        assert train("export", source, first, *SINGLE) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device; nothing was written" in line
    assert seen == ["m.md", "m.yaml"]  # a model never has its name before them
    assert list(first.parent.iterdir()) == []
    export(source, first, *SINGLE)
    again.parent.mkdir()
    shutil.copy(first.with_suffix(".yaml"), again.parent)
    export(source, again, *SINGLE)
    assert again.read_bytes() == first.read_bytes()
