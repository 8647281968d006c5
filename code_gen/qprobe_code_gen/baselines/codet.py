"""CodeT: candidates are executed on tests that the model itself writes; those that pass the same tests support each other.

Source: Chen et al. 2022, "CodeT: Code Generation with Generated Tests", arXiv 2207.10397, and the authors' code
(microsoft/CodeT). Theirs: tests are drawn 100 times at temperature 0.8 and top-p 0.95, five assertions of each count; S_x are
the candidates that pass exactly the same tests S_y, and their score is |S_x| |S_y|, both counted as often as they were drawn
(their code has the root of |S_x|; the row is the paper's product). The prompt is code: the function with its docstring but for
examples and with the body `pass`, "# check the correctness of NAME", `assert`.
Ours: tests are a pool of their own (SPLIT.codet); in chats they are asked for, and the answer is opened as their prompt ends; of
the examples, doctests go and MBPP's assertions, which are its unit tests (`written`); a test must call the function, need
nothing but its results, and fail a function that always raises.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qprobe.baselines.base import Ranker
from qprobe.baselines.consistency import Agreement
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, RewardBatch, RewardRow
from qprobe.sampling import Sampler
from qprobe_code_gen.baselines import of_programs, written
from qprobe_code_gen.programs import Problem
from qprobe_code_gen.sandbox import Program

REQUEST = "Write tests for this function: assert statements alone, one a line."
_CPU_SECONDS = 0.5  # for a test; theirs are 0.1 on the clock


@dataclass(frozen=True)
class CodeTSettings:
    """Of a problem: `samples` texts of tests are drawn, and the first `asserts` of each are taken; 1 or more."""

    samples: int = 4
    asserts: int = 5

    def __post_init__(self) -> None:
        if min(self.samples, self.asserts) < 1:
            raise ValueError(f"baselines.codet: samples={self.samples} and asserts={self.asserts} must be at least 1.")


class CodeT(Ranker):
    """Dual execution agreement: `redrawn` makes the sampler of the tests, `agreement` knows the problems and the sandbox."""

    name, method, of_all = "codet", "CodeT (executes)", True

    def __init__(self, settings: CodeTSettings, agreement: Agreement | None, redrawn: Callable[..., Sampler]) -> None:
        self.settings, self.reward = settings, of_programs(agreement, self.name)
        self.chats = self.reward.style.style.startswith("chat")
        stop = ("\n```",) if self.chats else ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
        self.sampler = redrawn(n=settings.samples, temperature=0.8, top_p=0.95, top_k=0, stop=stop)

    def identity(self) -> dict[str, Any]:
        return {"codet": 1, "tests": self.sampler.identity(), **vars(self.settings), "executes": self.reward.identity()}

    def check(self) -> None:
        self.reward.check()
        stages.check(self.sampler)
        self.sampler.tokenizer_fingerprint()  # a model that cannot be had, in a sentence

    def pool(self, tested: Pool) -> Pool:
        """The model's texts of tests, before they are drawn."""
        prompts = [self.prompt(self.reward.problems[prompt.task_id]) for prompt in tested.split.prompts]
        source = {**tested.split.source, "tests of": self.name, "request": REQUEST}
        split = dataclasses.replace(tested.split, prompts=prompts, source=source, recorded=None)
        return Pool(tested.run, split, self.name, self.sampler, tested.seed, tested.batch_rows, tested.shard)

    def prompt(self, problem: Problem) -> Prompt:
        stub, checks = written.stub(problem), f"# check the correctness of {problem.entry_point}\nassert"
        if not self.chats:
            return Prompt(problem.task_id, text=f"{stub}\n\n{checks}")
        asked = f"{REQUEST}\n\n```python\n{stub}\n```"
        return Prompt(problem.task_id, messages=({"role": "user", "content": asked},), opening=f"```python\n{checks}")

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        tests = self.tests(self.pool(tested))
        usual, problems = self.reward.limits, self.reward.problems
        limits = dataclasses.replace(usual, cpu_seconds=min(_CPU_SECONDS, usual.cpu_seconds))
        with self.reward.executor() as executor:
            for batch in batches:
                rows = [(problems[task_id], self.reward.program(task_id, text).code) for task_id, _, text in batch.rows]
                rows += [(problems[key], written.nothing(problems[key])) for key in batch.keys]
                passed: list[set[str]] = [set() for _ in rows]
                due = [(place, test) for place, (problem, _) in enumerate(rows) for test in tests[problem.task_id]]
                programs = (Program(rows[n][1], test, "", limits, written.reference(rows[n][0])) for n, test in due)
                for number, execution in executor.run(programs):
                    if execution.passed:
                        passed[due[number][0]].add(due[number][1])
                found: list[RewardRow] = []
                for key, empty in zip(batch.keys, passed[len(batch.rows) :], strict=True):
                    of_prompt = [passed[place] - empty for place, row in enumerate(batch.rows) if row[0] == key]
                    found += [RewardRow(score) for score in agreed(of_prompt, tests[key])]
                yield batch, found

    def tests(self, pool: Pool) -> dict[str, Counter[str]]:
        """task id -> the model's tests, with how often each was written."""
        stages.sample(pool)
        stages.give_back(pool.sampler)
        found: dict[str, Counter[str]] = {task_id: Counter() for task_id in pool.task_ids}
        for row in pool.completions.read(pool.batches, ["task_id", "completion"]).to_pylist():
            read = written.tests("assert" + row["completion"], self.reward.problems[row["task_id"]])
            found[row["task_id"]].update(read[: self.settings.asserts])
        none = sum(not own for own in found.values())
        tqdm.write(f"CodeT: the model wrote no test for {none} of {len(found)} problems.", file=sys.stderr)
        return found


def agreed(passed: Sequence[set[str]], tests: Counter[str]) -> list[float]:
    """|S_x| * |S_y| of one problem's candidates, by the tests that each passes and how often each was written."""
    alike = Counter(map(frozenset, passed))
    return [float(alike[frozenset(own)] * sum(tests[test] for test in own)) for own in passed]
