import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import files
from tests.train.conftest import Open
from xlsd_cache import UserError
from xlsd_cache.store import LatentStore
from xlsd_train.captions import Columns
from xlsd_train.sample import read_prompts, sample_size
from xlsd_train.selection import selected


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
        assert image.size == (4 * 128, 10 * (128 + 16))  # of 13 steps ten, first and last too
        shown = np.asarray(image)
    with Image.open(tmp_path / "samples/step-00000012/03.png") as last:
        assert np.array_equal(shown[-128:, -128:], np.asarray(last))


def test_prompts_come_from_the_file_or_from_the_store(store: Path, tmp_path: Path) -> None:
    path, txt = tmp_path / "prompts.txt", Columns(("txt",), (1.0,))
    path.write_text("\ufeffa cat\n\n  a rocket  \n", encoding="utf-8")
    with LatentStore.open(store) as ours:
        every = selected(ours, np.ones(len(ours), np.bool_))
        assert read_prompts(path, ours, every, txt, None, 0) == ["a cat", "a rocket"]
        drawn = read_prompts(None, ours, every, txt, None, 0)
        assert len(set(drawn)) == 4
        assert set(drawn) <= set(ours.samples["txt"].to_pylist())
        assert read_prompts(None, ours, every, txt, None, 0) == drawn
        assert sample_size(every.sizes) == (128, 128)
        path.write_text("\n")
        with pytest.raises(UserError, match="is empty"):
            read_prompts(path, ours, every, txt, None, 0)
        with pytest.raises(UserError, match="cannot read --sample-prompts"):
            read_prompts(tmp_path / "gone", ours, every, txt, None, 0)
