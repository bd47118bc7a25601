import subprocess
import sys
from dataclasses import fields

import pytest

from tests.support import train
from xlsd_train.cli import COMMANDS, main

# and `rates`, which the command line calls --lr
POSITIONAL = {"checkpoint", "out", "models", "store", "run", "runs", "rates"}
Out = pytest.CaptureFixture[str]


def help_of(*words: str, capsys: Out) -> str:
    with pytest.raises(SystemExit) as exit_code:
        main([*words, "--help"])
    assert exit_code.value.code == 0
    return capsys.readouterr().out


def test_without_a_command_it_trains(capsys: Out) -> None:
    plain, named = help_of(capsys=capsys), help_of("run", capsys=capsys)
    assert "Train the UNet, the text encoder, or both" in plain
    assert named.replace("xlsd-train run", "xlsd-train") == plain
    assert train("run", "--phase", "te", "--batch", 0) == train("--phase", "te", "--batch", 0) == 1
    assert capsys.readouterr().err.count("--batch 0") == 2


def test_help_lists_every_other_command(capsys: Out) -> None:
    listed = help_of(capsys=capsys)
    for name in COMMANDS:
        assert f"xlsd-train {name} " in listed or name == "run"


def test_an_unknown_command_exits_non_zero() -> None:
    with pytest.raises(SystemExit) as exit_code:
        train("nothing")
    assert exit_code.value.code == 2


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_each_commands_help_teaches_every_option(name: str, capsys: Out) -> None:
    shown = help_of(name, capsys=capsys)
    for field in fields(COMMANDS[name][0]):
        option = f"--{field.name.replace('_', '-')}"
        assert option in shown or field.name in POSITIONAL


def test_options_are_read_without_waiting_for_torch() -> None:
    """The help of a command, and a mistake in its options, take no seconds of loading libraries."""
    code = "import sys, xlsd_train.cli; assert not {'torch', 'diffusers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
