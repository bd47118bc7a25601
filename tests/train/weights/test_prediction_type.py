"""The prediction type is read by every convention in use; a warning where two disagree."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import train
from xlsd_train.config import sd15
from xlsd_train.export.ldm_file import marks
from xlsd_train.weights.locate import locate_model
from xlsd_train.weights.parts import CONFIGS
from xlsd_train.weights.prediction_type import has_zero_snr, prediction_type, scheduler_for

Out = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
V = scheduler_for("v", sd15.SCHEDULER)
PLAIN_V = {**sd15.SCHEDULER, "prediction_type": "v_prediction"}
FLOW = scheduler_for("flow", sd15.SCHEDULER)
EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def bare(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small model's single file without a word on what it predicts: tensors and header."""
    out = tmp_path_factory.mktemp("bare") / "one.safetensors"
    assert train("export", model, out, "--format", "single-file") == 0
    with safe_open(out, "pt") as file:
        header = file.metadata()
    configs = json.loads(header[CONFIGS])
    del configs["scheduler"]
    return {"tensors": load_file(out), "header": {CONFIGS: json.dumps(configs)}}


@pytest.fixture
def written(bare: dict[str, Any], tmp_path: Path) -> Any:
    """Write a single file that says this much."""

    def write(*keys: str, yaml: str | None = None, **header: str) -> Path:
        path = tmp_path / "theirs.v1.safetensors"
        named = {name.replace("__", "."): value for name, value in header.items()}
        tensors = {**bare["tensors"], **dict.fromkeys(keys, EMPTY)}
        save_file(
            {name: x.clone() for name, x in tensors.items()}, path, {**bare["header"], **named}
        )
        if yaml is not None:
            (tmp_path / "theirs.v1.yaml").write_text(yaml)
        return path

    return write


def with_scheduler(model: Path, out: Path, scheduler: dict[str, Any]) -> Path:
    """The small model, whose folder says what it predicts."""
    shutil.copytree(model, out)
    (out / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return out


def says(path: Path) -> tuple[str, bool]:
    scheduler = locate_model(str(path)).scheduler
    return prediction_type(scheduler), has_zero_snr(scheduler)


YAML = "model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: 'v'\n"
SGM = (
    "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n"
    "          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n"
)


@pytest.mark.parametrize(
    ("keys", "header", "yaml", "wanted"),
    [
        ((), {}, None, ("epsilon", False)),
        (("v_pred",), {}, None, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, None, ("v_prediction", True)),
        ((), {"modelspec__prediction_type": "v"}, None, ("v_prediction", False)),
        ((), {"modelspec__prediction_type": "V-Prediction"}, None, ("v_prediction", False)),
        ((), {"modelspec__prediction_type": "flow_prediction"}, None, ("flow_prediction", False)),
        ((), {"modelspec__prediction_type": "epsilon"}, None, ("epsilon", False)),
        ((), {"ss_v_parameterization": "True"}, None, ("v_prediction", False)),
        (
            (),
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            None,
            ("v_prediction", True),
        ),
        ((), {"ss_v_parameterization": "None"}, None, ("epsilon", False)),
        ((), {}, YAML, ("v_prediction", False)),
        ((), {}, "\ufeff" + YAML, ("v_prediction", False)),
        (("ztsnr",), {}, YAML, ("v_prediction", True)),
        ((), {}, SGM, ("v_prediction", False)),
        ((), {}, "model:\n  params:\n    channels: 4\n", ("epsilon", False)),
        ((), {}, "", ("epsilon", False)),
    ],
)
def test_every_convention_is_believed(
    written: Any, caplog: Log, keys: Any, header: Any, yaml: str | None, wanted: tuple[str, bool]
) -> None:
    assert says(written(*keys, yaml=yaml, **header)) == wanted
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("keys", "header", "yaml", "wanted", "told"),
    [
        (
            ("v_pred",),
            {"modelspec__prediction_type": "epsilon"},
            None,
            ("v_prediction", False),
            "modelspec.prediction_type epsilon: using the first; to override, put theirs.v1.yaml",
        ),
        (
            ("v_pred", "ztsnr"),
            {},
            YAML.replace("'v'", "eps"),
            ("epsilon", False),
            "theirs.v1.yaml says epsilon and its key v_pred v_prediction: using the first",
        ),
        (
            ("v_pred", "ztsnr"),
            {"ss_zero_terminal_snr": "False"},
            None,
            ("v_prediction", True),
            "its zero terminal SNR: its key v_pred says True and ss_zero_terminal_snr False",
        ),
        (
            (),
            {"modelspec__prediction_type": "quaternion"},
            None,
            ("epsilon", False),
            "unknown prediction type 'quaternion'",
        ),
    ],
)
def test_what_disagrees_or_is_unknown_is_said(
    written: Any, caplog: Log, keys: Any, header: Any, yaml: Any, wanted: Any, told: str
) -> None:
    assert says(written(*keys, yaml=yaml, **header)) == wanted
    (line,) = caplog.messages
    assert told in line


def test_a_yaml_that_is_none_is_one_sentence(written: Any, tmp_path: Path, capsys: Out) -> None:
    path = written(yaml="model: [")
    assert train("export", path, tmp_path / "out", "--tokenizer", tmp_path) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "theirs.v1.yaml, which gives the prediction type of the model" in line


def test_the_folder_around_a_file_counts_where_the_file_says_nothing(
    written: Any, model: Path, tmp_path: Path, caplog: Log
) -> None:
    folder = with_scheduler(model, tmp_path / "pipeline", V)
    path = written()
    inside = Path(shutil.copy(path, folder))
    assert says(inside) == ("v_prediction", True)
    assert locate_model(str(inside)).scheduler == V
    assert caplog.text == ""
    shutil.copy(written(modelspec__prediction_type="epsilon"), folder)
    assert says(inside) == ("epsilon", False)  # the file's own word before its neighbours'
    assert "scheduler/ next to it v_prediction: using the first" in caplog.text


def test_an_old_export_of_v_is_known_by_the_schedule_it_holds(
    bare: dict[str, Any], tmp_path: Path
) -> None:
    """Where another program kept the tensors and of the header only modelspec's part."""
    tensors = {name: value.clone() for name, value in bare["tensors"].items()}
    tensors["alphas_cumprod"][-1] = 0
    path = tmp_path / "old.safetensors"
    save_file(tensors, path, {**bare["header"], "modelspec.prediction_type": "v"})
    assert says(path) == ("v_prediction", True)


@pytest.mark.parametrize("scheduler", [V, PLAIN_V, FLOW, sd15.SCHEDULER])
def test_what_our_files_say_is_read_back(
    bare: dict[str, Any], tmp_path: Path, scheduler: dict[str, Any], caplog: Log
) -> None:
    """By the configs in the header, or by the tensors' names where no header is left."""
    configs = {**json.loads(bare["header"][CONFIGS]), "scheduler": scheduler}
    tensors = {name: x.clone() for name, x in bare["tensors"].items()} | marks(scheduler)
    path = tmp_path / "one.safetensors"
    save_file(tensors, path, {CONFIGS: json.dumps(configs)})
    assert locate_model(str(path)).scheduler == scheduler
    save_file(tensors, path, bare["header"])
    if prediction_type(scheduler) != "flow_prediction":
        assert says(path) == (prediction_type(scheduler), has_zero_snr(scheduler))
    assert caplog.text == ""


def test_another_unet_brings_what_it_predicts(
    written: Any, model: Path, tmp_path: Path, caplog: Log
) -> None:
    theirs = with_scheduler(model, tmp_path / "v", V)
    for unet in (theirs, theirs / "unet", theirs / "unet/diffusion_pytorch_model.safetensors"):
        assert locate_model(str(model), unet=str(unet)).scheduler == V
        assert f"the UNet {unet} predicts v_prediction and {model} epsilon" in caplog.text
        caplog.clear()
    file = written("v_pred", "ztsnr")
    assert prediction_type(locate_model(str(model), unet=str(file)).scheduler) == "v_prediction"
    caplog.clear()
    silent = tmp_path / "alone.safetensors"
    shutil.copy(model / "unet/diffusion_pytorch_model.safetensors", silent)
    assert locate_model(str(theirs), unet=str(silent)).scheduler == V  # of itself it says nothing
    assert caplog.text == ""
