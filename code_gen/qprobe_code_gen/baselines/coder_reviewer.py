"""Coder-Reviewer: how likely the program is to the problem, times how likely the problem is to the program.

Source: Zhang et al. 2022, "Coder Reviewer Reranking for Code Generation", arXiv 2211.16490, and the authors' code
(facebookresearch/coder_reviewer_reranking, zeroshot_reviewer.py and sample_selectors.py). Theirs: log p(y|x) + log p(x|y) of
program y and problem x, one model for both; the reviewer reads the program without comments and docstrings, "write the
docstring for the above function", the function's header, and then the docstring, whose likelihood counts; degenerate programs
(empty, `pass`, repetitive, not to be parsed) come last. A normalised variant has means over tokens for sums. The row is the
sums: the paper's rule, and the better one in the table that the authors' README prints (.615 and .596; Codex, sanitized MBPP).
Ours: a model with a chat template is asked in it, and its answer is opened with the header; MBPP has no header, and its
docstring holds its assertions; where a problem has no docstring, its description is read; the end of the program is not. Not
done: the function's name becoming `f`, prints removed, and the variants that first execute the programs.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.baselines.base import Ranker
from qprobe.baselines.consistency import Agreement
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool, RewardBatch, RewardRow, completions_of
from qprobe.run.stages import tokens_of
from qprobe_code_gen.baselines import of_programs
from qprobe_code_gen.baselines.written import parsed
from qprobe_code_gen.programs import Problem

REQUEST = "Write the docstring for this function."
_REPETITIVE = 0.25  # of its length that a program is packed to
_DEGENERATE = 1e6  # nats, more than a likelihood comes to: such programs are behind all others
_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class CoderReviewer(Ranker):
    """Likelihoods of program and problem, each given the other.

    Args:
        model: reads both; it need not be the one that drew.
        agreement: that of programs, which knows the problems.
        normalised: sum the means over tokens.
    """

    name = "coder_reviewer"

    def __init__(self, model: ModelSpec, agreement: Agreement | None, normalised: bool = False) -> None:
        self.reward = of_programs(agreement, self.name)
        self.likelihood, self.normalised = Likelihood(model), normalised
        self.method = f"Coder-Reviewer{' (per token)' if normalised else ''}"

    def identity(self) -> dict[str, Any]:
        reading = {key: self.reward.identity()[key] for key in ("style", "reader")}
        return {"read": self.likelihood.identity(), "request": REQUEST, "normalised": self.normalised, **reading}

    def check(self) -> None:
        models.load_tokenizer(self.likelihood.model)  # a model that cannot be had, in a sentence

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        prompts = {row["task_id"]: row for row in tested.prompts.read([tested.task_ids]).to_pylist()}
        for batch in batches:
            rows = completions_of(tested, batch.keys)
            of_program = self._read(*tokens_of(tested, batch.keys, rows, prompts, self.likelihood))
            problems = [self.reward.problems[task_id] for task_id, _, _ in batch.rows]
            programs = [self.reward.program(task_id, text).code for task_id, _, text in batch.rows]
            bare = [bare_program(code, of.entry_point) for code, of in zip(programs, problems, strict=True)]
            asked = [self.ask(problem, code or "") for problem, code in zip(problems, bare, strict=True)]
            of_problem = self._read([ids for ids, _ in asked], [[said] for _, said in asked])
            found = zip(of_program, of_problem, bare, strict=True)
            yield batch, [RewardRow(own + other - _DEGENERATE * (code is None)) for own, other, code in found]

    def _read(self, prompts: Sequence[list[int]], texts: Sequence[Sequence[list[int]]]) -> list[float]:
        found = [value for of_prompt in self.likelihood.log_likelihood(prompts, texts) for value in of_prompt]
        counts = [max(1, len(ids)) for of_prompt in texts for ids in of_prompt]
        return [value / count if self.normalised else value for value, count in zip(found, counts, strict=True)]

    def ask(self, problem: Problem, program: str) -> tuple[list[int], list[int]]:
        """What the reviewer reads before the problem, and the problem: token ids."""
        tokenizer, header = models.load_tokenizer(self.likelihood.model), problem.signature
        fenced = f"```python\n{program}\n```\n\n{REQUEST}"
        prompt = (
            Prompt(problem.task_id, messages=({"role": "user", "content": fenced},), opening=f"```python\n{header}")
            if tokenizer.has_chat_template
            else Prompt(problem.task_id, text=f"{program}\n\n# write the docstring for the above function\n{header}")
        )
        said = problem.docstring.rstrip() or problem.description
        return tokenizer.render_prompt(prompt)[1], tokenizer.encode_completion(said)


def bare_program(code: str, entry_point: str) -> str | None:
    """A program without comments and docstrings; None where it is degenerate."""
    try:
        tree = parsed(code)
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        bare = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    named = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point]
    empty = all(map(_does_nothing, named[-1].body)) if named else not tree.body
    repetitive = len(zlib.compress(bare.encode())) <= _REPETITIVE * len(bare.encode())
    return None if empty or repetitive else bare


def _does_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Return) and node.value is None)
