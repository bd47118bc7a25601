import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support import cache, printed
from xlsd_cache.store.reader import LatentStore


def test_it_tells_what_is_there(store: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cache("info", store, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    with LatentStore.open(store) as ours:
        latents = [ours.read(bucket, rows) for bucket, rows in ours.buckets.items()]
        flat = np.concatenate([part.transpose(1, 0, 2, 3).reshape(4, -1) for part in latents], 1)
        assert told["vae"]["sha256"] == ours.identity.vae_sha256
        assert told["fingerprint"] == ours.fingerprint
    assert told["vae"]["name"] == str(vae)
    assert told["vae"]["scaling_factor"] == 0.13025
    assert told["latents"]["mean"] == pytest.approx(flat.mean(1), abs=1e-4)
    assert told["latents"]["std"] == pytest.approx(flat.std(1), abs=1e-4)
    assert told["latents"]["measured"] == told["live"] == told["encoded"] == 8
    assert told["buckets"] == {"128x128": 5, "192x64": 3}
    assert told["captions"] == {"txt": 8}
    assert told["rejected"] == {}

    def on_disk(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert told["bytes"] == on_disk(store) == sum(told["disk"].values())
    assert told["disk"]["latents"] == on_disk(store / "latents.zarr")
    assert told["disk"]["manifest"] == on_disk(store / "manifest")
    assert told["disk"]["captions"] == on_disk(store / "captions")


def test_it_tells_what_captions_say(
    store: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [path.read_text().strip() for path in photos.glob("*.txt")]
    words = [len(text.split()) for text in texts]
    tags = Counter(tag.strip() for text in texts for tag in set(text.split(",")))
    capsys.readouterr()
    assert cache("info", store, "--json", "--tags", 5) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["words"] == {"txt": {"median": np.median(words), "max": max(words)}}
    ranked = sorted(tags.items(), key=lambda pair: (-pair[1], pair[0]))
    assert list(told["tags"]["txt"].items()) == ranked[:5]
    assert cache("info", store, "--tags", 0) == 0
    assert cache("info", store, "--tags", -1) == 1


def test_people_read_the_same(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache("info", store) == 0
    said = printed(capsys)
    for words in ("8 live images", "128x128 5, 192x64 3", "scaling factor 0.13025", "txt 8 of 8"):
        assert words in said


def test_no_store_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache("info", tmp_path) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("xlsd-cache: no latent store in")
