import json
import re
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support import metrics, printed, train
from xlsd_cache.dataset.batch_order import BatchOrder
from xlsd_cache.errors import UserError
from xlsd_train.config.recipes import FOLDER, Recipe, parse, shipped
from xlsd_train.config.run_options import PlanConfig
from xlsd_train.config.train import TrainConfig
from xlsd_train.optim.lr_scheduler import learning_rate, planned_steps

NAMES = ("phase1-te", "phase1-unet", "phase2-unet", "xllsd-te", "xllsd-unet")
SOURCE = re.compile(r"#.*\b(article|card|OneTrainer|xlsd|ours)\b")
Out = pytest.CaptureFixture[str]


def read(*words: object) -> TrainConfig:
    """The settings of a command line."""
    return parse(TrainConfig, [str(word) for word in words], "xlsd-train")


def mine(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_those_of_the_article_are_shipped() -> None:
    assert tuple(shipped()) == NAMES
    told = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["xlsd_train"]
    for path in shipped().values():
        packed = path.relative_to(FOLDER.parents[1]).as_posix()
        assert any(fnmatch(packed, pattern) for pattern in patterns)


@pytest.mark.parametrize("name", NAMES)
def test_each_value_says_where_it_comes_from(name: str) -> None:
    recipe = Recipe.read(name)
    lines = recipe.text.splitlines()
    for field in recipe.settings:
        key = field.replace("_", "-")
        (line,) = (line for line in lines if line.startswith(f"{key} ="))
        assert SOURCE.search(line), line
    assert recipe.summary
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_each_gives_settings_that_resolve(name: str) -> None:
    config = read("--recipe", name).resolved()
    for field, value in Recipe.read(name).settings.items():
        assert getattr(config, field) == value
    assert Recipe.read(name).record(config)["overridden"] == {}
    assert config.recipe == name


def test_what_is_known_of_the_article_and_of_xllsd() -> None:
    te = Recipe.read("phase1-te").settings
    assert (te["lr"], te["warmup"], te["epochs"], te["stop_after"]) == (3e-6, "10%", 3.0, 250)
    assert (te["batch"], te["max_tags"], te["sample_every"]) == (32, 10, 10)
    assert (te["scheduler"], te["optimizer"]) == ("constant", "lion")
    unet = Recipe.read("phase1-unet").settings
    assert (unet["optimizer"], unet["lr"], unet["betas"]) == ("dlion", 1.0, (0.9, 0.999))
    assert (unet["batch"], unet["max_tags"], unet["scheduler"]) == (32, 15, "constant")
    xllsd = Recipe.read("xllsd-unet").settings
    assert (xllsd["lr"], xllsd["lr_floor"], xllsd["scheduler"]) == (4.5e-5, 4.5e-6, "linear")
    assert (xllsd["epochs"], xllsd["batch"], xllsd["accum"]) == (10.0, 32, 8)
    assert (xllsd["loss_weight"], xllsd["shuffle"]) == ("debiased", "tags")


@pytest.mark.parametrize("sizes", [{"512x512": 30_000}, {"448x576": 14_000, "576x448": 16_000}])
def test_the_shipped_recipe_has_the_articles_rates(sizes: dict[str, int]) -> None:
    """2.1e-6 at step 200 and 2.67e-6 at step 250 of 30,000 images, inside the warm-up."""
    config = read("--recipe", "phase1-te").resolved()
    assert isinstance(config.batch, int)
    assert config.lr is not None
    planned, warmup = planned_steps(config, BatchOrder(sizes, config.batch, config.seed))
    assert 2811 <= planned <= 2815
    rates = [learning_rate(config.lr, warmup, n, config.scheduler, planned) for n in (200, 250)]
    assert [f"{rates[0]:.2g}", f"{rates[1]:.3g}"] == ["2.1e-06", "2.67e-06"]
    assert warmup > 250 == config.stop_after


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phase1-te", []),
        ("phase1-unet", []),
        ("phase2-unet", []),
        ("xllsd-te", []),
        ("xllsd-unet", ["--accum", 2, "--tokens", 248, "--text-encoder"]),
    ],
)
def test_each_trains(
    name: str, words: list[object], model: Path, store: Path, tmp_path: Path, capsys: Out
) -> None:
    words += [model / "text_encoder"] * (name == "xllsd-unet")
    given = ["--recipe", name, "--data", store, "--model", model, "--out", tmp_path / "run"]
    given += ["--steps", 2, "--device", "cpu", "--threads", 1, *words]
    assert train(*given, "--sample-steps", 1) == 0
    assert len(metrics(tmp_path / "run")) == 2
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["recipe"]["text"] == shipped()[name].read_text()
    assert record["recipe"]["overridden"]["epochs" if "te" in name else "batch"]
    assert f"recipe {name} (sha256 {record['recipe']['sha256'][:12]}), with " in (printed(capsys))


def test_flags_count_before_the_recipe_even_at_their_own_default(tmp_path: Path) -> None:
    path = mine(tmp_path, 'phase = "unet"\naccum = 8\ntags = true\nmax-tags = 5\nbatch = "auto"\n')
    config = read("--recipe", path)
    assert (config.accum, config.tags, config.max_tags, config.batch) == (8, True, 5, "auto")
    config = read("--accum", 1, f"--recipe={path}", "--no-tags", "--max_tags=None", "--batch", 32)
    assert (config.accum, config.tags, config.max_tags, config.batch) == (1, False, None, 32)
    assert config == read("--phase", "unet", "--recipe", path, "--accum", 1, "--no-tags",
                          "--max-tags", "None", "--batch", 32)  # fmt: skip


def test_what_goes_with_an_option_goes_with_it() -> None:
    lion = read("--recipe", "phase1-unet", "--optimizer", "lion").resolved()
    assert (lion.lr, lion.betas) == (5e-6, (0.9, 0.99)), "1.0 is D-Lion's, and ruin for Lion"
    same = read("--recipe", "phase1-unet", "--optimizer", "dlion")
    assert (same.lr, same.betas) == (1.0, (0.9, 0.999))
    assert read("--recipe", "phase1-unet", "--optimizer=lion", "--lr", "2e-6").lr == 2e-6
    steps = read("--recipe", "phase1-te", "--steps", 90)
    assert (steps.steps, steps.epochs) == (90, None)
    epochs = read("--recipe", "phase1-unet", "--epochs", 2)
    assert (epochs.steps, epochs.epochs) == (None, 2.0)
    assert read("--recipe", "xllsd-unet", "--scheduler", "constant").lr_floor is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max-tag = 7", "max-tag = 7: training has no such option; did you mean max-tags?"),
        ("max_tags = 7", "max_tags = 7: training has no such option; did you mean max-tags?"),
        ("learning_rate = 1e-4", "learning_rate = 0.0001: training has no such option; here lr"),
        ('recipe = "phase1-te"', 'recipe = "phase1-te": training has no such option'),
        ('optimizer = "loin"', "--optimizer 'loin' is not lion or dlion or adamw"),
        ('batch = "many"', "--batch 'many' is not a whole number or auto"),
        ("accum = 1.5", "--accum '1.5' is not a whole number"),
        ("accum = true", "--accum needs a value"),
        ("tokens = 77", "--tokens '77' is not 248"),
        ("lr = 'fast'", "--lr 'fast' is not a number"),
        ("ema = 1", "--ema takes no value, and '1' is given"),
        ("max-tags = false", "there is no option --no-max-tags"),
        ("betas = [0.9]", "--betas needs 2 values"),
        ('out = ""', "--out '' is empty"),
        ("[lr]\nunet = 1", "[lr]: an option is not a table"),
        ('on-event = "sh x.sh"', "on-event = 'sh x.sh': a recipe is passed on, and must not run"),
        ("steps = 5\nepochs = 1", "--steps 5 and --epochs 1 both give the planned length"),
        ("lr = ", "(at line 2, column 6)"),
    ],
)
def test_what_no_recipe_can_hold_is_one_sentence(
    text: str, told: str, tmp_path: Path, capsys: Out
) -> None:
    path = mine(tmp_path, f'phase = "te"\n{text}\n')
    assert train("--recipe", path, "--out", tmp_path / "run") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line
    assert told in line
    assert not (tmp_path / "run").exists()


def test_numbers_and_folders_are_what_the_options_take(tmp_path: Path) -> None:
    text = 'phase = "unet"\noptimizer = "dlion"\nlr = 1\nbetas = [0, 0.9]\n'
    path = mine(tmp_path, text + 'out = "here"\ntokens = 248\n')
    config = read("--recipe", path)
    assert repr(config.lr) == "1.0"
    assert (config.betas, config.out, config.tokens) == ((0.0, 0.9), Path("here"), 248)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_recipes_of_windows_editors_and_shells_are_read(tmp_path: Path, encoding: str) -> None:
    text = '# mine, \u00fcber alles\r\nphase = "unet"\r\nlr = 1e-4\r\n'
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode(encoding))
    assert read("--recipe", path).lr == 1e-4
    assert Recipe.read(str(path)).text == text.replace("\r\n", "\n")


def test_a_recipe_of_a_factor_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    path = mine(tmp_path, 'phase = "unet"\noptimizer = "dlion"\nlr = 1e-5\n')
    with pytest.raises(UserError, match="recipe .*mine.toml: --lr 1e-05 is a factor"):
        Recipe.read(str(path))
    path.write_text('phase = "unet"\nout = ""\n')
    with pytest.raises(UserError, match="--out '' is empty"):
        Recipe.read(str(path))


def test_other_refusals(tmp_path: Path, capsys: Out) -> None:
    for words, told in (
        (["--recipe", "phase1-ut"], "did you mean phase1-unet?"),
        (["--recipe", "nowhere.toml"], "cannot read the recipe nowhere.toml"),
        (["--recipe", mine(tmp_path, "lr = 1e-6")], "does not say what trains"),
        (
            ["--recipe", "phase1-unet", "--phase", "te"],
            "--phase te does not go with the recipe phase1-unet",
        ),
        (["--recipe", "phase1-te", "--shuffle", "sentences"], "e.g. --max-tags None"),
        (["recipes", "phase1-ut"], "did you mean phase1-unet?"),
        (["plan", "--recipe", "phase1-ut"], "did you mean phase1-unet?"),
    ):
        assert train(*words) == 1
        assert told in capsys.readouterr().err
    (tmp_path / "bytes.toml").write_bytes(b'phase = "te" # \xff')
    with pytest.raises(UserError, match="line 1: not valid UTF-8"):
        Recipe.read(str(tmp_path / "bytes.toml"))


def test_without_a_recipe_the_phase_must_be_named() -> None:
    for words in ([], ["--recipe", "None"]):
        with pytest.raises(SystemExit) as exit_code:
            read(*words)
        assert exit_code.value.code == 2


def test_the_plan_takes_recipes() -> None:
    config = parse(PlanConfig, ["--recipe", "xllsd-unet", "--batch", "16", "--json"], "plan")
    assert (config.phase, config.accum, config.batch, config.json) == ("unet", 8, 16, True)


def test_a_resume_compares_settings_and_not_the_recipe(
    model: Path, store: Path, tmp_path: Path, capsys: Out
) -> None:
    text = 'phase = "unet"\nbatch = 4\nsteps = 4\nlr = 1e-4\nsample-every = 0\nthreads = 1\n'
    path = mine(tmp_path, text)
    given = ("--recipe", path, "--data", store, "--model", model, "--out", tmp_path / "run")
    assert train(*given, "--stop-after", 1) == 0
    path.write_text(text.replace("1e-4", "2e-4"))
    assert train(*given) == 1
    assert "was started with --lr 0.0001 (now 0.0002)" in capsys.readouterr().err
    path.write_text("# only said otherwise\n" + text)
    assert train(*given, "--stop-after", 2) == 0
    plain = ["--phase", "unet", "--batch", 4, "--steps", 4, "--lr", 1e-4, "--sample-every", 0]
    assert train(*plain, "--threads", 1, *given[2:]) == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["recipe"]["text"] == text, "the recipe that it began with"
    assert train("export", tmp_path / "run", tmp_path / "exported") == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| recipe | mine.toml, sha256 {record['recipe']['sha256'][:12]} |" in card


def test_recipes_are_listed_and_printed_as_they_are(tmp_path: Path, capsys: Out) -> None:
    assert train("recipes") == 0
    lines = printed(capsys).splitlines()
    for name, line in zip(NAMES, lines, strict=True):
        assert line.startswith(f"{name} ")
        assert line.endswith(f" {Recipe.read(name).summary}")
        assert len(line) <= 100
    for name, path in shipped().items():
        assert train("recipes", name) == 0
        shown_text = capsys.readouterr().out
        assert shown_text == path.read_text()
        assert Recipe.read(str(mine(tmp_path, shown_text))).settings == Recipe.read(name).settings


def test_every_option_but_recipe_may_stand_in_one(tmp_path: Path) -> None:
    """Each field's default, written as TOML, is taken and is the default again."""
    written, default = ['phase = "te"'], TrainConfig(phase="te")
    for field in fields(TrainConfig):
        value = getattr(default, field.name)
        if field.name not in {"phase", "recipe"} and value is not None:
            value = str(value) if isinstance(value, Path) else value
            written.append(f"{field.name.replace('_', '-')} = {json.dumps(value)}")
    assert len(written) > 30
    assert TrainConfig(**Recipe.read(str(mine(tmp_path, "\n".join(written)))).settings) == default
