"""`plan`, `Worker` and `finish`: the three parts of a build, called by any engine."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import cache, files, last_error, printed, spawn, wait_for, write_images
from tests.support.stores import pause_batches
from tests.support.vaes import tiny
from xlsd_cache import BuildOptions, BuildPlan, Outcome, UserError, Worker, build, finish, plan
from xlsd_cache.building import plan as planning
from xlsd_cache.building import worker as building_worker
from xlsd_cache.encoding import pipeline
from xlsd_cache.encoding.vae import load_vae
from xlsd_cache.planning.generation import plan_lock
from xlsd_cache.planning.units import PlannedUnits, pending_units
from xlsd_cache.runtime.signals import StopSignal
from xlsd_cache.schema import PlanEntry
from xlsd_cache.store import commit as store_commit
from xlsd_cache.store.commit import Claim, claim
from xlsd_cache.store.manifest import Manifest, ShardId
from xlsd_cache.store.reader import LatentStore
from xlsd_cache.store.view import StoreView

Out = pytest.CaptureFixture[str]
Options = Callable[..., BuildOptions]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two sizes, one of them broken: six units of four rows."""
    folder = tmp_path / "images"
    write_images(folder, [f"s{i:02d}.png" for i in range(12)])
    write_images(folder, [f"w{i}.png" for i in range(8)], 50, width=256, height=80)
    (folder / "w3.png").write_bytes((folder / "w3.png").read_bytes()[:-300])
    return folder


@pytest.fixture
def options(images: Path, vae: Path, tmp_path: Path) -> Options:
    """The options of a build of the images into tmp_path/NAME."""

    def make(name: str = "latents", **more: Any) -> BuildOptions:
        return BuildOptions(
            (str(images),), out=tmp_path / name, vae=str(vae), resolution=128, rows_per_shard=4,
            batch=2, **more,
        )  # fmt: skip

    return make


@pytest.fixture
def whole(options: Options, tmp_path: Path) -> Path:
    """The store that one build makes."""
    build(options("whole"))
    return tmp_path / "whole"


def content(store: Path) -> dict[str, bytes]:
    """Every byte of a store but the times and processes of its builds."""
    kept = files(store, "**/*")
    return {name: data for name, data in kept.items() if name != "manifest/builders.json"}


def when(store: Path) -> dict[Path, tuple[int, int]]:
    """When each file and folder of a store was last written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.rglob("*")}


def words(options: BuildOptions) -> tuple[object, ...]:
    return (*options.source, "--out", options.out, "--vae", options.vae, "--resolution", 128,
            "--rows-per-shard", 4, "--batch", 2)  # fmt: skip


def slowly(*args: object) -> int:
    """A command with a pause before each batch, to be killed in."""
    pause_batches(0.3)
    return cache(*args)


def lists_no(source: Path, *args: object) -> int:
    """A command that ends with an error where it lists the source or a folder in it."""

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        if event in {"os.listdir", "os.scandir"} and str(values[0]).startswith(str(source)):
            raise AssertionError(f"{event} {values[0]}")

    source.chmod(0o311)  # as root, only the hook refuses
    sys.addaudithook(refuse)
    return cache(*args)


def test_three_commands_in_four_processes_are_a_build(
    options: Options, whole: Path, images: Path, tmp_path: Path, capsys: Out
) -> None:
    out, log = tmp_path / "latents", tmp_path / "log"
    assert cache("plan", *words(options())) == 0
    units = capsys.readouterr().out.split()
    assert units == ["128x128.0", "128x128.1", "128x128.2", "192x64.0", "192x64.1"]
    assert cache("finish", out) == 1
    told = "is not finished: 5 units are not encoded yet (128x128.0,128x128.1,128x128.2 and 2 more)"
    assert told in last_error(capsys)
    assert not (out / "index.arrow").exists()
    parts = [spawn(lists_no, images, "encode", out, "--shard", f"{i}/2", log=log) for i in range(2)]
    for process in parts:
        process.join()
    images.chmod(0o755)
    assert [process.exitcode for process in parts] == [0, 0], log.read_text()
    said = log.read_text()
    assert "192x64.1 encoded: 3 images, truncated 1\n" in said
    assert said.count(" encoded: 4 images\n") == 4
    assert cache("finish", out) == 0
    assert "20 scanned = 19 encoded + 0 reused + 0 duplicate + 1 rejected" in printed(capsys)
    assert content(out) == content(whole)
    assert cache("encode", out) == 0
    assert "0 of 5 units to encode" in printed(capsys)
    assert finish(out).encoded == 19  # again
    assert content(out) == content(whole)


def test_a_killed_encoder_is_continued_and_twice_is_once(
    options: Options, whole: Path, tmp_path: Path, capsys: Out
) -> None:
    out = tmp_path / "latents"
    unit = plan(options()).units[0]
    process = spawn(slowly, "encode", out, "--units", unit, log=tmp_path / "log")
    wait_for(lambda: any(path.stat().st_size for path in out.glob("staging/*.jnl")))
    process.kill()
    process.join()
    assert not list(out.glob("manifest/commit/*"))
    with Worker(out) as worker:
        assert worker.encode(unit) == Outcome(unit, "encoded", 4, {})
        before = when(out)
        assert worker.encode(unit) == Outcome(unit, "there", 4, {})
        assert when(out) == before
    capsys.readouterr()
    assert cache("encode", out, "--units", unit) == 0
    assert capsys.readouterr().out == f"{unit} there: 4 images\n"
    assert cache("encode", out) == 0
    finish(out)
    assert content(out) == content(whole)


def test_one_worker_serves_several_plans_and_nothing_is_printed(
    options: Options, images: Path, vae: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UserError, "names_flags", False)
    loaded = load_vae(str(vae))
    first = plan(options(), loaded)
    with Worker(first.store, loaded, workers=2) as worker:
        assert {worker.encode(unit).status for unit in first.units} == {"encoded"}
        assert finish(first.store).encoded == 19
        (images / "s00.png").unlink()
        write_images(images, ["later.png"], 90)
        second = plan(options(), loaded)
        assert second == BuildPlan(first.store, 1, ("128x128.3",))
        assert worker.encode("128x128.3") == Outcome("128x128.3", "encoded", 1, {})
        counts = finish(first.store)
        assert (counts.scanned, counts.encoded, counts.reused) == (20, 1, 18)
        assert plan(options(), loaded).units == ()
        assert plan(options(dry_run=True), loaded) == BuildPlan(first.store, 1, ())
    assert capfd.readouterr() == ("", "")


def test_a_unit_that_another_holds_or_that_is_stopped_is_left_alone(options: Options) -> None:
    out = options().out
    unit = ShardId.parse(plan(options()).units[0])
    with Worker(out) as worker:
        other = claim(StoreView.open(out), unit, lambda _: {}, 2)
        assert other is not None
        assert worker.encode(unit.name) == Outcome(unit.name, "held")
        other.release()
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert worker.encode(unit.name, stop) == Outcome(unit.name, "stopped")
        assert worker.encode(unit.name).status == "encoded"


@pytest.mark.parametrize("others", [False, True], ids=["the last one", "others are pending"])
def test_a_unit_that_another_commits_meanwhile_is_encoded(
    options: Options, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    out = options().out
    units = plan(options()).units
    with Worker(out) as worker, Worker(out) as other:
        if not others:
            other.encode_all(units[1:])

        def meanwhile(store: StoreView) -> list[ShardId]:
            monkeypatch.undo()
            assert other.encode(units[0]).status == "encoded"
            return pending_units(store)

        monkeypatch.setattr(building_worker, "pending_units", meanwhile)
        assert worker.encode(units[0]).status == "encoded"


def test_a_shard_that_a_killed_process_left_is_committed_though_another_tidies(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = options().out
    unit = plan(options()).units[0]
    store, commit = StoreView.open(out), store_commit.write_commit

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def and_another_tidies(*given: Any) -> None:
        commit(*given)
        store_commit.tidy(store.manifest)

    monkeypatch.setattr(store_commit, "write_commit", killed)
    with Worker(out) as worker, pytest.raises(KeyboardInterrupt):
        worker.encode(unit)
    assert store.manifest.shard(ShardId.parse(unit)).exists()
    monkeypatch.setattr(store_commit, "write_commit", and_another_tidies)
    with Worker(out) as worker:
        assert worker.encode(unit).status == "encoded"


def test_who_waits_for_a_unit_makes_its_rows_once(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = options().out
    units = plan(options()).units
    held = claim(StoreView.open(out), ShardId.parse(units[1]), lambda _: {}, 2)
    assert held is not None
    tries, made, rows_of = list[str](), list[str](), PlannedUnits.entries

    def spy(store: StoreView, unit: ShardId, *more: Any) -> Claim | None:
        tries.append(unit.name)
        if tries.count(unit.name) == 3:
            held.release()
        return claim(store, unit, *more)

    def entries(self: PlannedUnits, unit: ShardId) -> dict[int, PlanEntry]:
        made.append(unit.name)
        return rows_of(self, unit)

    monkeypatch.setattr(pipeline, "claim", spy)
    monkeypatch.setattr(PlannedUnits, "entries", entries)
    with Worker(out) as worker:
        outcomes = worker.encode_all(units, waits=True)
    assert {outcome.status for outcome in outcomes} == {"encoded"}
    assert tries.count(units[1]) == 3
    assert sorted(made) == sorted(units)


def test_parts_of_a_store_that_grows_meanwhile_leave_out_no_unit(
    options: Options, images: Path, capsys: Out
) -> None:
    """The second task of a job array starts after the next plan, which has units in between."""
    out, first = options().out, plan(options()).units
    assert cache("encode", out, "--shard", "0/2") == 0
    write_images(images, [f"later{i}.png" for i in range(4)], 60)
    plan(options())
    assert cache("encode", out, "--shard", "1/2") == 0
    assert set(first) <= {unit.name for unit in Manifest(out).committed()}
    capsys.readouterr()
    assert cache("encode", out, "--units", ",".join(first)) == 0  # of the older plan
    assert capsys.readouterr().out.count(" there: ") == len(first)
    assert cache("encode", out) == 0
    assert finish(out).scanned == 24
    assert cache("check", out) == 0


def test_what_cannot_be_encoded_is_one_sentence(
    options: Options, tmp_path: Path, capsys: Out
) -> None:
    out = tmp_path / "latents"

    def refused(*args: object) -> str:
        assert cache("encode", *args) == 1
        return last_error(capsys)

    assert "no latent store in" in refused(out)
    plan(options())
    assert f"{out} has no unit 128x128.99; " in refused(out, "--units", "128x128.0,128x128.99")
    assert "'../128x128.0' is no unit" in refused(out, "--units", "../128x128.0")
    assert "give one of them" in refused(out, "--units", "128x128.0", "--shard", "0/2")
    assert "--shard '2/2' is not I/N" in refused(out, "--shard", "2/2")
    other = tiny(tmp_path / "tiny")
    assert "does not fit the latents of" in refused(out, "--vae", other)
    with pytest.raises(UserError, match="cannot be mixed"), Worker(out, load_vae(str(other))) as it:
        it.encode("128x128.0")
    recorded = out / "manifest" / "encode.json"
    for damage in ('{"vae": "x"}', '{"vae": "", "batch": 1, "max_pixels": 1}', "[]", "{"):
        recorded.write_text(damage)
        assert "writes it again" in refused(out)
    recorded.unlink()
    assert "has no plan that workers can read" in refused(out)
    assert list(out.glob("manifest/commit/*")) == []
    plan(options())
    assert recorded.exists()


def test_a_store_that_another_process_makes_meanwhile_keeps_its_rows_per_shard(
    options: Options, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `watch` and `build` of one new store, which have other defaults."""

    def late(manifest: Manifest) -> Any:
        monkeypatch.setattr(planning, "plan_lock", plan_lock)
        aside = tmp_path / "aside.png"
        (tmp_path / "images/s00.png").replace(aside)
        build(options())  # with 4 rows per shard, and one image less
        aside.replace(tmp_path / "images/s00.png")
        return plan_lock(manifest)

    monkeypatch.setattr(planning, "plan_lock", late)
    build(replace(options(), rows_per_shard=None))
    assert cache("check", tmp_path / "latents") == 0
    with LatentStore.open(tmp_path / "latents") as store, LatentStore.open(whole) as other:
        assert store.rows_per_shard == 4
        assert len(store) == len(other)
