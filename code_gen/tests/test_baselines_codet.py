"""CodeT: planted candidates and planted tests of a fake sampler, scores by hand; hostile texts change no order."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import qprobe_code_gen.__main__ as command
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, RewardBatch, Split, completions_of
from qprobe.sampling import Completion, SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe_code_gen.baselines import written
from qprobe_code_gen.baselines.codet import CodeT, CodeTSettings, agreed
from qprobe_code_gen.gsm8k import SameNumber
from qprobe_code_gen.programs import Problem, mbpp
from qprobe_code_gen.programs.agreement import OutputsAgree
from qprobe_code_gen.programs.humaneval import load
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits

RIGHT = ["    return x * x\n", "    return x ** 2\n", "    return sum([x] * x)\n"]
WRONG = ["    return x + x\n", "    return 2 * x\n", "    raise ValueError\n", "    return [\n"]
CANDIDATES = [*RIGHT, *WRONG]


def problem(name: str) -> Problem:
    signature, docstring = f"def {name}(x):\n", '    """Square.\n\n    >>> square(3)\n    9\n    """\n'
    return Problem(
        name, "Square.", "", signature, docstring, name, f"assert {name}(7) == 49", f"{signature}    return 0\n"
    )


class Writes:
    """Sample i of every prompt is text i, with the function's name for NAME."""

    def __init__(self, texts: Sequence[str], **law: Any) -> None:
        self.texts, self.settings, self.calls = texts, SamplingSettings(**law), 0

    def identity(self) -> dict[str, Any]:
        return {"sampler": "writes", **self.settings.identity()}

    def prompt_identity(self) -> dict[str, Any]:
        return {"name": "writes"}

    def tokenizer_fingerprint(self) -> None:
        return None

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        text = prompt.text or prompt.messages[-1]["content"]
        return text + prompt.opening, list((text + prompt.opening).encode())

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        self.calls += 1
        names = [bytes(ids).decode().rpartition("correctness of ")[2].split()[0] for ids in prompts]
        return [
            [
                Completion(text.replace("NAME", name), None, "stop", -1.0, seed)
                for text, seed in zip(self.texts, own, strict=True)
            ]
            for name, own in zip(names, seeds, strict=True)
        ]


def ranker(texts: Sequence[str], style: str = "zero_shot", asserts: int = 5, names: str = "fg", **more: Any) -> CodeT:
    limits = Limits(cpu_seconds=0.2, wall_seconds=5.0)
    reward = UnitTestReward([problem(name) for name in names], PromptStyle(style), limits, workers=2, **more)
    settings = CodeTSettings(len(texts), asserts)
    return CodeT(settings, OutputsAgree(reward), lambda **law: Writes(texts, **law))


def pool(codet: CodeT, run: Path, candidates: Sequence[str] = CANDIDATES) -> Pool:
    problems, style = codet.reward.problems, codet.reward.style
    assert isinstance(style, PromptStyle)
    prompts = [style.prompt(of) for of in problems.values()]
    split = Split("planted", prompts, {"data": "planted"}, recorded=dict.fromkeys(problems, candidates))
    tested = Pool(run, split, "sample", Writes([""], n=1), 0, batch_rows=len(candidates))
    stages.sample(tested, progress=False)
    return tested


def batches(tested: Pool) -> list[RewardBatch]:
    read = {keys: completions_of(tested, keys) for keys in tested.batches}
    return [RewardBatch(k, [(r["task_id"], r["sample"], r["completion"]) for r in rows]) for k, rows in read.items()]


def scores(codet: CodeT, run: Path) -> list[list[float]]:
    tested = pool(codet, run)
    return [[row.reward for row in rows] for _, rows in codet.scores(tested, run, iter(batches(tested)))]


def test_candidates_that_pass_the_same_tests_score_their_number_times_that_of_the_tests(tmp_path: Path) -> None:
    # Each goes on behind "assert", as the prompt ends. In all f(2) == 4 thrice, f(3) == 9 once, f(3) == 6 twice.
    texts = [
        " NAME(2) == 4\nassert NAME(3) == 9\n",
        " NAME(2)   == 4\nassert (NAME(3)\n    == 6)\nprint(NAME(1))\nx = 1\n",
        " NAME(2) == 4\n\nassert NAME(3) == 6, 'two of'\nassert NAME(2) == 4",
    ]
    # The message makes another test of the second f(3) == 6: it counts beside the first.
    right, wrong = 3 * (3 + 1), 2 * (3 + 1 + 1)
    assert scores(ranker(texts, asserts=2), tmp_path) == [[right] * 3 + [wrong] * 2 + [0, 0]] * 2


def test_the_product_is_the_papers_and_counts_what_was_written_often() -> None:
    passed = [{"a", "b"}, {"b", "a"}, {"c"}, set()]
    assert agreed(passed, Counter(a=1, b=1, c=9)) == [4, 4, 9, 0]
    assert agreed([set(), set()], Counter()) == [0, 0]


def test_hostile_texts_give_no_wrong_candidate_anything_and_reach_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "written"
    honest = " NAME(2) == 4\nassert NAME(3) == 9\nassert NAME(5) == 25"
    hostile = [
        f" True\nimport os\nos.system('touch {mark}')\nwhile True: pass\nraise SystemExit\nassert 1 == 1",
        f" NAME(2) == __import__('os').system('touch {mark}')\nassert open({str(mark)!r}, 'w') and NAME(2) or True",
        " NAME(2) == exit()\nassert sys.exit(NAME(2)) or True\nassert [None for _ in iter(int, 1)] or NAME(2) or True",
        " NAME(\nassert NAME(" + "(" * 3000 + "\nassert NAME(2) == '\0'\nassert other(2) == 4\nassert lambda: NAME(2)",
        " NAME.__globals__.clear() or NAME(2)\nassert globals().update(NAME=abs) or NAME(2) == 2\nassert NAME(2) == NAME",
        " NAME(2) == " + "9" * 5000 + "\nassert NAME(10 ** 10 ** 10) == 4\nassert (NAME := abs) and NAME(4) == 4",
    ]
    expected = scores(ranker([honest], names="f"), tmp_path / "honest")
    assert expected == [[3 * 3] * 3 + [2 * 1] * 2 + [0, 0]]
    found = scores(ranker([honest, *hostile], asserts=9, names="f", one_process=False), tmp_path / "hostile")
    assert found == expected
    assert not mark.exists()
    assert written.tests("assert True\nassert 1 == 1\nassert f(1)\nassert g(1)", problem("f")) == ["assert f(1)"]


def test_what_is_true_of_all_is_no_reason_to_prefer_any(tmp_path: Path) -> None:
    (found,) = scores(ranker([" NAME(2) == NAME(2)\nassert NAME(3) or True\nassert NAME(3) == 9"], names="f"), tmp_path)
    assert found == [9, 9, 9, 4, 4, 0, 0]


def test_tests_are_drawn_once_and_a_killed_run_goes_on_with_them(tmp_path: Path) -> None:
    whole = scores(ranker([" NAME(2) == 4"], names="fgh"), tmp_path / "whole")
    first = ranker([" NAME(2) == 4"], names="fgh")
    tested = pool(first, tmp_path / "killed")
    next(first.scores(tested, tmp_path, iter(batches(tested))))
    again = ranker([" NAME(2) == 5"], names="fgh")
    rest = list(again.scores(tested, tmp_path, iter(batches(tested)[1:])))
    assert (first.sampler.calls, again.sampler.calls) == (1, 0)  # type: ignore[attr-defined]
    assert [[row.reward for row in rows] for _, rows in rest] == whole[1:]
    other = ranker([" NAME(2) == 4", " NAME(2) == 4"], names="fgh")
    assert other.pool(tested).completions.identity != first.pool(tested).completions.identity


@pytest.mark.parametrize("style", ["zero_shot", "chat_continued"])
def test_the_prompt_is_the_papers_and_gives_no_output_away(style: str) -> None:
    codet = ranker([""], style)
    found = codet.prompt(problem("f"))
    code = 'def f(x):\n    """Square.\n    """\n    pass'
    ends = "# check the correctness of f\nassert"
    if style == "zero_shot":
        assert found.text == f"{code}\n\n{ends}"
    else:
        assert f"```python\n{code}\n```" in found.messages[0]["content"]
        assert found.opening == f"```python\n{ends}"
    law = codet.sampler.settings
    assert (law.n, law.temperature, law.top_p, law.top_k) == (1, 0.8, 0.95, 0)


def test_no_problem_shows_its_unit_tests() -> None:
    for own in mbpp.load("mbpp-test").problems:
        shown = written.stub(own)
        assert not any(test.partition("==")[2].strip() and test in shown for test in own.tests.split("\n"))
        assert f"def {own.entry_point}(" in shown
    for own in load().problems:
        assert f"def {own.entry_point}(" in written.stub(own)
        assert ">>>" not in written.stub(own) or own.task_id in ("HumanEval/115",)


def test_what_cannot_be_ranked_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="codet"):
        CodeT(CodeTSettings(), SameNumber(), lambda **law: Writes([""], **law))
    with pytest.raises(ValueError, match="asserts"):
        CodeTSettings(asserts=0)


def test_where_a_run_is_recorded_the_named_model_reads_candidates_and_writes_tests(
    composed: Callable[[Iterable[str]], dict[str, Any]],
    tiny_words: list[str],
    tiny_code_model: ModelSpec,
    tmp_path: Path,
) -> None:
    words = ["experiment=recorded", "limit=2", "sampler.n=2", "evaluation.folds=2", f"paths.runs={tmp_path}"]
    own = ["+sampler.max_new_tokens=9", "baselines.codet.samples=1"]
    names = "baselines.names=[deepconf,coder_reviewer,codet]"
    pipeline = command.make_pipeline(composed([*words, *own, *tiny_words[1:4], names]))
    codet = pipeline.baselines[-1]
    assert isinstance(codet, CodeT)
    assert isinstance(codet.sampler, HFSampler)
    assert codet.sampler.model == tiny_code_model
    pipeline.execute(["sample", "baselines"])
    rows = pipeline.every_baseline().rankings(pipeline.test_pools[0])
    assert [(name, values.shape) for name, values in rows.items() if values is not None] == [
        (method, (1, 4)) for method in ("DeepConf", "Coder-Reviewer", "CodeT (executes)")
    ]
    told = composed([*words, f"paths.runs={tmp_path}/other", "baselines.names=[deepconf]"])
    with pytest.raises(OSError, match="could not be had"):  # the recording's own name, which is no model here
        command.make_pipeline(told).execute(["sample", "baselines"])
    assert not (tmp_path / "other").exists()
