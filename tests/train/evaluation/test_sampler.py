import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import files
from tests.support.sessions import Open
from xlsd_cache.dataset.selection import select
from xlsd_cache.errors import UserError
from xlsd_cache.store.reader import LatentStore
from xlsd_train.config.train import TrainConfig
from xlsd_train.data.captions import CaptionColumns
from xlsd_train.evaluation.images import Picture
from xlsd_train.evaluation.sample_files import own_size
from xlsd_train.evaluation.sampler import read_prompts, sample_size
from xlsd_train.runs.record import EMPTY


def draw(open_run: Open, out: Path, **settings: object) -> dict[str, bytes]:
    session = open_run(out=out, sample_steps=3, **settings)
    session.sampler(session.model, session.run.folder, 7, session.accelerator)
    return files(out, "samples/*/*.png")


def test_samples_are_the_same_every_time_and_say_how_they_were_made(
    open_run: Open, tmp_path: Path
) -> None:
    first = draw(open_run, tmp_path / "a")
    torch.manual_seed(99)  # global random state plays no part
    assert draw(open_run, tmp_path / "b") == first
    assert draw(open_run, tmp_path / "c", seed=1) != first
    assert list(first) == [f"samples/step-00000007/0{i}.png" for i in range(4)]
    with Image.open(tmp_path / "a" / "samples/step-00000007/01.png") as image:
        told = json.loads(image.text["xlsd"])  # type: ignore[attr-defined]
        assert image.size == (128, 128)
    assert told["seed"] == 1
    assert told["steps"] == 3
    assert told["training_step"] == 7
    assert told["prompt"]


def test_sampling_leaves_the_model_as_it_was(open_run: Open, tmp_path: Path) -> None:
    session = open_run()
    parts = (session.model.unet, session.model.text_encoder)
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    state = torch.get_rng_state()
    session.sampler(session.model, tmp_path, 1, session.accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    for part, old in zip(parts, before, strict=True):
        assert part.training
        assert all(torch.equal(value, old[key]) for key, value in part.state_dict().items())
        assert all(value.grad is None for value in part.parameters())


def test_the_grid_has_steps_down_and_prompts_across(open_run: Open, tmp_path: Path) -> None:
    session = open_run(sample_steps=2)
    for step in range(13):
        grid = session.sampler(session.model, tmp_path, step, session.accelerator)
    assert grid
    with Image.open(grid) as image:
        shown = np.asarray(image)
    above = shown.shape[0] - 10 * 128  # of 13 steps ten, first and last too
    assert shown.shape[1] > 4 * 128
    with Image.open(tmp_path / "samples/step-00000000/00.png") as first:
        assert np.array_equal(shown[above : above + 128, -4 * 128 : -3 * 128], np.asarray(first))
    with Image.open(tmp_path / "samples/step-00000012/03.png") as last:
        assert np.array_equal(shown[-128:, -128:], np.asarray(last))


def test_prompts_come_from_the_file_or_from_the_store(store: Path, tmp_path: Path) -> None:
    path, txt = tmp_path / "prompts.txt", CaptionColumns(("txt",), (1.0,))
    config = TrainConfig("unet", sample_steps=3, sample_guidance=2.0, seed=5)
    given = replace(config, sample_prompts=path)
    with LatentStore.open(store) as ours:
        every = select(ours, np.ones(len(ours), np.bool_))
        assert sample_size(every.sizes) == (128, 128)
        drawn = read_prompts(config, ours, every, txt, None)
        assert len({picture.prompt for picture in drawn}) == 4
        assert {picture.prompt for picture in drawn} <= set(ours.samples["txt"].to_pylist())
        assert read_prompts(config, ours, every, txt, None) == drawn
        assert drawn[1] == Picture(drawn[1].prompt, "", 6, 3, 2.0, 128, 128)
        path.write_text("# two\na cat\n\n  a rocket --w 64 --d 9 --n blurry \n")
        pictures = read_prompts(given, ours, every, txt, None)
        assert pictures == [
            Picture("a cat", "", 5, 3, 2.0, 128, 128),
            Picture("a rocket", "blurry", 9, 3, 2.0, 64, 128),
        ]
        path.write_text("\n")
        with pytest.raises(UserError, match="--sample-prompts .* is empty"):
            read_prompts(given, ours, every, txt, None)


def test_a_run_of_an_older_version_keeps_its_samples(store: Path, tmp_path: Path) -> None:
    """It read options and comments as part of the prompt; a changed file is read as today."""
    path, txt = tmp_path / "prompts.txt", CaptionColumns(("txt",), (1.0,))
    config = TrainConfig("unet", sample_prompts=path)
    path.write_text("# first\na cat --seed 5\n")
    before = replace(EMPTY, prompts=["# first", "a cat --seed 5"])
    with LatentStore.open(store) as ours:
        every = select(ours, np.ones(len(ours), np.bool_))
        old = read_prompts(config, ours, every, txt, before)
        assert [(it.prompt, it.seed) for it in old] == [("# first", 0), ("a cat --seed 5", 1)]
        changed, newer = replace(EMPTY, prompts=["a dog"]), replace(before, samples={"size": ""})
        for other in (changed, newer, None):
            (new,) = read_prompts(config, ours, every, txt, other)
            assert (new.prompt, new.seed) == ("a cat", 5)


def test_a_run_draws_each_prompt_as_its_line_says(
    open_run: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xlsd")
    path, out = tmp_path / "prompts.txt", tmp_path / "run"
    long = ", ".join(["a cat on a mat"] * 40)
    path.write_text(f"a (cat:1.2) --d 7 --s 2 --l 3 --w 64 --h 72 --n text\n{long} --size 192x64\n")
    draw(open_run, out, sample_prompts=path, keep=1)
    truncated = r"prompt 2 has \d{3} tokens and is truncated to the text encoder's 77: "
    assert re.search(truncated, caplog.text)
    assert caplog.text.count("(word:1.2)") == 1
    with Image.open(out / "samples/step-00000007/00.png") as image:
        assert image.size == (64, 72)
        assert image.text["parameters"] == (  # type: ignore[attr-defined]
            "a (cat:1.2)\nNegative prompt: text\n"
            "Steps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 64x72"
        )
    with Image.open(out / "samples/step-00000007/01.png") as image:
        assert image.size == (192, 64)
    with Image.open(out / "samples/grid.png") as image:
        assert image.width > 2 * 192
        assert image.height > 2 * 72
    record = json.loads((out / "config.json").read_bytes())
    assert record["prompts"] == ["a (cat:1.2)", long]
    assert record["samples"]["size"] == "128x128"
    assert record["samples"]["pictures"][0]["seed"] == 7
    assert own_size(str(out)) == own_size(str(out / "checkpoints/step-00000001")) == "128x128"


def test_an_older_runs_sample_size_is_read_from_its_samples(tmp_path: Path) -> None:
    record = {"command": [], "config": {}, "stores": [], "settings": {}, "planned_steps": 1}
    (tmp_path / "run/samples/step-00000000").mkdir(parents=True)
    Image.new("RGB", (192, 64)).save(tmp_path / "run/samples/step-00000000/00.png")
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    assert own_size(str(tmp_path / "run")) == "192x64"
    assert own_size(str(tmp_path)) is None
    assert own_size("org/name") is None
