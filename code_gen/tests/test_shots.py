"""Successes of a finished run that the prompts of another show."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qprobe.baselines.few_shot import FewShotSettings, Shot
from qprobe.run import rewarding, stages
from qprobe.run.pools import Pool, Split
from qprobe_code_gen.problem_sets import ProblemSet
from qprobe_code_gen.programs import Problem, mbpp
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits
from qprobe_code_gen.shots import shots_of

STYLE = PromptStyle("zero_shot")
RIGHT = "def add_602(x):\n    return x + 602\n"
WRONG = "def add_602(x):\n    return x\n"


@pytest.fixture
def problems(mbpp_row: Callable[..., dict[str, Any]]) -> ProblemSet[Problem]:
    return ProblemSet("mbpp-train", [mbpp.problem_from_row(mbpp_row(number)) for number in (601, 602, 603)])


@pytest.fixture
def run(fakes: ModuleType, problems: ProblemSet[Problem], tmp_path: Path) -> Path:
    """A run with one success: of the second problem, the second completion."""
    prompts = [STYLE.prompt(problem) for problem in problems.problems]
    recorded = {prompt.task_id: [WRONG, RIGHT] for prompt in prompts}
    split = Split("mbpp-train", prompts, {"style": dataclasses.asdict(STYLE)}, recorded)
    pool = Pool(tmp_path, split, "sample", fakes.Sampler(), 0, batch_rows=2)
    stages.sample(pool, progress=False)
    rewarding.reward(pool, UnitTestReward(problems.problems, STYLE, Limits(), 2), progress=False)
    return tmp_path


def shots(run: Path, problems: ProblemSet[Problem], style: PromptStyle = STYLE, count: int = 5) -> list[Shot]:
    prompts = [style.prompt(problem) for problem in problems.problems]
    settings = FewShotSettings(shots=count)
    return shots_of(run, problems.name, prompts, dataclasses.asdict(style), UnitTestReward.name, settings)


def test_the_successes_are_found_with_their_prompts(
    run: Path, problems: ProblemSet[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    (shot,) = shots(run, problems, count=2)
    assert (shot.prompt, shot.completion) == (STYLE.prompt(problems.problems[1]), RIGHT)
    assert "only 1 training prompts" in capsys.readouterr().out


def test_a_run_that_cannot_be_used_is_refused(run: Path, problems: ProblemSet[Problem], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rewards"):
        shots(tmp_path / "none", problems)
    with pytest.raises(ValueError, match="prompt_style"):
        shots(run, problems, style=PromptStyle("chat"))
    with pytest.raises(ValueError, match="MBPP/603"):
        shots(run, dataclasses.replace(problems, problems=problems.problems[:2]))
    next((run / "rewards").rglob("part-*")).unlink()
    with pytest.raises(ValueError, match="2 of 6 rows"):
        shots(run, problems)
    # As many rewards as completions, of one shard.
    next((run / "completions").rglob("part-*")).unlink()
    with pytest.raises(ValueError, match="1 of 3 prompts"):
        shots(run, problems)
