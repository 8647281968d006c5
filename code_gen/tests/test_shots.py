"""Successes of a finished run that stand before the prompts of another."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

from qprobe.baselines.few_shot import FewShotSettings, Shot
from qprobe.run import stages
from qprobe.run.stages import Pool, Split
from qprobe_code_gen.problems import ProblemSet, mbpp
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits
from qprobe_code_gen.shots import shots_of

STYLE = PromptStyle("zero_shot")
PROBLEMS = ProblemSet(
    "mbpp-train",
    [
        mbpp.problem_from_row(
            {
                "task_id": number,
                "text": f"Add {number}.",
                "code": "",
                "test_setup_code": "",
                "test_list": [f"assert add(1) == {number + 1}"],
            }
        )
        for number in (601, 602, 603)
    ],
)
RIGHT = "def add(x):\n    return x + 602\n"


@pytest.fixture
def run(fakes: ModuleType, tmp_path: Path) -> Path:
    """A run with one success: of the second problem, the second completion."""
    prompts = [STYLE.prompt(problem) for problem in PROBLEMS.problems]
    recorded = {prompt.task_id: ["def add(x):\n    return x\n", RIGHT] for prompt in prompts}
    split = Split("mbpp-train", prompts, {"style": dataclasses.asdict(STYLE)}, recorded)
    pool = Pool(tmp_path, split, "sample", fakes.Sampler(), 0, batch_rows=2)
    stages.sample(pool, progress=False)
    stages.reward(pool, UnitTestReward(PROBLEMS.problems, STYLE, Limits(), 2), progress=False)
    return tmp_path


def shots(run: Path, problems: ProblemSet = PROBLEMS, style: PromptStyle = STYLE, count: int = 5) -> list[Shot]:
    prompts = [style.prompt(problem) for problem in problems.problems]
    return shots_of(
        run, problems.name, prompts, dataclasses.asdict(style), UnitTestReward.name, FewShotSettings(shots=count)
    )


def test_the_successes_are_found_with_their_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shot,) = shots(run, count=2)
    assert (shot.prompt, shot.completion) == (STYLE.prompt(PROBLEMS.problems[1]), RIGHT)
    assert "only 1 training prompts have a success" in capsys.readouterr().out


def test_a_run_that_cannot_be_used_is_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no rewards of mbpp-train.sample: run the stages sample and reward"):
        shots(tmp_path / "none")
    with pytest.raises(ValueError, match=r"are put in another way: take the same dataset.prompt_style"):
        shots(run, style=PromptStyle("chat"))
    fewer = dataclasses.replace(PROBLEMS, problems=PROBLEMS.problems[:2])
    with pytest.raises(ValueError, match=r"has completions of MBPP/603, which is no problem of mbpp-train"):
        shots(run, fewer)
    next((run / "rewards").rglob("part-*")).unlink()
    with pytest.raises(
        ValueError, match=r"the stage reward is missing 2 of 6 rows of mbpp-train\.sample in .*: run it"
    ):
        shots(run)
    # As many rewards as completions, of one shard.
    next((run / "completions").rglob("part-*")).unlink()
    with pytest.raises(
        ValueError, match=r"the stage sample is missing 1 of 3 prompts of mbpp-train\.sample in .*: run it"
    ):
        shots(run)
