"""What is in a run folder: rows a stage, pass rate, prompts with good and bad completions, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qprobe import store
from qprobe.probe.ids import dense_ids
from qprobe.probe.ranking import mixed_prompts
from qprobe.store.table import StoreError, Table


@dataclass(frozen=True)
class TableState:
    """One table: where, how many rows of how many, and a remark on its content."""

    path: str
    rows: int
    expected: int | None
    remark: str = ""


def inspect(run: Path) -> list[TableState]:
    """The state of every table of a run folder, in the order of the stages.

    Raises:
        StoreError: the folder is no run folder, or a part cannot be read (named).
    """
    if not (run / "prompts").is_dir():
        raise StoreError(f"{run} is no run folder: it has no folder prompts.")
    states = list(_states(run))
    if not states:
        raise StoreError(f"{run} holds no table yet: run the stage sample.")
    return states


def _states(run: Path) -> Iterator[TableState]:
    prompts = {}
    for table in _tables(run / "prompts", store.PROMPTS):
        prompts[table.folder.name] = int(table.inputs.get("prompts", _rows(table)))
        yield TableState(_path(run, table), _rows(table), prompts[table.folder.name])
    expected = {}
    for table in _tables(run / "completions", store.COMPLETIONS):
        pool = table.folder.name
        of_split = prompts.get(pool.rpartition(".")[0])
        samples = table.inputs.get("sampler", {}).get("n")
        recorded = table.inputs.get("recorded", {}).get("rows")
        expected[pool] = recorded if of_split is None or samples is None else of_split * int(samples)
        yield TableState(
            _path(run, table), _rows(table), expected[pool], _finish_reasons(table) + _usage(table) + _law(table)
        )
    for table in _tables(run / "rewards", store.REWARDS):
        yield TableState(_path(run, table), _rows(table), expected.get(table.folder.parent.name), _reward_remark(table))
    for table in _tables(run / "features", None):
        yield TableState(_path(run, table), _rows(table), expected.get(table.folder.parents[1].name), _usage(table))


def _tables(folder: Path, schema: pa.Schema | None) -> list[Table]:
    return [store.found_table(path.parent, schema) for path in sorted(folder.rglob("manifest.json"))]


def _path(run: Path, table: Table) -> str:
    return str(table.folder.relative_to(run))


def _rows(table: Table) -> int:
    """From the parts' footers: gigabytes of features are counted in milliseconds."""
    total = 0
    for path in table.parts():
        try:
            total += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}): delete this part and start the same command again."
            ) from error
    return total


def _finish_reasons(table: Table) -> str:
    if not table.parts():
        return ""
    rows = table.read(columns=["completion", "finish_reason"])
    reasons, empty = rows["finish_reason"].to_pylist(), rows["completion"].to_pylist().count("")
    counted = [f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons))]
    return ", ".join([*counted, *([f"{empty} empty"] if empty else [])])


def _usage(table: Table) -> str:
    """What was spent at an API."""
    spent = [f"{count:,} {name.replace('_', ' ')}" for name, count in table.usage().items() if count]
    return f"; spent {', '.join(spent)}" if spent else ""


def _law(table: Table) -> str:
    """How far the sampler was from its model, where that was looked at."""
    noted = table.noted("law")
    return f"; {noted['sentence'].rstrip('.')}" if isinstance(noted, dict) and noted.get("sentence") else ""


def _reward_remark(table: Table) -> str:
    if not table.parts():
        return ""
    if "ranker" in table.inputs.get("reward", {}):
        return "a baseline's scores"
    rows = table.read()
    rewards = rows["reward"].to_numpy()
    groups = dense_ids(rows["task_id"])
    verdicts = Counter(verdict for verdict in rows["verdict"].to_pylist() if verdict)
    by_count = sorted(verdicts.items(), key=lambda item: (-item[1], item[0]))
    counted = ", ".join(f"{count} {verdict}" for verdict, count in by_count)
    mixed = int(mixed_prompts(rewards, groups).sum())
    choice = f"{mixed} of {groups.max() + 1} prompts with good and bad completions"
    return "; ".join([f"mean reward {rewards.mean():.3f}", choice, *([counted] if counted else [])])


def to_text(states: list[TableState]) -> str:
    """A line a table, and what is missing at the end."""
    width = max(len(state.path) for state in states)
    lines, missing = [], []
    for state in states:
        count = f"{state.rows}" if state.expected in (None, state.rows) else f"{state.rows} of {state.expected}"
        lines.append(f"{state.path:<{width}}  {count:>14} rows  {state.remark}".rstrip())
        if state.expected is not None and state.rows < state.expected:
            missing.append(f"{state.path} is missing {state.expected - state.rows} of {state.expected} rows")
    lines.append(
        "; ".join(missing) + ": start the same command again." if missing else "Nothing that was begun is missing."
    )
    return "\n".join(lines)
