"""The guide's job array, as far as a shell without SLURM can run it: each task is a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cache, files, last_error, write_images

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_tasks_of_the_array_encode_all_units(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"), [f"{i}.png" for i in range(10)], width=64, height=64)
    options = ("--vae", vae, "--resolution", 64, "--rows-per-shard", 2, "--batch", 1)
    assert cache("build", "photos", "--out", "whole", *options) == 0
    assert cache("plan", "photos", "--out", "latents", *options) == 0
    page = (ROOT / "docs" / "guides" / "several-machines.md").read_text()
    (script,) = re.findall(
        r"^```bash\n(#!/bin/bash\n#SBATCH .*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    Path("encode.sh").write_text(script)
    program = tmp_path / "bin" / "xlsd-cache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m xlsd_cache "$@"\n')
    program.chmod(0o755)
    here = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    tasks = []
    for number in range(2):
        task = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        environment = {**os.environ, **here, **task, "OMP_NUM_THREADS": "1"}
        assert cache("finish", "latents") == 1
        assert f"{5 if number == 0 else 2} units are not encoded yet" in last_error(capsys)
        done = subprocess.run(
            ["bash", "encode.sh"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tasks.append(re.findall(r"^(64x64\.\d) encoded: 2 images", done.stdout, re.MULTILINE))
    assert [len(task) for task in tasks] == [3, 2]
    assert sorted(tasks[0] + tasks[1]) == [f"64x64.{number}" for number in range(5)]
    assert cache("finish", "latents") == 0
    ours = files(tmp_path / "latents", "latents.zarr/**/*")
    assert ours == files(tmp_path / "whole", "latents.zarr/**/*")
