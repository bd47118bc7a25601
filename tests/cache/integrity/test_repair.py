import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import cache, files, printed, small_disk, spawn, wait_for, write_images
from tests.support.stores import slow_build
from xlsd_cache.errors import UserError
from xlsd_cache.runtime.atomic import write_parquet
from xlsd_cache.schema import COMMIT
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.reader import LatentStore

RECORD = 4 * 16 * 16 * 4 + 4  # bytes of a latent of bucket 128x128 and its crc32c
SHARD = "latents.zarr/128x128/c.0.0.0.0"
Out = pytest.CaptureFixture[str]


class Store:
    """A store of eleven pictures and a copy of one, which is damaged, repaired and built again."""

    def __init__(self, folder: Path, vae: Path, capsys: Out) -> None:
        self.images, self.out, self._vae, self._capsys = (
            folder / "images",
            folder / "l",
            vae,
            capsys,
        )
        write_images(self.images, [f"s{i}.png" for i in range(7)])
        write_images(self.images, [f"w{i}.png" for i in range(4)], 70, width=256, height=80)
        shutil.copy(self.images / "s3.png", self.images / "zcopy.png")

    def build(self) -> dict[str, Any]:
        """Build, and return its sums."""
        assert cache("build", *self.arguments()) == 0
        self._capsys.readouterr()
        assert cache("info", self.out, "--json") == 0
        sums: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return sums

    def arguments(self) -> tuple[object, ...]:
        """What to build with."""
        return (self.images, "--out", self.out, "--vae", self._vae, "--resolution", 128,
                "--rows-per-shard", 4, "--batch", 3)  # fmt: skip

    def check(self, *options: object) -> tuple[int, dict[str, Any]]:
        """The exit code and the findings of `check --json`."""
        self._capsys.readouterr()
        code = cache("check", self.out, "--json", *options)
        return code, json.loads(self._capsys.readouterr().out)

    def latents(self) -> dict[str, Any]:
        """key -> latent of all live samples."""
        with LatentStore.open(self.out) as store:
            return {
                sample["key"]: store.read(sample["bucket"], [sample["row"]])
                for sample in store.samples.to_pylist()
            }

    def key(self, row: int, bucket: str = "128x128") -> str:
        """The image in that row when the store was made."""
        plan = pq.read_table(self.out / "manifest/plan/000000.parquet").to_pylist()
        (entry,) = (e for e in plan if (e["bucket"], e["row"]) == (bucket, row))
        return str(entry["key"])


@pytest.fixture
def store(tmp_path: Path, vae: Path, capsys: Out) -> Store:
    made = Store(tmp_path, vae, capsys)
    sums = made.build()
    assert (sums["encoded"], sums["duplicate"]) == (11, 1)
    return made


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def equal(a: dict[str, Any], b: dict[str, Any], again: Sequence[str] = ()) -> bool:
    """Bit for bit; those encoded `again` in a batch of another size differ by rounding."""
    exact = all(np.array_equal(a[key], b[key]) for key in a.keys() - set(again))
    near = all(np.abs(a[key] - b[key]).max() < 1e-4 * b[key].std() for key in again)
    return a.keys() == b.keys() and exact and near


def test_exactly_the_damaged_latents_are_encoded_again(store: Store) -> None:
    before = store.latents()
    shards = files(store.out, "latents.zarr/*x*/c.*")
    damaged = sorted((store.key(1), store.key(2)))
    for row in (1, 2):
        flip(store.out / SHARD, row * RECORD + 5)
    code, found = store.check("--repair")
    assert code == 1  # a build must follow
    assert sorted(found["repaired"]["to_encode"]) == damaged
    after = files(store.out, "latents.zarr/*x*/c.*")
    assert after.keys() == shards.keys()
    assert all(after[name] == shards[name] for name in shards if name != SHARD)
    sums = store.build()
    assert (sums["encoded"], sums["reused"], sums["duplicate"]) == (2, 9, 1)
    assert store.check("--decode", 99) == (0, {"right": True, "live": 11, "problems": []})
    assert equal(store.latents(), before, damaged)
    assert store.build()["encoded"] == 0


def test_a_damaged_index_and_a_cut_file_cost_only_what_is_gone(store: Store) -> None:
    whole, before = (store.out / SHARD).read_bytes(), store.latents()
    flip(store.out / SHARD, 4 * RECORD + 3)
    code, found = store.check("--repair")
    assert (code, found["problems"][0]["rows"]) == (0, [0, 1, 2, 3])
    assert (store.out / SHARD).read_bytes() == whole  # mended, and nothing encoded
    (store.out / SHARD).write_bytes(whole[: 3 * RECORD - 1])
    code, found = store.check("--repair")
    again = [store.key(2), store.key(3)]
    assert found["repaired"]["to_encode"] == again
    assert store.build()["encoded"] == 2
    (store.out / "latents.zarr/192x64/c.0.0.0.0").unlink()
    again += store.check("--repair")[1]["repaired"]["to_encode"]
    assert store.build()["encoded"] == 4
    assert store.check()[0] == 0
    assert equal(store.latents(), before, again)


def test_of_two_lost_commit_records_both_come_back(store: Store) -> None:
    """One missing and one damaged: the log cannot be read as it is, and is not relied on."""
    (store.out / "manifest/commit/128x128.0.parquet").unlink()
    flip(store.out / "manifest/commit/192x64.0.parquet", 60)
    code, found = store.check("--repair")
    assert (code, [p["kind"] for p in found["problems"]]) == (0, ["commit", "commit"])
    assert store.check()[0] == 0
    assert store.build()["encoded"] == 0


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
def test_a_lost_commit_record_is_written_anew_from_its_shard(store: Store, damage: str) -> None:
    path = store.out / "manifest/commit/128x128.0.parquet"
    record, before = pq.read_table(path), store.latents()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        flip(path, 60)
    code, found = store.check()
    assert code == 1
    (problem,) = (p for p in found["problems"] if p["kind"] == "commit")
    assert problem["where"] == "manifest/commit/128x128.0.parquet"
    assert sorted(problem["images"]) == sorted(record["key"].to_pylist())
    assert store.check("--repair")[0] == 0
    assert pq.read_table(path).equals(record)
    assert store.check() == (0, {"right": True, "live": 11, "problems": []})
    assert store.build()["encoded"] == 0
    assert equal(store.latents(), before)


def test_a_shard_lost_with_its_commit_record_is_made_anew(store: Store) -> None:
    before = store.latents()
    flip(store.out / "manifest/commit/128x128.0.parquet", 60)
    (store.out / SHARD).unlink()
    assert store.check("--repair")[0] == 1
    assert store.build()["encoded"] == 4
    assert store.check()[0] == 0
    assert equal(store.latents(), before)


def test_damage_to_what_is_derived_or_foreign_costs_nothing(store: Store) -> None:
    before = store.latents()
    array = store.out / "latents.zarr/128x128/zarr.json"
    metadata = array.read_bytes()
    array.write_bytes(metadata.replace(b'"crc32c"', b'"crc32d"'))
    (store.out / "latents.zarr/192x64/zarr.json").unlink()
    (store.out / "index.arrow").write_bytes(b"ARROW1 no more")
    (store.out / "latents.zarr/128x128/c.7.0.0.0").write_bytes(b"mine")
    (store.out / "latents.zarr/notes.txt").write_bytes(b"mine")
    code, found = store.check()
    assert code == 1
    assert sorted((p["kind"], p["where"]) for p in found["problems"]) == [
        ("array", "latents.zarr/128x128/zarr.json"),
        ("array", "latents.zarr/192x64/zarr.json"),
        ("index", "index.arrow"),
        ("stray", "latents.zarr/128x128/c.7.0.0.0"),
        ("stray", "latents.zarr/notes.txt"),
    ]
    assert store.check("--repair")[0] == 0
    assert store.check()[0] == 0
    assert array.read_bytes() == metadata
    assert (store.out / "stray/latents.zarr/notes.txt").read_bytes() == b"mine"
    assert equal(store.latents(), before)


def test_an_array_that_became_too_short_is_found(store: Store) -> None:
    array = store.out / "latents.zarr/128x128/zarr.json"
    told = json.loads(array.read_bytes())
    told["shape"][0] = 4
    array.write_text(json.dumps(told))
    (problem,) = store.check("--repair")[1]["problems"]
    assert "is too short: 4 rows, where 8 are planned" in problem["what"]
    assert store.check()[0] == 0


def test_damaged_captions_are_set_aside_and_read_again_by_the_next_build(store: Store) -> None:
    with LatentStore.open(store.out) as opened:
        before = opened.samples["txt"].to_pylist()
    flip(store.out / "captions/base.parquet", 70)
    code, found = store.check("--repair")
    assert (code, found["problems"][0]["kind"]) == (1, "captions")
    assert (store.out / "captions/base.parquet.damaged").exists()
    assert store.build()["encoded"] == 0
    with LatentStore.open(store.out) as opened:
        assert opened.samples["txt"].to_pylist() == before
    assert store.check()[0] == 0


def test_a_damaged_plan_is_said_and_nothing_is_touched(store: Store, capsys: Out) -> None:
    flip(store.out / "manifest/plan/000000.parquet", 70)
    before = files(store.out, "**/*")
    code, found = store.check("--repair")
    assert (code, found["problems"][0]["kind"]) == (1, "plan")
    assert files(store.out, "**/*") == before
    assert cache("check", store.out, "--repair") == 1
    assert "cannot repair manifest/plan/000000.parquet" in printed(capsys)


def test_a_damaged_latent_is_not_reused_when_its_image_comes_back(store: Store) -> None:
    before = store.latents()
    key = store.key(1)
    name = key.removeprefix("images/")
    flip(store.out / SHARD, RECORD + 5)
    store.check("--repair")
    shutil.move(store.images / name, store.images.parent / name)
    store.build()
    shutil.move(store.images.parent / name, store.images / "back.png")
    sums = store.build()
    assert sums["encoded"] == 1
    after = store.latents()
    after[key] = after.pop("images/back.png")
    assert equal(after, before, [key])
    assert store.check()[0] == 0


def test_the_damaged_latent_of_an_image_that_left_training_is_given_up(store: Store) -> None:
    key = store.key(1)
    (store.images / key.removeprefix("images/")).unlink()
    store.build()
    flip(store.out / SHARD, RECORD + 5)
    code, found = store.check("--repair")
    assert found["problems"][0]["images"] == [f"{key} (not in training)"]
    assert code == 0  # nothing waits for a build
    assert store.check()[0] == 0


def test_without_the_images_training_goes_on_without_the_damaged(store: Store) -> None:
    before = store.latents()
    damaged = store.key(1)
    store.images.rename(store.images.parent / "unplugged")
    flip(store.out / SHARD, RECORD + 5)
    with pytest.raises(UserError, match=damaged):
        store.latents()
    code, found = store.check("--repair")
    assert (code, found["repaired"]["gone"]) == (0, [damaged])
    assert store.check()[0] == 0
    before.pop(damaged)
    assert equal(store.latents(), before)
    (store.images.parent / "unplugged").rename(store.images)
    assert store.build()["encoded"] == 1
    assert damaged in store.latents()


def test_an_image_that_goes_after_the_repair_leaves_training(store: Store) -> None:
    damaged = store.key(1)
    flip(store.out / SHARD, RECORD + 5)
    store.check("--repair")
    (store.images / damaged.removeprefix("images/")).unlink()
    sums = store.build()
    assert damaged not in store.latents()
    assert sums["encoded"] in (0, 1)  # 1 where its copy takes its place
    assert store.check()[0] == 0


def test_a_latent_of_another_picture_is_encoded_again(store: Store) -> None:
    """Its checksums are all right: only a comparison with its re-encoded image finds it."""
    before, key = store.latents(), store.key(1)
    wrong = store.latents()[store.key(2)].tobytes()
    crc = google_crc32c.value(wrong)
    content = bytearray((store.out / SHARD).read_bytes())
    content[RECORD : 2 * RECORD] = wrong + crc.to_bytes(4, "little")
    (store.out / SHARD).write_bytes(content)
    path = store.out / "manifest/commit/128x128.0.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["crc32c"] = crc
    write_parquet(path, pa.Table.from_pylist(rows, COMMIT))
    (store.out / "index.arrow").unlink()
    assert store.check()[0] == 0
    code, found = store.check("--decode", 99, "--repair")
    assert (code, found["problems"][0]["images"]) == (1, [key])
    assert store.build()["encoded"] == 1
    assert store.check("--decode", 99)[0] == 0
    assert equal(store.latents(), before, [key])


def test_a_repair_beside_a_build_at_work(store: Store, tmp_path: Path) -> None:
    before, key, log = store.latents(), store.key(1), tmp_path / "log"
    write_images(store.images, [f"new{i}.png" for i in range(6)], 400)
    process = spawn(slow_build, *store.arguments(), log=log)
    wait_for(lambda: any((store.out / "staging").glob("*.jnl")))
    flip(store.out / SHARD, RECORD + 5)
    code, found = store.check("--repair")
    assert (code, found["repaired"]["to_encode"]) == (1, [key])
    process.join()
    assert process.exitcode == 0, log.read_text()
    sums = store.build()
    assert (sums["encoded"], sums["live"]) == (1, 17)
    assert store.check("--decode", 99)[0] == 0
    after = store.latents()
    assert equal({name: after[name] for name in before}, before, [key])


def damage_everything(out: Path) -> None:
    """One of each kind: a latent, an index, a cut and a missing file, a commit, what is derived."""
    flip(out / SHARD, RECORD + 5)
    flip(out / "latents.zarr/128x128/c.1.0.0.0", -7)
    (out / "latents.zarr/192x64/zarr.json").unlink()
    (out / "manifest/commit/192x64.0.parquet").unlink()
    (out / "latents.zarr/stray").write_bytes(b"mine")


def killed_repair(rename: int, out: Path) -> int:
    """`check --repair`, killed for real just before its `rename`-th rename."""
    replace: Callable[..., Any] = Path.replace
    left = [rename]

    def counting(self: Path, target: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counting  # type: ignore[method-assign]
    return cache("check", out, "--repair")


def test_kill_9_before_every_rename_of_a_repair(store: Store, tmp_path: Path) -> None:
    before, whole, again = store.latents(), tmp_path / "whole", store.key(1)
    damage_everything(store.out)
    store.out.rename(whole)
    killed = True
    rename = 0
    while killed:
        rename += 1
        shutil.rmtree(store.out, ignore_errors=True)
        shutil.copytree(whole, store.out)
        process = spawn(killed_repair, rename, store.out, log=tmp_path / "log")
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 1, (tmp_path / "log").read_text()
        store.check("--repair")
        assert store.build()["encoded"] == 1, f"killed before rename {rename}"
        assert store.check()[0] == 0
        assert equal(store.latents(), before, [again])
    assert rename > 5


def test_a_full_disk_is_one_sentence_and_loses_nothing(store: Store, tmp_path: Path) -> None:
    before, log, again = store.latents(), tmp_path / "log", store.key(1)
    damage_everything(store.out)
    process = spawn(small_disk, 9000, "check", store.out, "--repair", log=log)
    process.join()
    said = [line for line in log.read_text().splitlines() if line.startswith("xlsd-cache:")]
    assert process.exitcode == 1
    assert "Traceback" not in log.read_text()
    assert len(said) == 1
    assert "Nothing valid is lost" in said[0]
    store.check("--repair")
    assert store.build()["encoded"] == 1
    assert equal(store.latents(), before, [again])


def test_a_repair_is_one_planning_among_others(store: Store) -> None:
    """The generation before it stays readable, without the damaged latent."""
    flip(store.out / SHARD, RECORD + 5)
    store.check("--repair")
    manifest = Manifest(store.out)
    assert manifest.generations() == [0, 1]
    assert manifest.damaged(1).to_pylist() == [{"bucket": "128x128", "row": 1}]
    (entry,) = manifest.planned(1).to_pylist()[11:]
    assert (entry["bucket"], entry["row"], entry["key"]) == ("128x128", 8, store.key(1))
    assert ShardId("128x128", 2) not in manifest.committed()
    with LatentStore.open(store.out) as opened:
        assert (opened.generation, opened.newest_generation) == (0, 1)
        assert len(opened.read("128x128", [0, 2, 3])) == 3
