"""Each option of training has an effect, on what a run writes or in another test."""

import hashlib
import json
from dataclasses import fields
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import files, metrics, spawn, train
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

# option -> (its value, other options that it needs, what it changes)
CHANGES: dict[str, tuple[object, dict[str, object], str]] = {
    "phase": ("unet", {}, "weights"),
    "train": ("text_encoder.embeddings", {}, "weights"),
    "reinit": ("unet.conv_in", UNET, "weights"),
    "batch": (3, {}, "weights"),
    "accum": (2, {}, "weights"),
    "memory": ("cheap", {}, "plan"),
    "micro_batch": (1, {"--memory": "plain"}, "plan"),
    "attention": ("exact", {}, "precision"),
    "vram": (2, {}, "plan"),
    "momentum": ("streamed", {}, "plan"),
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
_LOCATE, _CAPTIONS = "weights/test_locate.py", "data/test_captions.py"
_ALL_OF_CAPTIONS = (
    f"{_CAPTIONS}::test_a_run_with_everything_random_about_captions_resumes_to_the_bit"
)
_RATES = "training/test_loop.py::test_rate_options_act_and_a_stop_step_changes_no_rate"
_AS_ASKED = "config/test_options.py::test_channels_last_and_determinism_are_as_asked"
_MEASURED = "memory/test_measure.py"
_EVENTS = "progress/test_events.py"
ELSEWHERE = {
    "channels_last": _AS_ASKED,
    "compile": "step/test_compile.py::test_a_resumed_run_has_the_same_bits",
    "deterministic": _AS_ASKED,
    "data": "data/test_mixture.py::"
    "test_a_run_on_two_stores_says_what_it_uses_and_resumes_as_the_stores_were",
    "model": "model/test_bundle.py::test_a_checkpoint_of_ours_is_a_model",
    "model_ema": f"{_LOCATE}::test_moving_averages_are_taken_when_asked_for",
    "unet": f"{_LOCATE}::test_a_unet_replaces_the_models",
    "text_encoder": f"{_LOCATE}::test_a_text_encoder_replaces_the_models",
    "tokenizer": f"{_LOCATE}::test_training_begins_from_a_single_file_and_resumes",
    "vae": "model/test_bundle.py::test_another_vae_is_refused_unless_the_stores_is_swapped_in",
    "out": "checkpoints/test_run_folder.py::test_the_folder_tells_everything_about_the_run",
    "threads": "checkpoints/test_run_folder.py::test_the_folder_tells_everything_about_the_run",
    "force": "checkpoints/test_run_folder.py::test_force_goes_on_and_says_what_differs",
    "d_max": _RATES,
    "d_growth": _RATES,
    "caption": _ALL_OF_CAPTIONS,
    "tags": _ALL_OF_CAPTIONS,
    "underscores_to_spaces": _ALL_OF_CAPTIONS,
    "remeasure": f"{_MEASURED}::test_a_measured_run_is_that_of_its_flags_and_resumes_as_such",
    "measure": f"{_MEASURED}::test_nothing_is_measured_that_is_not_to_be",
    "on_event": f"{_EVENTS}::test_a_run_tells_each_event_with_its_paths",
    "log_with": "progress/test_wandb_run.py::"
    "test_a_run_that_was_stopped_goes_on_in_the_same_run_of_wandb",
    "device": "config/test_train.py::test_impossible_options_are_one_sentence",
    "recipe": "config/test_recipes.py::test_each_trains",
    "quiet": "progress/test_status.py::test_without_a_terminal_each_result_is_a_line",
    "json": "progress/test_status.py::test_json_is_one_event_a_line",
}
COLLECT = ("--collect-only", "--assert=plain", "-m", "")


def test_every_option_is_covered() -> None:
    assert CHANGES.keys().isdisjoint(ELSEWHERE)
    assert CHANGES.keys() | ELSEWHERE.keys() == {field.name for field in fields(TrainConfig)}


def test_the_tests_elsewhere_exist(tmp_path: Path) -> None:
    """pytest collects each of them, in a process that has imported what they need."""
    tests = Path(__file__).parents[1]
    ids = [str(tests / test) for test in dict.fromkeys(ELSEWHERE.values())]
    process = spawn(pytest.main, [*COLLECT, *ids], log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()


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
