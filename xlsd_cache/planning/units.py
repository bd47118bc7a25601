"""The units of a plan, one shard each, and the rows of a unit once it is claimed."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xlsd_cache.planning.log_state import shard_names
from xlsd_cache.runtime.arrow import last_per_key
from xlsd_cache.schema import PLACE, PLAN, PlanEntry
from xlsd_cache.store.manifest import ShardId
from xlsd_cache.store.view import StoreView

_COLUMNS = [name for name in PLAN.names if name not in {"reason", "detail"}]
# With 64-bit offsets: sorting fails where a column's strings pass 2 GiB.
_LONG = {name: pa.large_string() for name in ("key", "source", "content_hash")}
_ROWS = pa.schema([(name, _LONG.get(name, PLAN.field(name).type)) for name in _COLUMNS])
_ROWS = _ROWS.append(pa.field("live", pa.bool_()))


def planned_units(store: StoreView) -> list[ShardId]:
    """Every unit of the log up to the view's generation, committed or not; later plans append."""
    places = store.manifest.plan_lines(store.generation, PLACE)
    places = places.filter(pc.greater_equal(places["row"], 0))
    names = pc.unique(shard_names(places, store.rows_per_shard)).to_pylist()
    return list(map(ShardId.parse, names))


def pending_units(store: StoreView) -> list[ShardId]:
    """The units that are not committed, sorted."""
    return sorted(set(planned_units(store)) - store.manifest.committed())


@dataclass(frozen=True)
class PlannedUnits:
    """The rows of some units: one table, as a million rows are too many for dictionaries."""

    rows: pa.Table  # PLAN and `live`, sorted by bucket and row
    spans: dict[ShardId, tuple[int, int]]  # the unit's first row in the table, number of its rows
    rows_per_shard: int

    @classmethod
    def read(cls, store: StoreView, units: Iterable[ShardId]) -> "PlannedUnits":
        """The planned rows of these units, of all generations up to the view's."""
        lines = store.manifest.plan_lines(store.generation, _COLUMNS)
        live = np.zeros(lines.num_rows, bool)
        live[last_per_key(lines, ["key"])] = True
        lines = lines.append_column("live", pa.array(live))
        wanted = pa.array([unit.name for unit in units], pa.string())
        lines = lines.filter(pc.is_in(shard_names(lines, store.rows_per_shard), value_set=wanted))
        lines = lines.cast(_ROWS).sort_by([(name, "ascending") for name in PLACE])
        names = shard_names(lines, store.rows_per_shard).combine_chunks()
        runs = pc.run_end_encode(names)
        ends = runs.run_ends.to_pylist()
        spans = {
            ShardId.parse(name): (start, end - start)
            for name, start, end in zip(runs.values.to_pylist(), [0, *ends], ends, strict=False)
        }
        return cls(lines, spans, store.rows_per_shard)

    def count(self, units: Iterable[ShardId]) -> int:
        """The number of rows of these units."""
        return sum(self.spans[unit][1] for unit in units)

    def entries(self, unit: ShardId) -> dict[int, PlanEntry]:
        """Slot -> entry of a unit's rows, each with `live`.

        Of several lines for one row the last holds: sorting kept their order.
        """
        rows = self.rows.slice(*self.spans[unit]).to_pylist()
        return {entry["row"] % self.rows_per_shard: entry for entry in rows}
