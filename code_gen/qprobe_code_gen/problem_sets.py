"""The problems of one split of a data set, and the rows that they are made of: from a JSON-lines file or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from qprobe.files import fingerprint, read_unpacked

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its columns


class HasContent(Protocol):
    """What a set needs of its problems, programs or not."""

    @property
    def task_id(self) -> str: ...

    def content(self) -> list[str]: ...


AnyProblem = TypeVar("AnyProblem", bound=HasContent)


@dataclass(frozen=True)
class ProblemSet(Generic[AnyProblem]):
    """The problems of one split of a data set, in order, and where they are from."""

    name: str
    problems: Sequence[AnyProblem]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for problem in self.problems:
            if problem.task_id in seen:
                raise ValueError(f"{self.name}: the problem {problem.task_id} occurs twice; task ids must be unique.")
            seen.add(problem.task_id)

    def identity(self) -> dict[str, Any]:
        """What decides prompts and rewards: the source and the content of every problem."""
        content = fingerprint([p.content() for p in self.problems])
        return {"name": self.name, "problems": len(self.problems), "content": content, **self.source}


def from_file(file: str, columns: set[str], name: str, key: str | None, kind: str = "problem") -> Iterator[Row]:
    """Rows of a local file.

    Args:
        columns: those that every row must have.
        name: of the data set, for messages.
        key: of the configuration that names the file; None where none does.
        kind: what a row is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or a line that is no row of this data set.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        advice = f"give dataset.{key}=FILE, or null for the published ones" if key else "check the name"
        raise FileNotFoundError(f"{name}: there is no file {path}; {advice}.")
    for number, line in enumerate(read_unpacked(path).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): write one JSON object a line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no {kind} of {name}: write a JSON object, {{...}}, with its fields.")
        if missing := columns - set(row):
            raise ValueError(f"{where} is no {kind} of {name}: it has no {', '.join(sorted(missing))}.")
        yield where, row


def from_hub(hub_id: str, config: str, split: str | None, name: str, key: str) -> Iterator[Row]:
    """Rows of the hub's data set.

    Args:
        split: the hub's name of a split; None takes all.
        name, key: as for a file.

    Raises:
        OSError: the hub cannot be reached, or refuses.
    """
    try:
        from datasets import load_dataset

        splits = load_dataset(hub_id, config)
        chosen = list(splits) if split is None else [split]
        rows = [(f"{hub_id}, {at} row {i}", dict(row)) for at in chosen for i, row in enumerate(splits[at])]
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"{name} could not be had from the hub as {hub_id} ({first}): check the network, or give a local JSON-lines file by "
            f"dataset.{key}=FILE."
        ) from error
    yield from rows
