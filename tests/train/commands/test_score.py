import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tests.support import picture, printed, train, write_images
from xlsd_cache.errors import UserError
from xlsd_train.evaluation.clip import load_clip
from xlsd_train.evaluation.images import Picture, save_picture

Out = pytest.CaptureFixture[str]
SUBJECTS = ("cat", "rocket", "coffee", "astronaut", "coins", "clock")
PROMPTS = "".join(f"a {subject} --seed {i}\n" for i in (1, 2) for subject in SUBJECTS)
FLAGS = ("--steps", 2, "--size", "64x64")


@pytest.fixture(scope="module")
def clip(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP of random weights, as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(model / "tokenizer", folder)
    words = len(CLIPTokenizer.from_pretrained(folder))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {**small, "num_attention_heads": 2, "vocab_size": words, "max_position_embeddings": 16}
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    vision = {**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `sample` for one model under two names, and a third, paler folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text(PROMPTS)
    out = folder / "out"
    options = ("--prompts", folder / "prompts.txt", "--out", out, *FLAGS)
    assert train("sample", f"one={model}", f"same={model}", *options) == 0
    pale = shutil.copytree(out / "0-one", out / "2-pale")
    for path in pale.glob("*.png"):
        with Image.open(path) as image:
            told = json.loads(image.info["xlsd"])
            faded = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, "white"), 0.9)
        asked = Picture(told["prompt"], "", told["seed"], 2, 7.5, 64, 64)
        save_picture(faded, path, asked)
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images in two folders, and three damaged files."""
    folder = tmp_path_factory.mktemp("real") / "photos"
    write_images(folder, [f"{i}.png" for i in range(7)])
    write_images(folder / "more", [f"{i}.jpg" for i in range(7)], first_seed=50)
    (folder / "cut.jpg").write_bytes((folder / "more" / "0.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "more" / "not.png").write_text("no image")
    return folder


def scores(capsys: Out, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert train("score", *words, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_table_of_all_models_says_which_are_tied(
    drawn: Path, real: Path, clip: Path, capsys: Out
) -> None:
    assert train("score", drawn, "--real", real, "--clip", clip) == 0
    shown = printed(capsys)
    assert f"12 images per model, CLIP {clip}" in shown
    assert "17 real images = 14 compared + 1 truncated + 2 not_an_image + 0 not used" in shown
    assert "  cut.jpg: truncated: " in shown
    assert "  empty.png: not_an_image: the file is empty" in shown
    for name in ("0-one", "1-same", "2-pale"):
        assert f"\n{drawn / name}" in shown
    assert "; statistically tied: " in shown
    assert "12 images are few for CMMD" in shown
    assert "12 images are few: 95% intervals of fewer than 30 are too narrow" in shown


def test_the_same_pictures_score_the_same_and_paler_ones_do_not(
    drawn: Path, real: Path, clip: Path, capsys: Out
) -> None:
    told = scores(capsys, drawn, "--real", real, "--clip", clip)
    one, same, pale = (told["models"][str(drawn / x)] for x in ("0-one", "1-same", "2-pale"))
    assert one == same != pale
    for kind in ("clip_score", "cmmd"):
        for found in (one[kind], pale[kind]):
            assert found["low"] <= found["mean"] <= found["high"]
        best = told["best"][kind]
        if best["model"] == str(drawn / "0-one"):
            assert str(drawn / "1-same") in best["statistically_tied"]
    assert told["real"]["files"]["more/not.png"]["reason"] == "not_an_image"
    again = scores(capsys, drawn, "--real", real, "--clip", clip)
    assert again == told


def test_clip_scores_are_those_of_transformers(drawn: Path, clip: Path, capsys: Out) -> None:
    """One model's folder alone scores the same as together with others."""
    folder = drawn / "2-pale"
    told = scores(capsys, folder, "--clip", clip)
    assert list(told["models"]) == [str(folder)]
    network = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    each = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            prompt = json.loads(image.info["xlsd"])["prompt"]
            pixels = processor(image.convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            found = network(**tokenizer(prompt, return_tensors="pt"), **pixels)
        each.append(float(found.logits_per_image / network.logit_scale.detach().exp()))
    expected = 2.5 * np.maximum(each, 0).mean()
    assert told["models"][str(folder)]["clip_score"]["mean"] == pytest.approx(expected, abs=1e-6)
    together = scores(capsys, drawn, "--clip", clip)["models"][str(folder)]["clip_score"]
    assert together == told["models"][str(folder)]["clip_score"]


def test_images_of_any_shape_are_seen_as_transformers_prepares_them(
    clip: Path, tmp_path: Path
) -> None:
    """Wide, tall and EXIF-rotated images, in more than one batch."""
    judge = load_clip(str(clip), torch.device("cpu"))
    wide, tall = picture(1, 160, 90), picture(2, 70, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, pixels in (("wide", wide), ("tall", tall)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(np.rot90(wide)).save(tmp_path / "lying.png", exif=exif)
    paths = [tmp_path / f"{name}.png" for name in ("wide", "tall", "lying")] * 15
    found, rejected = judge.embed_files(paths, "images")
    assert found.shape == (45, 16)
    assert not rejected
    ready = CLIPImageProcessorPil.from_pretrained(clip)([wide, tall], return_tensors="pt")
    expected = judge.embed_images(ready["pixel_values"])
    assert np.allclose(found[:2], expected, atol=1e-6)
    assert np.allclose(found[2], expected[0], atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)


def test_a_runs_samples_are_scored_step_by_step(model: Path, clip: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for i in range(3):
            image = Image.fromarray(picture(step + i, 64, 64))
            save_picture(image, folder / f"{i:02d}.png", Picture("a cat", "", i, 2, 7.5, 64, 64))
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "grid.png")
    assert train("score", tmp_path / "samples", "--clip", clip) == 0


def test_truncated_prompts_are_reported(clip: Path, tmp_path: Path, capsys: Out) -> None:
    for i in range(2):
        asked = Picture("a cat, " * 30 if i else "a cat", "", i, 2, 7.5, 64, 64)
        save_picture(Image.fromarray(picture(i, 64, 64)), tmp_path / f"{i}.png", asked)
    assert train("score", tmp_path, "--clip", clip) == 0
    assert "1 prompts are truncated to CLIP's 16 tokens" in printed(capsys)


def test_of_many_real_images_always_the_same_are_taken(
    drawn: Path, real: Path, clip: Path, capsys: Out
) -> None:
    told = [
        scores(capsys, drawn / "0-one", "--real", real, "--clip", clip, "--most", most)
        for most in (14, 14, 0)
    ]
    assert told[0] == told[1] != told[2]
    assert (told[0]["real"]["not_taken"], told[2]["real"]["not_taken"]) == (3, 0)


def test_unusable_folders_and_clips_are_refused(
    drawn: Path, real: Path, clip: Path, model: Path, tmp_path: Path, capsys: Out
) -> None:
    few, other, plain, bare = (tmp_path / name for name in ("few", "other", "plain", "bare"))
    for folder, count in ((few, 3), (other, 12)):
        folder.mkdir()
        for path in sorted((drawn / "0-one").glob("*.png"))[:count]:
            shutil.copy(path, folder)
    image = Image.fromarray(picture(0, 64, 64))
    save_picture(image, other / "00.png", Picture("a dog", "", 1, 2, 7.5, 64, 64))
    for folder in (plain, bare):
        folder.mkdir()
    image.save(plain / "0.png")
    broken = shutil.copytree(drawn / "0-one", tmp_path / "broken")
    data = (broken / "03.png").read_bytes()
    (broken / "03.png").write_bytes(data[: len(data) // 2])
    photos = tmp_path / "photos"
    write_images(photos, ["a.png", "b.png"])
    lacking = shutil.copytree(clip, tmp_path / "lacking")
    shutil.copy(model / "text_encoder" / "model.safetensors", lacking)
    unread = shutil.copytree(clip, tmp_path / "unread")
    (unread / "model.safetensors").write_bytes(b"nothing")
    judge, all_real = ("--clip", clip), ("--real", real)
    for words, told in [
        ((tmp_path / "nowhere", *judge), "is not a folder; give what `xlsd-train sample` wrote"),
        ((bare, *judge), "and its subfolders have no images"),
        ((plain, *judge), "0.png has no prompt and seed in its metadata (KeyError: 'xlsd')"),
        (
            (few, *judge, *all_real),
            "3 images per model are too few to score with --real; give at least 10",
        ),
        ((few, drawn / "0-one", *judge), "0-one has 'a astronaut' with seed 1 and"),
        ((drawn / "0-one", other, *judge), "has 'a cat' with seed 1 and"),
        ((drawn, *judge, "--real", tmp_path / "no"), "is not a folder; give a folder of images"),
        ((drawn, *judge, "--real", photos), "2 images in"),
        ((drawn, "--clip", model / "text_encoder"), "is a clip_text_model, not a complete CLIP"),
        ((drawn, "--clip", tmp_path), "config.json is missing or damaged"),
        ((drawn, "--clip", lacking), "of a CLIP's weights"),
        ((drawn, "--clip", unread), "no .safetensors file"),
        ((broken, *judge), "03.png is truncated"),
    ]:
        capsys.readouterr()
        assert train("score", *words) == 1
        assert told in " ".join(capsys.readouterr().err.split())


def test_a_hub_that_is_not_reached_says_how_to_name_a_folder(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train("score", drawn, "--clip", "nobody/clip-that-is-not-there") == 1
    told = capsys.readouterr().err
    assert "cannot fetch nobody/clip-that-is-not-there" in told
    assert "give a folder with a CLIP" in " ".join(told.split())


def test_no_code_in_a_clips_folder_is_run(
    clip: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder, mark = Path(shutil.copytree(clip, tmp_path / "clip")), tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    kinds = {"config.json": "AutoModel", "tokenizer_config.json": "AutoTokenizer"}
    for name, kind in {**kinds, "preprocessor_config.json": "AutoImageProcessor"}.items():
        told = json.loads((folder / name).read_text())
        told |= {"auto_map": {kind: "evil.Evil", "AutoConfig": "evil.Evil"}}
        told |= {"attn_implementation": "some/kernel"} if name == "config.json" else {}
        (folder / name).write_text(json.dumps(told))
    load_clip(str(folder), torch.device("cpu"))
    for named, told in (("Evil", "asks for Evil"), ("CLIPImageProcessor", "is not from 1 to 4096")):
        wide = {"image_processor_type": named, "size": {"shortest_edge": 10**9}}
        (folder / "preprocessor_config.json").write_text(json.dumps(wide))
        with pytest.raises(UserError, match=told):
            load_clip(str(folder), torch.device("cpu"))
    assert not mark.exists()


def test_pictures_that_are_links_are_not_scored(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "key").write_text("PRIVATE-KEY")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/00.png").symlink_to(tmp_path / "key")
    assert train("score", tmp_path / "out") == 1
    assert f"{tmp_path / 'out/00.png'} is a link" in capsys.readouterr().err
