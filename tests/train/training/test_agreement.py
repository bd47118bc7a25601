"""Processes with files of their own, as on several machines: a difference is refused at once."""

import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.support import cache, files, metrics, together, train

Arguments = list[object]


def of_rank(folder: Path, *words: object) -> int:
    """A run in `folder`/RANK, in whose words RANK stands for the process's number."""
    (folder / os.environ["RANK"]).mkdir(exist_ok=True)
    os.chdir(folder / os.environ["RANK"])
    return train(*(str(word).replace("RANK", os.environ["RANK"]) for word in words))


def last_words(log: Path, *words: object, code: int) -> list[str]:
    """The last message of each of two processes, which must end with this code."""
    both = together(2, of_rank, log.parent, *words, log=log)
    for rank, process in enumerate(both):
        process.join(100)
        assert process.exitcode == code, log.with_suffix(f".{rank}").read_text()
    return [
        log.with_suffix(f".{rank}").read_text().rpartition("xlsd-train: ")[2] for rank in (0, 1)
    ]


def replaced(words: Arguments, option: str, value: object) -> Arguments:
    at = words.index(option) + 1
    return [*words[:at], value, *words[at + 1 :]]


def test_other_options_are_refused(arguments: Arguments, tmp_path: Path) -> None:
    """Also those that change no weight: they say when all processes must meet."""
    ends = last_words(tmp_path / "log", *replaced(arguments, "--save-every", "1RANK"), code=1)
    assert ends[0] == ends[1]
    assert ends[0].startswith("process 1 on ")
    assert " has --save-every 11, and process 0 on " in ends[0]
    assert ends[0].endswith(" has --save-every 10; use the same command on all machines\n")
    assert not (tmp_path / "run").exists()


def test_another_copy_of_the_store_is_refused(
    arguments: Arguments, store: Path, photos: Path, tmp_path: Path
) -> None:
    for rank in (0, 1):
        shutil.copytree(store, tmp_path / f"store{rank}")
    (tmp_path / photos.name).mkdir()
    some = min(photos.glob("*.txt"))
    (tmp_path / photos.name / some.name).write_text("another caption")
    assert (
        cache("captions", tmp_path / "store1", "--from", tmp_path / photos.name, "--columns", "txt")
        == 0
    )
    ends = last_words(
        tmp_path / "log", *replaced(arguments, "--data", tmp_path / "storeRANK"), code=1
    )
    assert ends[0] == ends[1]
    assert " has stores of fingerprint " in ends[0]
    assert "give all machines whole copies of the same store" in ends[0]
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused(arguments: Arguments, model: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        shutil.copytree(model, tmp_path / f"model{rank}")
    (path,) = (tmp_path / "model1/unet").glob("*.safetensors")
    weights = load_file(path)
    weights["conv_in.bias"][0] += 1
    save_file(weights, path)
    given = replaced(arguments, "--model", tmp_path / "modelRANK")
    ends = last_words(tmp_path / "log", *given, code=1)
    assert ends[0] == ends[1]
    assert " has a unet of sha256 " in ends[0]
    assert ends[0].endswith("use the same --model on all machines\n")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_on_one_machine_only_is_copied_to_resume(
    arguments: Arguments, tmp_path: Path
) -> None:
    """Only the first process writes. A resume needs its checkpoint on every machine."""
    zero, one = tmp_path / "0/run", tmp_path / "1/run"
    given = replaced(arguments, "--out", "run")
    last_words(tmp_path / "first", *given, "--stop-after", 3, code=0)
    assert not one.exists()
    ends = last_words(tmp_path / "again", *given, code=1)
    assert ends[0] == ends[1]
    assert " has run not started, and process 0 on " in ends[0]
    assert " has run at step 3; put --out on a disk that all machines share" in ends[0]
    shutil.copytree(zero, one)
    last_words(tmp_path / "copied", *given, code=0)
    last_words(tmp_path / "whole", *replaced(arguments, "--out", "whole"), code=0)
    last = "checkpoints/step-00000006/*"
    assert files(zero, last) == files(tmp_path / "0/whole", last)
    assert metrics(zero) == metrics(tmp_path / "0/whole")
