"""Rewards of a user: a Python function, or numbers that are there already.

    def reward(prompt, completion, **fields) -> float: ...         # in [0, 1]
    def reward(prompts, completions, **fields) -> list[float]: ...  # batched: lists in, list out

The function is asked for by name: it gets those of `prompt`, `completion`, `task_id` and the prompt's further fields that
its signature has. Batched, it gets lists of them (`prompts` and `completions` are also called by these names). A failure of
the function is raised, never a zero. Where it stops: the function runs in this process, one batch at a time; programs that
a model wrote belong into a sandbox.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qprobe.files import fingerprint
from qprobe.run.pools import RewardBatch, RewardRow
from qprobe.store.jsonl import PromptRow


class RewardError(RuntimeError):
    """A user's reward function failed, or gave what is no reward; the message names function and prompt."""


class FunctionReward:
    """A reward stage that calls a Python function.

    Args:
        where: "module:function" (from the working directory or the installed packages) or "file.py:function".
        prompts: those that the completions belong to, with their further fields.
        batched: whether the function takes lists and gives a list.
    """

    def __init__(self, where: str, prompts: Sequence[PromptRow], batched: bool = False) -> None:
        self.where = where
        self.module_name, _, self.function_name = where.rpartition(":")
        if not self.module_name or not self.function_name:
            raise ValueError(f"The reward is {where!r}: name it as module:function or file.py:function.")
        module = (
            Path(self.module_name).stem if self.module_name.endswith(".py") else self.module_name.rpartition(".")[2]
        )
        self.name = f"{module}.{self.function_name}"
        self.prompts = {row.task_id: row for row in prompts}
        self.batched = batched

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The function, imported.

        Raises:
            ValueError: no such module or function, or the module fails.
        """
        module = _file_module(self.module_name) if self.module_name.endswith(".py") else _module(self.module_name)
        found: Any = module
        for part in self.function_name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            raise ValueError(
                f"The module {self.module_name} has no function {self.function_name}: it has {', '.join(functions) or 'none'}."
            )
        function: Callable[..., Any] = found
        return function

    def identity(self) -> dict[str, Any]:
        """The source is that of the function's whole file, so that a changed constant or helper is seen too."""
        return {
            "reward": "function",
            "function": self.name,
            "batched": self.batched,
            "source": _source_digest(self.function),
            "fields": fingerprint([[key, self._fields(self.prompts[key])] for key in sorted(self.prompts)]),
        }

    def check(self) -> None:
        """Import the function and see that every prompt has what it asks for.

        Raises:
            ValueError: it cannot be imported, or asks for what is not there.
        """
        if inspect.iscoroutinefunction(self.function):
            raise ValueError(f"The reward function {self.where} is async: give a plain function.")
        if not {"completion", *(["completions"] if self.batched else [])} & set(self._parameters):
            hint = " (with --batched it may be completions)" if "completions" in self._parameters else ""
            raise ValueError(
                f"The reward function {self.where} does not take completion{hint}: write it as reward(prompt, completion)."
            )
        for name in self._asked:
            self._check_field(name)

    @functools.cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.function).parameters
        except (TypeError, ValueError) as error:
            raise ValueError(f"The reward {self.where} has no signature to be read: write a plain function.") from error

    @functools.cached_property
    def _asked(self) -> list[str]:
        """Further fields that the function is given."""
        own = {"prompt", "completion", "task_id", *(("prompts", "completions") if self.batched else ())}
        asked = []
        for name, parameter in self._parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                rows = list(self.prompts.values())
                everywhere = set.intersection(*(set(row.fields) for row in rows)) - set(self._parameters)
                asked += [field for field in rows[0].fields if field in everywhere]
            elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise ValueError(
                    f"The reward function {self.where} takes {name!r} by position only: it is given everything by name."
                )
            elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and name not in own:
                asked.append(name)
        return asked

    def _check_field(self, name: str) -> None:
        """A field that is asked for by name is in every line, or in none where it has a default."""
        lacking = [row for row in self.prompts.values() if name not in row.fields]
        optional = name not in self._parameters or self._parameters[name].default is not inspect.Parameter.empty
        if not lacking or (optional and len(lacking) == len(self.prompts)):
            return
        known = sorted({field for row in self.prompts.values() for field in row.fields})
        raise ValueError(
            f"The reward function {self.where} asks for {name!r}, which {len(lacking)} of {len(self.prompts)} prompts have not "
            f"(the first: line {lacking[0].line}): add the field to every line. Besides "
            f"{'prompts and completions' if self.batched else 'prompt, completion'} and task_id the lines have "
            f"{', '.join(known) or 'no field'}."
        )

    def _fields(self, row: PromptRow) -> dict[str, Any]:
        return {name: row.fields[name] for name in self._asked if name in row.fields}

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, self._whole(batch) if self.batched else [self._single(*row) for row in batch.rows]

    def _single(self, task_id: str, sample: int, completion: str) -> RewardRow:
        row = self.prompts[task_id]
        start = time.monotonic()
        given = {"prompt": row.prompt, "completion": completion, "task_id": task_id}
        value = self._called(given | self._fields(row), f"completion {sample} of {self._place(row)}")
        return RewardRow(self._number(value, f"completion {sample} of {self._place(row)}"), seconds=_since(start))

    def _whole(self, batch: RewardBatch) -> list[RewardRow]:
        rows = [self.prompts[task_id] for task_id, _, _ in batch.rows]
        prompts, completions = [row.prompt for row in rows], [completion for _, _, completion in batch.rows]
        given: dict[str, Any] = {"prompt": prompts, "completion": completions, "task_id": [row.task_id for row in rows]}
        given |= {"prompts": prompts, "completions": completions}
        given |= {name: [row.fields[name] for row in rows] for name in self._asked if name in rows[0].fields}
        start = time.monotonic()
        values = self._called(given, f"a batch from {self._place(rows[0])} on")
        if not isinstance(values, list | tuple | np.ndarray) or len(values) != len(rows):
            size = f"{len(values)} values" if isinstance(values, list | tuple | np.ndarray) else repr(values)[:60]
            raise RewardError(
                f"The reward function {self.where} gave {size} for {len(rows)} completions (from {self._place(rows[0])} on): "
                "with --batched it gives a list, one number a completion."
            )
        seconds = _since(start) / len(rows)
        places = [
            f"completion {sample} of {self._place(row)}" for row, (_, sample, _) in zip(rows, batch.rows, strict=True)
        ]
        return [
            RewardRow(self._number(value, place), seconds=seconds) for value, place in zip(values, places, strict=True)
        ]

    def _place(self, row: PromptRow) -> str:
        return f"prompt {row.task_id} (line {row.line})"

    def _called(self, given: dict[str, Any], place: str) -> Any:
        takes_more = {name for name in self._asked if name in given}
        arguments = {name: given[name] for name in given if name in self._parameters or name in takes_more}
        try:
            return self.function(**arguments)
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"The reward function {self.where} failed on {place}: {type(error).__name__}: {error} "
                f"({_origin(error, self.function)}). A failure is no reward: correct it and start the same command again. The "
                "completions are kept; rewards that it gave before are refused then, and the message says what to delete."
            ) from error

    def _number(self, value: Any, place: str) -> float:
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError(
                f"The reward function {self.where} gave {value!r:.60} for {place}: a reward is a number in [0, 1]."
            )
        number = float(value)
        if not 0 <= number <= 1:  # NaN is not
            raise RewardError(
                f"The reward function {self.where} gave {number:g} for {place}: a reward lies in [0, 1]; scale it there."
            )
        return number


class RecordedReward:
    """A reward stage for completions whose rewards are there already.

    Args:
        rewards: by task id, one a completion, in the order of the completions.
    """

    name = "imported"

    def __init__(self, rewards: Mapping[str, Sequence[float]]) -> None:
        self.rewards = rewards

    def identity(self) -> dict[str, Any]:
        content = fingerprint([[key, *self.rewards[key]] for key in sorted(self.rewards)])
        return {"reward": self.name, "rewards": content}

    def check(self) -> None:
        """Nothing can fail: every number was looked at when the file was read."""

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, [RewardRow(self.rewards[task_id][sample]) for task_id, sample, _ in batch.rows]


def _module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise ValueError(
                f"There is no module {name} in the working directory or among the installed packages: name it as "
                "module:function or file.py:function."
            ) from error
        raise _failed_import(name, error) from error


def _file_module(file: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {file}: the reward is named as file.py:function or module:function.")
    _make_importable(path.parent)
    name = f"qprobe_reward_{path.stem}"  # a name of its own, so that no installed package is hidden
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None  # a path that ends in .py has one
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed_import(file, error) from error
    return module


def _make_importable(folder: Path) -> None:
    """Have modules of a folder found, as Python does for a script that lies there."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _failed_import(name: str, error: BaseException) -> ValueError:
    return ValueError(
        f"The module {name} of the reward cannot be imported ({type(error).__name__}: {error}): correct it and start again."
    )


def _source_file(function: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # built in, or an object that is called
        return inspect.getsourcefile(type(function)) if type(function).__module__ != "builtins" else None


def _source_digest(function: Callable[..., Any]) -> str | None:
    """Of the file that the function is written in; None where there is none to be read."""
    file = _source_file(function)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _origin(error: BaseException, function: Callable[..., Any]) -> str:
    """The line of the user's own file that failed; else the last line of all."""
    file = _source_file(function)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _since(start: float) -> float:
    return time.monotonic() - start
