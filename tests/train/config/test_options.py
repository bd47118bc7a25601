"""No dead flags: each option of training changes what a run leaves, or a named test sees it act."""

import hashlib
import json
from dataclasses import fields
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import files, metrics, train
from tests.support.sessions import Open
from xlsd_train.config.train import TrainConfig

Words = tuple[object, ...]

BASE: dict[str, object] = {
    "--phase": "te", "--batch": 2, "--steps": 2, "--sample-every": 0, "--lr": 1e-3, "--warmup": 0,
    "--threads": 1,
}  # fmt: skip
SAMPLES: dict[str, object] = {"--sample-every": 1, "--sample-steps": 2, "--steps": 1}
MEASURES: dict[str, object] = {"--validate-every": 1, "--validation-fraction": 0.4}
AVERAGES: dict[str, object] = {"--ema": True, "--steps": 4, "--save-every": 1}
UNET: dict[str, object] = {"--phase": "unet"}

# option -> (its value, what it needs beside it, what it changes)
CHANGES: dict[str, tuple[object, dict[str, object], str]] = {
    "phase": ("unet", {}, "weights"),
    "train": ("text_encoder.embeddings", {}, "weights"),
    "reinit": ("unet.conv_in", UNET, "weights"),
    "batch": (3, {}, "weights"),
    "accum": (2, {}, "weights"),
    "memory": ("cheap", {}, "plan"),
    "micro_batch": (1, {"--memory": "plain"}, "plan"),
    "vram": (2, {}, "plan"),
    "epochs": (1, {"--steps": None}, "length"),
    "steps": (3, {}, "length"),
    "stop_after": (1, {}, "files"),
    "lr": (2e-3, {}, "weights"),
    "warmup": (2, {}, "weights"),
    "scheduler": ("linear", {}, "weights"),
    "lr_floor": (5e-4, {"--scheduler": "linear"}, "weights"),
    "optimizer": ("adamw", {}, "weights"),
    "betas": ((0.5, 0.99), {"--steps": 3}, "weights"),
    "weight_decay": (0.1, {}, "weights"),
    "precision": ("bf16", {}, "precision"),
    "require_tags": ("solo", {}, "weights"),
    "forbid_tags": ("solo", {}, "weights"),
    "drop_tags": ("solo", {}, "weights"),
    "shuffle": ("tags", {}, "weights"),
    "keep_first": (2, {"--shuffle": "tags"}, "weights"),
    "tag_dropout": (0.5, {}, "weights"),
    "max_tags": (1, {}, "weights"),
    "caption_dropout": (0.9, {}, "weights"),
    "tokens": (248, {}, "weights"),
    "clip_skip": (1, {}, "weights"),
    "objective": ("flow", {}, "weights"),
    "loss_weight": ("debiased", {}, "weights"),
    "min_snr_gamma": (0.01, {"--loss-weight": "min-snr"}, "weights"),
    "noise_offset": (0.3, {}, "weights"),
    "timesteps": ("stratified", {}, "weights"),
    "normalize_latents": (True, {}, "weights"),
    "sample_every": (2, {}, "samples"),
    "sample_prompts": ("{prompts}", SAMPLES, "samples"),
    "sample_steps": (3, SAMPLES, "samples"),
    "sample_guidance": (1.5, SAMPLES, "samples"),
    "validate_every": (1, {"--validation-fraction": 0.4}, "measured"),
    "validation_fraction": (0.3, MEASURES, "measured"),
    "validation_images": (2, MEASURES, "measured"),
    "ema": (True, {}, "files"),
    "ema_every": (2, AVERAGES, "averages"),
    "ema_snapshots": (1, AVERAGES, "files"),
    "save_every": (1, {}, "files"),
    "keep": (1, {"--save-every": 1}, "files"),
    "seed": (1, {}, "weights"),
    "dry_run": (True, {}, "files"),
}

# What needs other files, another machine or a second run: option -> the test that sees it act.
ELSEWHERE = {
    "channels_last": ("test_options.py", "channels_last=True"),
    "data": ("test_mixture.py", '"--data", f"{store}:2", other'),
    "model": ("test_bundle.py", '"--model"'),
    "model_ema": ("test_locate.py", "ema=True"),
    "unet": ("test_locate.py", "unet="),
    "text_encoder": ("test_locate.py", "text_encoder="),
    "tokenizer": ("test_locate.py", '"--tokenizer"'),
    "vae": ("test_bundle.py", "load_bundle(str(copy), str(model), identity)"),
    "out": ("test_run_folder.py", '"--out"'),
    "d_max": ("test_loop.py", '"--d-max"'),
    "d_growth": ("test_loop.py", '"--d-growth"'),
    "caption": ("test_captions.py", '"--caption"'),
    "device": ("test_train.py", '"--device"'),
    "threads": ("test_run_folder.py", '"--threads"'),
    "tags": ("test_captions.py", '("--tags", None)'),
    "underscores_to_spaces": ("test_captions.py", '("--underscores-to-spaces", None)'),
    "recipe": ("test_recipes.py", '"--recipe"'),
    "deterministic": ("test_options.py", "deterministic=False"),
    "force": ("test_run_folder.py", '"--force"'),
}


def test_no_option_is_left_out() -> None:
    assert CHANGES.keys().isdisjoint(ELSEWHERE)
    assert CHANGES.keys() | ELSEWHERE.keys() == {field.name for field in fields(TrainConfig)}
    for option, (file, words) in ELSEWHERE.items():
        (path,) = (Path(__file__).parents[1]).rglob(file)
        assert words in path.read_text(), option


@pytest.fixture(scope="module")
def run(store: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run leaves, by kind; each run once."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "prompts.txt").write_text("a cup\n")

    @remember
    def left(words: Words) -> dict[str, Any]:
        name = hashlib.sha256(repr(words).encode()).hexdigest()[:12]
        out = folder / name
        given: Words = (
            "--data", store, "--model", model, "--sample-prompts", folder / "prompts.txt"
        )  # fmt: skip
        if "{prompts}" in words:  # another file than that of all others
            words = tuple(folder / "other.txt" if x == "{prompts}" else x for x in words)
            (folder / "other.txt").write_text("a cat\n")
            given = given[:4]
        assert train(*given, *words, "--out", out) == 0
        if not out.exists():
            return {"files": []}
        record = json.loads((out / "config.json").read_text())
        return {
            "files": sorted(str(path.relative_to(out)) for path in _kept(out)),
            "weights": files(out, "checkpoints/*/*.safetensors"),
            "samples": files(out, "samples/step*/*.png"),
            "measured": files(out, "validation/*"),
            "averages": files(out, "ema/*"),
            "plan": (record["batch"], record["plan"], record["memory"]),
            "length": (record["planned_steps"], len(metrics(out))),
            "precision": record["precision"],
            "captions": record["captions"],
        }

    return left


def _kept(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if "tensorboard" not in path.parts]


def _words(options: dict[str, object]) -> Words:
    words: list[object] = []
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [option, *value]
        elif value is not None:
            words += [option, value]
    return tuple(words)


# Of these, tests of what they do see them act as well.
SLOW = {
    "vram", "require_tags", "forbid_tags", "drop_tags", "shuffle", "keep_first", "tag_dropout",
    "max_tags", "caption_dropout", "tokens", "clip_skip", "objective", "loss_weight", "batch",
    "accum", "optimizer", "reinit", "train", "scheduler", "lr_floor",
    "validation_fraction", "validate_every", "epochs",
}  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CHANGES],
)
def test_it_changes_what_a_run_leaves(run: Any, option: str) -> None:
    value, needs, kind = CHANGES[option]
    without = {**BASE, **needs}
    given = {**without, f"--{option.replace('_', '-')}": value}
    assert run(_words(given))[kind] != run(_words(without)).get(kind)


def test_channels_last_and_determinism_are_as_asked(open_run: Open, tmp_path: Path) -> None:
    plain = open_run(channels_last=False, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    backends: Any = torch.backends
    assert backends.cudnn.benchmark  # what it is for
    assert not _channels_last(plain.model.unet)
    asked = open_run(channels_last=True, deterministic=True, out=tmp_path / "asked")
    assert torch.are_deterministic_algorithms_enabled()
    assert not backends.cudnn.benchmark
    assert _channels_last(asked.model.unet)


def _channels_last(unet: torch.nn.Module) -> bool:
    weights = [x for x in unet.parameters() if x.dim() == 4 and min(x.shape[1:3]) > 1]
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in weights)
