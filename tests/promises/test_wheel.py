"""The wheel alone, without the checkout, runs README's five commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pip(*args: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, args), "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the two packages, unpacked from a wheel of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # setuptools writes into what it builds
    sources.mkdir()
    names = ["pyproject.toml", "README.md", "LICENSE", "xlsd_cache", "xlsd_train"]
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(sources)], check=True)
    pip("wheel", sources, "--no-build-isolation", "--wheel-dir", folder)
    (wheel,) = folder.glob("xlsd-*.whl")
    pip("install", wheel, "--target", folder / "site")
    return folder / "site"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command of the installed wheel in an empty folder; what it prints."""

    def run(program: str, *args: object) -> str:
        command = [sys.executable, str(installed / "bin" / program), *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_five_commands(
    run: Callable[..., str], photos: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    sums = run("xlsd-cache", "build", photos, "--vae", model / "vae", "--resolution", 64)
    assert "8 scanned = 8 encoded" in sums
    run(
        "xlsd-train", "--recipe", "phase1-unet", "--model", model, "--batch", 2, "--steps", 1,
        "--sample-every", 0, "--validate-every", 0, "--out", "runs/phase1",
    )  # fmt: skip
    run("xlsd-train", "report", "runs/phase1")
    assert (tmp_path / "runs/phase1/report.html").exists()
    run(
        "xlsd-train", "sample", "runs/phase1", "--prompts", "prompts.txt", "--steps", 1,
        "--size", "64x64", "--out", "samples",
    )  # fmt: skip
    assert (tmp_path / "samples/grid.png").exists()
    run("xlsd-train", "export", "runs/phase1", "phase1.safetensors", "--format", "single-file")
    assert (tmp_path / "phase1.safetensors").stat().st_size > 10**6


def test_modules_come_from_the_wheel(installed: Path, run: Callable[..., str]) -> None:
    assert (installed / "xlsd_cache/runtime/cudnn_engines.json").exists()
    assert (installed / "xlsd_cache/pages/built/page.js").exists()
    assert not list(installed.glob("web")) + list(installed.rglob("node_modules"))
    assert "phase1-unet" in run("xlsd-train", "recipes")
    look = "import xlsd_cache.cli, xlsd_train.cli; print(xlsd_cache.__file__, xlsd_train.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        str(installed / "xlsd_cache/__init__.py"),
        str(installed / "xlsd_train/__init__.py"),
    ]
