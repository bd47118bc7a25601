import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from tests.support import train
from xlsd_cache.console.option_checks import Within, leaves
from xlsd_cache.errors import UserError
from xlsd_train.config.inputs import CaptionOptions
from xlsd_train.config.optimization import OptimizerOptions
from xlsd_train.config.train import FREE, TrainConfig


def test_defaults_are_the_articles() -> None:
    te = TrainConfig(phase="te").resolved()
    assert (te.lr, te.epochs, te.steps, te.batch) == (3e-6, 3.0, None, 32)
    unet = TrainConfig(phase="unet").resolved()
    assert (unet.steps, unet.epochs, unet.precision, unet.optimizer) == (
        1_000_000, None, "fp32", "lion"
    )  # fmt: skip
    assert TrainConfig(phase="unet", epochs=2).resolved().steps is None
    dlion = TrainConfig(phase="unet", optimizer="dlion").resolved()
    assert (dlion.lr, dlion.betas) == (1.0, (0.9, 0.999))


def test_what_may_differ_on_a_resume_are_fields() -> None:
    assert {field.name for field in fields(TrainConfig)} > FREE


def test_config_json_keeps_its_flat_order_whatever_the_groups() -> None:
    written = list(TrainConfig("te").to_json())
    assert sorted(written) == sorted(field.name for field in fields(TrainConfig))
    assert written[:6] == ["phase", "recipe", "train", "reinit", "batch", "accum"]
    assert written[65:68] == ["deterministic", "force", "dry_run"]  # the last in earlier versions


def test_groups_check_themselves() -> None:
    with pytest.raises(UserError, match="--batch 0"):
        OptimizerOptions(batch=0)
    with pytest.raises(UserError, match="--ema-every 2 does nothing without --ema"):
        OptimizerOptions(ema_every=2)
    assert CaptionOptions(max_tags=3).caption_edits()


def test_the_least_d_max_is_where_d_begins() -> None:
    from xlsd_train.optim.lion import D0

    hint = get_type_hints(OptimizerOptions, include_extras=True)["d_max"]
    assert [notes for _, notes in leaves(hint)] == [(Within(D0, 1, above=True),)]


def test_help_teaches_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xlsd_train", "--help"], capture_output=True, text=True, check=True
    )
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batch", 0), "--batch 0"),
        (("--accum", 0), "--accum 0"),
        (("--steps", 0), "--steps 0"),
        (("--stop-after", 0), "--stop-after 0"),
        (("--steps", 5, "--epochs", 1), "--steps 5 and --epochs 1"),
        (("--epochs", 0), "--epochs 0"),
        (("--lr", 0), "--lr 0"),
        (("--lr", "nan"), "--lr nan"),
        (("--lr", 1), "--lr 1 is no learning rate for --optimizer lion; leave it out, or give"),
        (("--lr", 1e-11), "--lr 1e-11 is no learning rate for --optimizer lion"),
        (("--lr", 1, "--optimizer", "adamw"), "--lr 1 is no learning rate for --optimizer adamw"),
        (("--lr", 4e-6, "--optimizer", "dlion"), "--lr 4e-06 is a factor of the learning rate"),
        (("--lr", 1e-4, "--optimizer", "dlion"), "leave it out, or give 0.01 to 100"),
        (("--lr", 101, "--optimizer", "dlion"), "--lr 101 is a factor of the learning rate"),
        (("--recipe", "phase1-unet", "--phase", "unet", "--lr", 4e-6), "--lr 4e-06 is a factor"),
        (("--lr-floor", 1e-5, "--scheduler", "linear"), "--lr-floor 1e-05 is not below --lr 3e-06"),
        (("--caption-dropout", 2), "--caption-dropout 2"),
        (("--betas", 0.9, 1), "--betas"),
        (("--keep", -1), "--keep -1"),
        (("--clip-skip", -1), "--clip-skip -1"),
        (("--max-tags", 0), "--max-tags 0"),
        (("--keep-first", -1), "--keep-first -1"),
        (("--keep-first", 1), "--keep-first 1 has no effect"),
        (("--tag-dropout", -0.1), "--tag-dropout -0.1"),
        (("--drop-tags", ","), "--drop-tags ',' has no tags"),
        (("--require-tags", "a", "--forbid-tags", "a"), "both contain 'a'"),
        (("--shuffle", "sentences", "--max-tags", 9), "does not go with --max-tags"),
        (("--shuffle", "sentences", "--tags"), "does not go with --tags"),
        (("--shuffle", "sentences", "--tag-dropout", 0.1), "does not go with --tag-dropout"),
        (("--weight-decay", -1), "--weight-decay -1"),
        (
            ("--momentum", "streamed", "--optimizer", "adamw"),
            "--momentum streamed is for --optimizer lion and dlion, not adamw; leave it out",
        ),
        (("--d-max", 1e-5), "--d-max is for --optimizer dlion, not lion"),
        (
            ("--d-growth", 2, "--optimizer", "adamw"),
            "--d-growth is for --optimizer dlion, not adamw",
        ),
        (("--lr-floor", 1e-6), "--lr-floor 1e-06 is never reached by a constant rate"),
        (("--lr-floor", 3e-6, "--scheduler", "rex"), "--lr-floor 3e-06 is not below --lr 3e-06"),
        (("--lr-floor", -1, "--scheduler", "linear"), "--lr-floor -1 is less than 0"),
        (("--train", ","), "--train ',' is empty"),
        (("--train", "unet.attn2"), "--train unet.attn2 is in a network that --phase te"),
        (("--reinit", "unet.conv_in"), "--reinit unet.conv_in is in a network that --phase te"),
        (("--phase", "both", "--train", "unet.attn2"), "use --phase unet"),
        (("--reinit", "text_encoder"), "--reinit text_encoder is part of the text encoder"),
        (("--d-max", 1e-7, "--optimizer", "dlion"), "--d-max 1e-07 is not above 1e-06"),
        (("--d-growth", 1, "--optimizer", "dlion"), "--d-growth 1 is not above 1"),
        (("--data", "nowhere"), "no latent store in nowhere"),
        (("--device", "cuda"), "--device cuda"),
        (("--attention", "exact", "--precision", "tf32"), "--attention exact computes in fp32"),
        (("--objective", "flow", "--loss-weight", "min-snr"), "--loss-weight min-snr is defined"),
        (("--objective", "v", "--loss-weight", "debiased"), "--loss-weight debiased is defined"),
        (("--min-snr-gamma", 3), "--min-snr-gamma 3 does nothing with --loss-weight none"),
        (("--loss-weight", "min-snr", "--min-snr-gamma", 0), "--min-snr-gamma 0"),
        (("--ema-every", 2), "--ema-every 2 does nothing without --ema"),
        (("--ema-snapshots", 2), "--ema-snapshots 2 does nothing without --ema"),
        (("--ema", "--ema-every", 0), "--ema-every 0"),
        (("--noise-offset", -1), "--noise-offset -1"),
        (("--noise-offset", "nan"), "--noise-offset nan"),
    ],
)
def test_impossible_options_are_one_sentence(
    options: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    if "--device" in options and torch.cuda.is_available():
        pytest.skip("there is a card")
    first = ("--phase", "te") * ("--recipe" not in options)
    assert train(*first, "--out", tmp_path / "run", *options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("xlsd-train: ")
    assert told in line
    assert not (tmp_path / "run").exists()


def test_unknown_phases_and_options_exit_non_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        train()
    assert exit_code.value.code == 2
    capsys.readouterr()
    for words in (("--phase", "vae"), ("--phase", "te", "--nothing"), ("nothing",)):
        assert train(*words) == 1
        assert words[-1] in capsys.readouterr().err
