"""Several runs by one command: every combination of the values that words of the command line say, such as `-m seed=0,1`.

Jobs that would write into one run folder get folders of their own, RUN-multirun/<what is said>. Tables that are made
from the same inputs (completions, rewards, features) are made once: a job takes the parts that the run folder and the jobs
before it have (`sharing`). Shards of one run are no jobs of their own: they meet in its folder.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.cli import configuration
from qprobe.files import fingerprint
from qprobe.report import tables
from qprobe.report.results import Results
from qprobe.settings import UsageError
from qprobe.store import sharing

_LONGEST = 100  # characters of a folder's name
_SUMMARY = "multirun"
_HEAD = ("job", "pool", "method", "reward", "low", "high", "auc", "prompts", "seeds")


@dataclass(frozen=True)
class Job:
    """One combination of values.

    Args:
        words: of the command line, one value each.
        label: those of the values that differ between the jobs.
        run: `paths.run` of a job that gets a folder of its own; None where the configuration's own is nobody else's.
        folder: of its run and its results.
        base: the configuration's own run folder.
        tables: the folder that the table of all jobs goes to, and the folders of jobs.
    """

    words: tuple[str, ...]
    label: str
    run: str | None
    folder: Path
    base: Path
    tables: Path


def plan(
    words: Sequence[str],
    compose: Callable[[Sequence[str]], dict[str, Any]],
    folder_of: Callable[[dict[str, Any]], Path],
    check: Callable[[dict[str, Any]], object],
) -> list[Job]:
    """The jobs of a multirun, every configuration looked at before any work.

    Args:
        words: of the command line, some with several values.
        compose: a configuration of words with one value each.
        folder_of: the run folder of a configuration, which depends on `paths.run`.
        check: raises for a configuration that cannot be.

    Raises:
        UsageError, ValueError: what cannot be, of any job.
    """
    keys = {key for key in configuration.swept(words) if key.partition(".")[0] != "hydra"}
    jobs: list[Job] = []
    configs = []
    for own in configuration.jobs(words):
        config = compose(own)
        check(config)
        said = [word for word in own if word.partition("=")[0].lstrip("+~") in keys and not word.startswith("shard=")]
        base = str(config["paths"].get("outputs") or config["paths"]["run"])
        jobs.append(
            Job(
                tuple(own),
                ", ".join(said),
                run=None,
                folder=folder_of(_with_run(config, base)),
                base=folder_of(config),
                tables=Path(f"{base}-{_SUMMARY}"),
            )
        )
        configs.append(config)
    if not jobs:
        raise UsageError("A multirun without a job: say several values, such as probe.learning_rate=1e-3,1e-2.")
    # Configurations, not jobs, share a folder: the shards of one are one.
    different = {
        (job.folder, fingerprint({**config, "shard": None})) for job, config in zip(jobs, configs, strict=True)
    }
    configurations = Counter(folder for folder, _ in different)
    for place, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        if configurations[job.folder] > 1:
            run = str(job.tables / _name(job.label))
            jobs[place] = dataclasses.replace(job, run=run, folder=folder_of(_with_run(config, run)))
    return jobs


def _with_run(config: Mapping[str, Any], run: str) -> dict[str, Any]:
    paths = {**config["paths"], "run": run}
    return {**config, "paths": paths | ({"outputs": None} if "outputs" in paths else {})}


def _name(label: str) -> str:
    """A folder's name: legible, and another one for another label."""
    name = re.sub(r"[^\w.=+-]+", "_", label.replace(", ", ",")).strip("_.")
    legible = name == label and len(name) <= _LONGEST
    return name if legible else f"{name[:_LONGEST]}-{fingerprint(label)[:6]}"


def placed(config: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The configuration of a job, its results in the job's folder."""
    return dict(config) if job.run is None else _with_run(config, job.run)


def run(name: str, jobs: Sequence[Job], execute: Callable[[Job], None]) -> int:
    """Run one job after the other and show all; a job that fails is said, and the others go on.

    Args:
        name: of the command, before a sentence on a fault.
        execute: runs a job in its folder.

    Returns: the exit status, 1 where one failed.
    """
    failed = []
    for number, job in enumerate(jobs, start=1):
        print(f"\n{number} of {len(jobs)}: {job.label or ' '.join(job.words)}", file=sys.stderr)
        prepare(job, jobs)
        try:
            execute(job)
        except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(job.label or " ".join(job.words))
            _tidy(job)
    if failed:
        print(f"{name}: {len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}.", file=sys.stderr)
    show(jobs)
    return 1 if failed else 0


def prepare(job: Job, jobs: Sequence[Job]) -> None:
    """Let a job's run folder take the tables that others have made from the same inputs."""
    if job.run is not None:
        others = dict.fromkeys([job.base, *(other.folder for other in jobs if other.run is not None)])
        sharing.share(job.folder, [folder for folder in others if folder != job.folder])


def _tidy(job: Job) -> None:
    """A job that failed before it wrote anything leaves no folder."""
    if job.run is not None and [path.name for path in job.folder.iterdir()] == [sharing.NAME]:
        (job.folder / sharing.NAME).unlink()
        for folder in (job.folder, *job.folder.parents[:2]):
            if any(folder.iterdir()):
                break
            folder.rmdir()


def show(jobs: Sequence[Job]) -> None:
    """Print the table of all jobs' results, and write it as tables/multirun.csv and .md; nothing where one job has results."""
    labels = {job.folder: job.label for job in jobs}
    rows = [[label, *row] for folder, label in labels.items() for row in _rows(folder)]
    if len({row[0] for row in rows}) < 2:
        return
    folder, lines = jobs[0].tables / "tables", io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([_HEAD, *rows])
    cells = [
        [job, pool, method, _number(value), f"[{_number(low)}, {_number(high)}]", _number(auc)]
        for job, pool, method, value, low, high, auc, *_ in rows
    ]
    table = tables.Block(["job", "pool", "method", "reward", "95 % interval", "AUC"], [False] * 6, cells)
    texts = {"csv": lines.getvalue(), "md": tables.markdown_page([jobs[0].tables.name], [table], [])}
    tables.write_formats(texts, folder, _SUMMARY)
    print(tables.text_page([], [table], []))
    print("\n".join([f"tables:   {folder}", *(f"run:      {run}" for run in labels if run.exists())]))


def _rows(folder: Path) -> list[list[Any]]:
    """The rows of all results of a run folder; those of several probes are named by their folders."""
    rows: list[list[Any]] = []
    for path in sorted(folder.glob("**/results/*.json")):
        found, variant = Results.read(path), path.parent.parent.relative_to(folder).name
        for row in found.rows:
            method = f"{row.method}, {variant}" if variant else row.method
            rows.append([found.pool, method, row.value, row.low, row.high, row.auc, row.prompts, row.seeds])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
