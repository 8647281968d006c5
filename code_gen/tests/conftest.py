"""What several test files of this half share: configurations, files of problems, executors and their processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from qprobe.models.language_model import ModelSpec
from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.humaneval import problem_from_row
from qprobe_code_gen.sandbox import Executor


@pytest.fixture(scope="session")
def composed() -> Callable[[Iterable[str]], dict[str, Any]]:
    """The configuration that words of the command line give."""

    def compose_all(words: Iterable[str]) -> dict[str, Any]:
        with initialize_config_module("qprobe_code_gen.conf", version_base="1.3"):
            config = OmegaConf.to_container(compose("config", list(words)), resolve=True, throw_on_missing=True)
        assert isinstance(config, dict)
        return {str(key): value for key, value in config.items()}

    return compose_all


@pytest.fixture(scope="session")
def tiny_words(tiny_code_model: ModelSpec) -> list[str]:
    """Words that choose the tiny model, and probes and intervals that take no time."""
    model = ["model=hub", f"model.name={tiny_code_model.name}", "model.dtype=float32", "model.device=cpu"]
    return [*model, "embedder.layers=[2]", "probe.steps=5", "evaluation.seeds=2", "evaluation.bootstrap=100"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def mbpp_row() -> Callable[..., dict[str, Any]]:
    """A row of MBPP: a function that adds the number of the task, unless other columns are given."""

    def row(number: int, **columns: Any) -> dict[str, Any]:
        made = {
            "task_id": number,
            "text": f"Write a function to add {number}.",
            "code": f"def add_{number}(x):\r\n  return x + {number}",
            "test_setup_code": "",
            "test_list": [f"assert add_{number}(1) == {number + 1}"],
        }
        return made | columns

    return row


@pytest.fixture
def local_data(mbpp_row: Callable[..., dict[str, Any]], jsonl: Callable[..., Path]) -> dict[str, list[str]]:
    """Words that name files: five problems of MBPP in each split that experiments read, 11 training and 3 test questions."""
    problems = jsonl([mbpp_row(number) for number in (*range(11, 16), *range(601, 606))], "mbpp.jsonl")
    questions = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(11)]
    train, test = jsonl(questions, "train.jsonl"), jsonl(questions[:3], "test.jsonl")
    return {
        "mbpp": [f"dataset.mbpp_file={problems}"],
        "gsm8k": [f"dataset.train_file={train}", f"dataset.test_file={test}"],
    }


@pytest.fixture(scope="session")
def half_row() -> dict[str, str]:
    """A row of HumanEval."""
    return {
        "task_id": "T/1",
        "prompt": "import math\n\n\ndef half(x: int) -> int:\n    ''' Half of x. '''\n",
        "entry_point": "half",
        "canonical_solution": "    return x // 2\n",
        "test": "def check(candidate):\n    assert candidate(4) == 2\n",
    }


@pytest.fixture(scope="session")
def half(half_row: dict[str, str]) -> Problem:
    """The problem of that row."""
    return problem_from_row(half_row)


@pytest.fixture(scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Two workers that remember nothing, with the `LIMITS` of the module where it has any."""
    with Executor(workers=2, cache=False, limits=getattr(request.module, "LIMITS", None)) as executor:
        yield executor


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], list[int]]:
    """The processes below one, each before those below it; of a process that ends meanwhile none."""

    def below(pid: int) -> list[int]:
        found = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    found += [int(child), *below(int(child))]
        return found

    return below
