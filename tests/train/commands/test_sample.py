import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from tests.support import printed, train
from tests.support.pipelines import with_factor
from tests.support.report_page import Page
from xlsd_train.evaluation.images import SCHEDULERS, Picture

Out = pytest.CaptureFixture[str]
PROMPTS = "a cat <script>alert(1)</script>\na rocket, über --seed 5 --negative text --size 96x64\n"
FLAGS = ("--steps", 2, "--size", "64x64", "--seed", 3, "--guidance", 3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, the same as a single file with the factor folded, and a base with its own VAE."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    single, base, out = folder / "one.safetensors", folder / "base", folder / "out"
    assert train("export", model, single, "--format", "single-file") == 0
    with_factor(model, base)
    shutil.copytree(model, base, dirs_exist_ok=True)
    shutil.rmtree(base / "vae")
    config = AutoencoderKL.load_config(model / "vae")
    torch.manual_seed(0)
    AutoencoderKL.from_config({**config, "scaling_factor": 0.5}).save_pretrained(base / "vae")
    models = (model, single, f"the <b>base</b>={base}")
    options = ("--prompts", prompts, "--out", out, "--tokenizer", model, *FLAGS)
    assert train("sample", *models, *options) == 0
    return out


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int64)


def told(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        text: dict[str, Any] = image.text  # type: ignore[attr-defined]
        return text


def test_any_mix_of_formats_draws_each_with_its_own_vae(made: Path) -> None:
    folders = sorted(path for path in made.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["0-nano", "1-one.safetensors", "2-the-b-base-b-"]
    for name in ("00.png", "01.png"):
        ours, single, base = (pixels(folder / name) for folder in folders)
        assert np.abs(ours - single).max() <= 1
        assert np.abs(ours - base).max() > 20
    assert pixels(folders[0] / "01.png").shape == (64, 96, 3)


def test_pictures_say_how_they_were_made_in_words_that_uis_read(made: Path) -> None:
    import hashlib

    first, second = (told(made / "0-nano" / name)["parameters"] for name in ("00.png", "01.png"))
    assert first.splitlines() == [
        "a cat <script>alert(1)</script>",
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed: 3, Size: 64x64, Model: nano",
    ]
    assert second.splitlines() == [
        "a rocket, über",
        "Negative prompt: text",
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed: 5, Size: 96x64, Model: nano",
    ]
    single = made.parent / "one.safetensors"
    digest = hashlib.sha256(single.read_bytes()).hexdigest()[:10]
    in_single = told(made / "1-one.safetensors" / "00.png")
    assert f"Model hash: {digest}, Model: one.safetensors" in in_single["parameters"]
    ours = json.loads(in_single["xlsd"])
    assert (ours["seed"], ours["guidance"], ours["source"]) == (3, 3.0, "one.safetensors")


def test_the_grid_has_prompts_above_and_models_at_the_left(made: Path) -> None:
    grid = pixels(made / "grid.png")
    cell = pixels(made / "2-the-b-base-b-" / "01.png")
    assert np.array_equal(grid[-64:, -96:], cell)
    above, left = grid.shape[0] - 3 * 64, grid.shape[1] - 2 * 96
    for name in (
        grid[:above, left : left + 96],
        grid[:above, -96:],
        *grid[above:, :left].reshape(3, 64, left, 3),
    ):
        assert name.min() < 128  # written on
    assert grid[:above, :left].min() == 255


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_users(made: Path) -> None:
    page = Page(made / "index.html")
    assert (len(page.scripts), page.links) == (1, 0)
    assert "a cat <script>alert(1)</script>" in page.text
    assert page.data["models"][2] == "the <b>base</b>"
    rows = [page.sheets[str(i)] for i in range(3)]
    assert [len(row) for row in rows] == [2, 2, 2]
    data = base64.b64decode(str(rows[2][1]).removeprefix("data:image/png;base64,"))
    assert data == (made / "2-the-b-base-b-" / "01.png").read_bytes()


def test_of_many_prompts_grid_and_page_show_the_first(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """A page of hundreds of images, as scores need, would have gigabytes."""
    monkeypatch.setattr("xlsd_train.commands.sample.SHOWN", 1)
    out = tmp_path / "out"
    assert train("sample", model, "--prompts", prompts, "--out", out, *FLAGS) == 0
    assert "grid and page show the first 1 of 2 prompts" in printed(capsys)
    assert sorted(path.name for path in (out / "0-nano").iterdir()) == ["00.png", "01.png"]
    assert np.array_equal(pixels(out / "grid.png")[-64:, -64:], pixels(out / "0-nano/00.png"))
    html = (out / "index.html").read_text(encoding="utf-8")
    assert (html.count("<figure>"), html.count("data:image/png")) == (1, 1)


def test_each_scheduler_gives_a_different_image(model: Path, prompts: Path, tmp_path: Path) -> None:
    short = tmp_path / "one.txt"
    short.write_text(f"{PROMPTS.splitlines()[0]} --steps 3")
    drawn = {}
    for scheduler in SCHEDULERS:
        out = tmp_path / scheduler
        options = ("--prompts", short, "--out", out, "--scheduler", scheduler, *FLAGS)
        assert train("sample", model, *options) == 0
        drawn[scheduler] = pixels(out / "0-nano" / "00.png").tobytes()
        assert f"Sampler: {SCHEDULERS[scheduler][0]}," in told(out / "0-nano/00.png")["parameters"]
    assert len(set(drawn.values())) == len(SCHEDULERS)


def test_values_that_would_end_early_are_quoted() -> None:
    picture = Picture("x", "", 1, 2, 7.5, 64, 64)
    assert picture.parameters('a, "b"').endswith('Model: "a, \\"b\\""')


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere",), "no model nowhere"),
        ((), "no model is given"),
        (("nowhere", "--device", "cuda"), "--device cuda"),
    ],
)
def test_bad_models_are_refused_before_anything_is_written(
    prompts: Path, tmp_path: Path, capsys: Out, words: tuple[str, ...], told: str
) -> None:
    if "--device" in words and torch.cuda.is_available():
        pytest.skip("there is a card")
    assert train("sample", *words, "--prompts", prompts, "--out", tmp_path / "out") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
