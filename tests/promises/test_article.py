"""`make article` in small: photos match their tags, and the commands are valid."""

import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo.subjects import BROAD, LEAST, NARROW, crop_around, inside, write_subjects
from xlsd_train.cli import COMMANDS
from xlsd_train.config.recipes import parse
from xlsd_train.config.train import TrainConfig

ROOT = Path(__file__).parents[2]


def test_crops_hold_their_subject_and_have_the_tags_of_what_they_show(tmp_path: Path) -> None:
    write_subjects(tmp_path, NARROW[:1], 8)
    captions = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == len(list(tmp_path.glob("*.jpg"))) == 8
    assert all(caption.startswith("woman, solo, ") for caption in captions)
    assert 0 < sum("helmet" in caption for caption in captions) < 8
    rng = np.random.default_rng(0)
    for subject in NARROW + BROAD:
        for _ in range(50):
            crop = crop_around(subject.core, (512, 400), rng)
            core = [x + (1e-9 if i < 2 else -1e-9) for i, x in enumerate(subject.core)]
            assert inside((core[0], core[1], core[2], core[3]), crop)
            assert (crop[2] - crop[0]) * 512 >= LEAST - 1e-6
            assert 0 <= crop[0] < crop[2] <= 1 + 1e-9


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_its_commands_are_settings_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = subprocess.run(
        ["make", "-n", "article"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = said.replace("\\\n", " ").splitlines()
    monkeypatch.chdir(tmp_path)  # where no article/ was made before
    seen = []
    for line in lines:
        if "/xlsd-train " in line:
            _, *words = shlex.split(line)
            name = words[0] if words[0] in COMMANDS else "run"
            kind = COMMANDS[name].options
            config = parse(kind, words[words[0] == name :], "xlsd-train")
            seen.append(config.recipe if isinstance(config, TrainConfig) else name)
    phases = ["phase1-unet", "phase1-unet", "phase1-te", "phase1-te", "phase2-unet"]
    assert seen == [*phases, "export", "sample"]
