"""Hub repositories come from the cache or the network; otherwise one error within seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import cache
from tests.support.hub import serving, silent
from xlsd_cache.encoding.hub import nearest_path, repository_of
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
At = Callable[[str], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> At:
    """Sets the hub's address; in an empty folder, with an empty cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("xlsd_cache.encoding.hub.ANSWER_S", 0.3)

    def set_(endpoint: str) -> None:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return set_


def why(spec: str) -> str:
    with pytest.raises(UserError) as error:
        load_vae(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("spec", ["sdxl", "stabilityai/sdxl-vae"])
def test_a_hub_that_is_not_there_is_told_with_what_to_give_instead(at: At, spec: str) -> None:
    with silent() as endpoint:
        at(endpoint)
        told = why(spec)
        assert told.startswith(f"cannot fetch stabilityai/sdxl-vae from {endpoint}")
        assert "cannot be reached" in told
    at(endpoint)  # refuses connections now
    assert "cannot be reached" in why(spec)
    at("http://no-such-host.invalid")
    told = why(spec)
    assert "http://no-such-host.invalid: it cannot be reached" in told
    assert "give a folder with config.json and its weights, or a .safetensors file, as" in told


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, "no such repository (404)"),
        (401, "does not exist, or is private or gated"),
        (403, "does not exist, or is private or gated"),
        (429, "answers with error 429"),
        (500, "answers with error 500"),
        (503, "answers with error 503"),
    ],
)
def test_what_the_hub_answers_is_told_as_it_is(
    at: At, tmp_path: Path, status: int, told: str
) -> None:
    with serving(tmp_path, status) as (endpoint, asked):
        at(endpoint)
        assert told in why("org/vae")
        assert asked.count("api/models/org/vae") == 1  # and not asked again and again


def test_a_vae_is_fetched_once_and_then_read_without_the_network(
    at: At, vae: Path, tmp_path: Path
) -> None:
    shutil.copytree(vae, tmp_path / "org" / "vae")
    (tmp_path / "org" / "vae" / "pickle.bin").write_bytes(b"not wanted")
    with serving(tmp_path) as (endpoint, asked):
        at(endpoint)
        loaded = load_vae("org/vae")
        assert loaded.source == "org/vae"
        assert loaded.sha256 == load_vae(str(vae)).sha256
        assert not any("pickle" in path for path in asked if "resolve" in path)
        before = len(asked)
        assert load_vae("hf://org/vae").sha256 == loaded.sha256
        assert len(asked) == before
    assert load_vae("org/vae").sha256 == loaded.sha256  # and none is there


def test_a_pipelines_vae_and_old_weights_are_found_too(at: At, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "org" / "pipeline" / "vae")
    shutil.copytree(vae, tmp_path / "org" / "old")
    state = load_file(vae / WEIGHTS)
    torch.save(state, tmp_path / "org" / "old" / "diffusion_pytorch_model.bin")
    (tmp_path / "org" / "old" / WEIGHTS).unlink()
    (tmp_path / "org" / "text").mkdir()
    (tmp_path / "org" / "text" / "config.json").write_text("{}")
    with serving(tmp_path) as (endpoint, _):
        at(endpoint)
        expected = load_vae(str(vae)).sha256
        assert load_vae("org/pipeline").sha256 == expected
        assert load_vae("org/old").sha256 == expected
        assert "org/text holds no VAE" in why("org/text")
    assert load_vae("org/old").sha256 == expected


def test_a_cache_that_lacks_weights_is_not_whole(
    at: At, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--stabilityai--sdxl-vae"
    shutil.copytree(vae, repository / "snapshots" / "1" / "")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_vae("sdxl").source == "stabilityai/sdxl-vae"
    (repository / "snapshots" / "1" / WEIGHTS).unlink()
    told = why("sdxl")
    assert "HF_HUB_OFFLINE is set, and it is not complete in the cache" in told


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("modles/vae", "models/vae"),
        ("Models/vea", "models/vae"),
        ("models/other", None),
        ("models/", None),
        ("vae.safetensors", "vea.safetensors"),
        ("org/vae.safetensors", None),
        ("a/b/c", None),
        ("./org/vae", None),
        ("../org/vae", None),
        ("~/vae", None),
        ("org/vae/", None),
        ("models\\vea", "models/vae"),
        ("C:\\models\\vae", None),
        ("/nowhere/vae", None),
        ("my models/vae", "models/vae"),
        ("$HOME/vae", None),
        ("nothing", None),
    ],
)
def test_a_path_that_is_missing_is_never_sent_to_the_hub(
    at: At, tmp_path: Path, spec: str, found: str | None
) -> None:
    (tmp_path / "here" / "models" / "vae").mkdir(parents=True)
    (tmp_path / "here" / "vea.safetensors").write_bytes(b"")
    if spec == "models/":
        (tmp_path / "here" / "models" / "vae").rmdir()
        (tmp_path / "here" / "models").rmdir()
    with serving(tmp_path) as (endpoint, asked):
        at(endpoint)
        told = why(spec)
        assert not asked
    assert f"{spec}: no such file or directory" in told
    assert ("did you mean" in told) == (found is not None)
    assert found is None or f"did you mean {found}?" in told


@pytest.mark.parametrize(
    "spec", ["org/vae", "madebyollin/sdxl-vae-fp16-fix", "a/stable-diffusion-v1.5", "X_1/y.z-9"]
)
def test_names_of_the_hub_stay_names_of_the_hub(at: At, spec: str) -> None:
    Path("models").mkdir()
    Path("org.txt").write_text("")
    assert repository_of(spec) == spec
    assert repository_of(f"hf://{spec}") == spec
    Path(spec.partition("/")[0]).mkdir()
    assert repository_of(spec) is None
    assert repository_of(f"hf://{spec}") == spec


def test_the_command_line_says_it_before_it_scans_for_long(
    at: At, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at("http://no-such-host.invalid")
    assert cache("build", photos, "--out", "latents", "--vae", "modles/vae/x") == 1
    assert "no VAE modles/vae/x: no such file or directory" in capsys.readouterr().err
    assert cache("build", photos, "--out", "latents") == 1
    assert "cannot fetch stabilityai/sdxl-vae" in capsys.readouterr().err
    assert not Path("latents").exists()


def test_the_nearest_name_is_looked_for_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "Models" / "sdxl-vae").mkdir(parents=True)
    assert nearest_path(tmp_path / "modles" / "sdxl_vae") == tmp_path / "Models" / "sdxl-vae"
    assert nearest_path(tmp_path / "modles" / "else") == tmp_path / "Models"
    assert nearest_path(tmp_path / "quite" / "other") is None
    assert nearest_path(tmp_path / "Models" / "sdxl-vae") is None  # it is there
