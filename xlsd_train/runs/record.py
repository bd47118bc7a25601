"""A run's config.json, typed, and a checkpoint's state.json: read, and checked to be a run's.

A run may come from anywhere, so both files are checked against their types once, here.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

from xlsd_cache.errors import UserError
from xlsd_cache.runtime.bounded_files import read_json
from xlsd_train.runs.json_files import Shape, misfit, shape_of
from xlsd_train.runs.layout import CONFIG, STATE
from xlsd_train.runs.links import refuse_links

_TEXT = (None, str)
# Options whose values are read; of all others only whether they are equal matters.
_OPTIONS = {
    "phase": str, "model": _TEXT, "unet": _TEXT, "text_encoder": _TEXT, "tokenizer": _TEXT,
    "vae": _TEXT, "train": _TEXT, "reinit": _TEXT, "caption": _TEXT, "require_tags": _TEXT,
    "forbid_tags": _TEXT, "drop_tags": _TEXT, "betas": (None, [float]), "optimizer": str,
    "accum": int, "validation_fraction": (None, float), "clip_skip": int,
}  # fmt: skip
_ADAPTED = {
    name: {"from!": object, "to!": kind, "why": str}
    for name, kind in {
        "batch": int, "validation_fraction": float, "validate_every": int, "require_tags": _TEXT,
        "warmup": _TEXT,
    }.items()
}  # fmt: skip
_LENGTHS = "looked_at selected without limit cut over_median over_max".split()
# Earlier versions had the first two; state.json leaves out the last, which each resume may change.
_PLAN = ([str, int], [str, int, str], [str, int, str, str])
Plan = Annotated[tuple[Any, ...], Shape(_PLAN)]
MEASURED = {
    "plan!": _PLAN, "images_per_s!": (None, float), "of_peak!": (None, float),
    "peak_gib!": (None, float), "fits!": bool,
}  # fmt: skip
Options = Annotated[dict[str, Any], Shape(_OPTIONS)]
Recipe = Annotated[dict[str, Any], Shape({"name!": str, "sha256!": str})]
Lengths = Annotated[dict[str, int], Shape({f"{name}!": int for name in _LENGTHS})]
Changes = Annotated[dict[str, dict[str, Any]], Shape(_ADAPTED)]  # option -> from, to, why


class MeasuredPlan(TypedDict):
    """A memory plan that was measured before a run, by one process."""

    plan: list[Any]
    images_per_s: float | None  # None: out of memory
    of_peak: float | None  # of the card's peak FLOP/s, with recomputation; None: not known
    peak_gib: float | None  # None: not known
    fits: bool


class StoreRecord(TypedDict):
    """A store that a run trains on, and how many of its images it uses."""

    path: str
    weight: NotRequired[float]
    generation: int
    newest_generation: NotRequired[int]  # of the store when the run started
    fingerprint: str
    resolution: NotRequired[int]
    images: int
    tagged: NotRequired[int]  # images that --require-tags and --forbid-tags leave
    selected: int  # of those the images that train


class SamplesRecord(TypedDict):
    """What a run draws."""

    size: str  # WIDTHxHEIGHT, unless a prompt has its own
    pictures: NotRequired[list[Any]]


class ModelRecord(TypedDict):
    """The weights that a run started from."""

    source: str
    sha256: dict[str, str]  # network -> hash


class ObjectiveRecord(TypedDict):
    """What the model predicts, and what it predicted before."""

    kind: str
    before: str
    anew: NotRequired[bool]  # whether they differ


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's config.json, a field for each key, in the order of the file.

    Defaults stand for what earlier versions did not write.
    """

    command: list[str] = field(default_factory=list)
    config: Options  # resolved
    adapted: Changes = field(default_factory=dict)  # changed to fit small data, see `config.adapt`
    recipe: Recipe | None = None  # see `config.recipes`
    precision: str = ""
    batch: int = 0
    plan: Plan = ("", 0)  # how a batch passes: the fields of `MemoryPlan`
    memory: str = ""  # the same in words
    measured: Annotated[list[MeasuredPlan], Shape([MEASURED])] = field(default_factory=list)
    step_s: tuple[str, float] | None = None  # (GPU, predicted seconds per batch)
    tflop: float | None = None  # per image on average, with recomputation
    planned_steps: int = 0
    warmup_steps: float = 0.0
    prompts: list[str] = field(default_factory=list)
    samples: SamplesRecord | None = None
    stores: list[StoreRecord]
    unknown_tags: list[str] = field(default_factory=list)
    captions: Lengths = field(default_factory=dict)  # in tokens, see `data.caption_lengths`
    remarks: list[str] = field(default_factory=list)  # on the prompts
    model: ModelRecord = field(default_factory=lambda: ModelRecord(source="", sha256={}))
    objective: ObjectiveRecord = field(default_factory=lambda: ObjectiveRecord(kind="", before=""))
    latents: dict[str, Any] = field(default_factory=dict)  # how they are scaled
    vae: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, list[str]] = field(default_factory=dict)  # SETS -> keys of the samples
    settings: Options  # what a resume compares
    machine: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    xlsd: str = ""  # version
    changed: list[Any] = field(default_factory=list)  # by --force: each step and the old values
    written: dict[str, Any] = field(default_factory=dict, repr=False)  # of a file that was read

    @classmethod
    def from_json(cls, value: Any) -> "RunRecord":
        """Raises ValueError for a value that no run wrote; keys of other versions are kept."""
        if why := misfit(value, SHAPE):
            raise ValueError(why)
        own = {name: each for name, each in value.items() if name in FIELDS}
        return cls(**own, written=value)

    def to_json(self) -> dict[str, Any]:
        """What the file holds: the keys that it had, and those whose values are new."""
        values = {name: getattr(self, name) for name in FIELDS}
        if not self.written:
            return {name: each for name, each in values.items() if name != "changed" or each}
        now = {n: it for n, it in values.items() if n in self.written or it != FIELDS[n]}
        return self.written | now

    def asked(self) -> dict[str, Any]:
        """The options as they were asked for, before they were adapted to small data."""
        return self.config | {name: each["from"] for name, each in self.adapted.items()}


FIELDS = {  # key -> default
    each.name: each.default if each.default_factory is MISSING else each.default_factory()
    for each in fields(RunRecord)[:-1]
}
_NEEDED = [name for name, default in FIELDS.items() if default is MISSING]
SHAPE = {
    f"{name}!" if name in _NEEDED else name: shape_of(hint)
    for name, hint in get_type_hints(RunRecord, include_extras=True).items()
    if name in FIELDS
}
EMPTY = RunRecord(config={}, stores=[], settings={})  # of a model that has no run
# What a run needs to be resumed.
_RESUMED = ("batch", "memory", "model", "plan", "planned_steps", "warmup_steps")
_STATE = {
    "step!": int, "images_seen": int, "smoothed": [float, float], "plan": _PLAN,
    "optimizer": {str: float},
}  # fmt: skip


def read_record(folder: Path) -> RunRecord:
    """A run's config.json. Raises UserError for a folder that is no run, or holds links."""
    refuse_links(folder)
    path = folder / CONFIG
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a run: it has no config.json; give the folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; give the folder of a run") from error
    try:
        return RunRecord.from_json(value)
    except ValueError as error:
        raise UserError(f"{path} is not a run's: {error}; give the folder of a run") from error


def record_to_resume(folder: Path, value: Any) -> RunRecord:
    """The content of config.json, of a run to resume. Raises UserError where anything is wrong."""
    try:
        if missing := next((name for name in _RESUMED if name not in value), None):
            raise ValueError(f"{missing} is missing")
        return RunRecord.from_json(value)
    except ValueError as error:
        raise UserError(
            f"cannot resume {folder}: its config.json is damaged ({error}); use another --out, or "
            f"start from the run's weights with --model {folder}"
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError where it is damaged."""
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = read_json(path)
        if why := misfit(state, _STATE):
            raise ValueError(why)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return state


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a damaged file of a checkpoint."""
    return UserError(
        f"cannot read {path}: {error}; remove {path.parent} to resume from the checkpoint before it"
    )
