"""Imports point one way: the trainer reads stores, and the cache knows nothing of training."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
READ_SIDE = {  # what xlsd_train may import: the store's read side, and what that stands on
    "xlsd_cache",
    "xlsd_cache.configs",
    "xlsd_cache.decode",  # images of `score`, read as a store's are
    "xlsd_cache.disk",
    "xlsd_cache.durable",
    "xlsd_cache.fitting",
    "xlsd_cache.finite",
    "xlsd_cache.full",
    "xlsd_cache.hub",
    "xlsd_cache.identity",
    "xlsd_cache.interrupt",
    "xlsd_cache.moments",
    "xlsd_cache.options",
    "xlsd_cache.ours",
    "xlsd_cache.precision",
    "xlsd_cache.regular",
    "xlsd_cache.quiet",
    "xlsd_cache.sources",  # only image_files
    "xlsd_cache.store",
    "xlsd_cache.terminal",
    "xlsd_cache.texts",
    "xlsd_cache.vae",
    "xlsd_cache.words",
}
# The stations in the order in which data passes them; each may import only earlier ones.
CACHE = (
    "terminal quiet regular configs texts options words disk ours durable interrupt precision "
    "full finite identity manifest sound shard blocks formats inflate gzips captions cells locate "
    "outside tables text_tables arrow_tables rows names matches match masks lists folders members "
    "tars zips archives records colours decode sources guard buckets index tags store moments hub "
    "vae fitting known accounting arrays commit live builders space conclude encode headers "
    "unchanged place delta plan config pipeline build readback verify repair check survey info "
    "preview export_index recaption peers cached pairing items crops thumbnails compare transfer "
    "proving importing other_names cli __main__"
).split()
TRAIN = (
    "draw steps json_files inside record schedule parts captions mixture selection batches "
    "lengths sd15 names fold tensors foreign network hub choose config prediction find "
    "other_names recipe resume adapt diffusion latents run_commands model_commands reinit text "
    "model cards lion rate optim layers sliced step footprint rehearsal memory processes plateau "
    "power ema verdict losses validate checkpoint thin history complete ranking charts facts "
    "report posthoc pace meter picture prompts sample run room announce prepare session loop "
    "sweep plan tags single_file ldm_config needs card appearing export merge page drawn compare "
    "clip measures score cli __main__"
).split()


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
    return names


def test_the_trainer_imports_only_the_read_side_of_the_store() -> None:
    for path in sorted((ROOT / "xlsd_train").glob("*.py")):
        ours = {name for name in imported(path) if name.startswith("xlsd_cache")}
        assert ours <= READ_SIDE, path


def test_the_cache_imports_nothing_of_training() -> None:
    for path in sorted((ROOT / "xlsd_cache").glob("*.py")):
        assert not [name for name in imported(path) if name.startswith("xlsd_train")], path


def test_stations_import_only_stations_before_them() -> None:
    for package, stations in (("xlsd_cache", CACHE), ("xlsd_train", TRAIN)):
        there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        assert there == set(stations)
        for place, station in enumerate(stations):
            for name in imported(ROOT / package / f"{station}.py"):
                head, _, module = name.partition(".")
                if head == package and module:
                    assert stations.index(module) < place, f"{package}/{station}.py: {name}"
