"""Coder-Reviewer: both likelihoods are those of a plain forward pass over the texts written out, and the degenerate come last."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.run import stages
from qprobe.run.pools import Pool, RewardBatch, Split, completions_of
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe_code_gen.baselines.coder_reviewer import REQUEST, CoderReviewer, bare_program
from qprobe_code_gen.gsm8k import SameNumber
from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.agreement import OutputsAgree
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward

HEADER, SIGNATURE, DOCSTRING = "import math\n\n", "def f(x):\n", '    """Half of x."""\n'
SUM = Problem("a", "Halve.", HEADER, SIGNATURE, DOCSTRING, "f", "assert f(4) == 2", "")
SAID = Problem("b", "Double a number.", "import os\n", "", "", "g", "assert g(2) == 4", "")
COMPLETIONS = {
    "a": ["    # by two\n    return x / 2\n", "    return math.floor(x)\n", "    pass\n"],
    "b": ['def g(x):\n    """Twice."""\n    return 2 * x\n', "def g(x) return\n"],
}
BARE = [
    "import math\n\ndef f(x):\n    return x / 2",
    "import math\n\ndef f(x):\n    return math.floor(x)",
    "",
    "import os\n\ndef g(x):\n    return 2 * x",
    "",
]


class Plain:
    """log p(text | before), token by token, one sequence at a time."""

    def __init__(self, spec: ModelSpec) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(spec.name, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(spec.name)

    def __call__(self, before: str, text: str) -> tuple[float, int]:
        prompt, own = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, text))
        with torch.no_grad():
            laws = self.model(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
        return sum(float(laws[len(prompt) - 1 + n, token]) for n, token in enumerate(own)), len(own)


def scores(spec: ModelSpec, run: Path, style: PromptStyle, **more: Any) -> list[float]:
    reward = UnitTestReward([SUM, SAID], style)
    prompts = [style.prompt(problem) for problem in (SUM, SAID)]
    split = Split("planted", prompts, {"data": "planted"}, recorded=COMPLETIONS)
    tested = Pool(run, split, "sample", HFSampler(spec, SamplingSettings(1)), 0)
    stages.sample(tested, progress=False)
    rows = [(r["task_id"], r["sample"], r["completion"]) for r in completions_of(tested, ("a", "b"))]
    ranker = CoderReviewer(spec, OutputsAgree(reward), **more)
    ((_, found),) = ranker.scores(tested, run, [RewardBatch(("a", "b"), rows)])
    return [row.reward for row in found]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_both_likelihoods_of_a_plain_forward_pass(
    chat: bool, normalised: bool, tiny_code_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, style = Plain(tiny_code_model), PromptStyle("chat_opened" if chat else "zero_shot")
    read = ['    """Half of x."""'] * 3 + ["Double a number."] * 2
    openings = [SIGNATURE] * 3 + [""] * 2
    if chat:
        asked = [
            f"<|bos|><|user|>```python\n{code}\n```\n\n{REQUEST}<|end|>\n<|assistant|>\n```python\n{opening}"
            for code, opening in zip(BARE, openings, strict=True)
        ]
        coder = [
            f"<|bos|><|user|>{style.request}\n\n{words}<|end|>\n<|assistant|>\n```python{code}"
            for words, code in [("Halve.", f"\n{HEADER}{SIGNATURE.rstrip()}")] * 3
            + [("Double a number.", "\nimport os")] * 2
        ]
    else:
        monkeypatch.setattr(models.Tokenizer, "has_chat_template", False)
        asked = [
            f"<|bos|>{code}\n\n# write the docstring for the above function\n{opening}"
            for code, opening in zip(BARE, openings, strict=True)
        ]
        coder = [f"<|bos|>{SUM.code_prompt}"] * 3 + ["<|bos|>import os\n"] * 2
    written = [text for own in COMPLETIONS.values() for text in own]
    expected = []
    for before, text, reviewed, said, bare in zip(coder, written, asked, read, BARE, strict=True):
        both = [plain(before, text), plain(reviewed, said)]
        value = sum(total / count if normalised else total for total, count in both)
        expected.append(value - (0 if bare else 1e6))
    found = scores(tiny_code_model, tmp_path, style, normalised=normalised)
    assert found == pytest.approx(expected, abs=2e-3, rel=1e-6)
    assert max(found[2], found[4]) < min(found[0], found[1], found[3])


@pytest.mark.parametrize(
    ("code", "bare"),
    [
        (
            '"""M."""\nclass A:\n    """A."""\ndef f(x):\n    """D."""\n    # c\n    return 1',
            "class A:\n    pass\n\ndef f(x):\n    return 1",
        ),
        ("def h():\n    return 1\ndef f(x):\n    return h()", "def h():\n    return 1\n\ndef f(x):\n    return h()"),
        ("def h():\n    return 1\ndef f(x):\n    '''D'''\n", None),
        ("def f(x):\n    return", None),
        ("def f(x):\n    return (", None),
        ("", None),
        ("# nothing", None),
        ("def f(x):\n" + "    x = x + 1\n" * 200 + "    return x", None),
    ],
)
def test_degenerate_programs_are_none_and_others_lose_what_they_say_of_themselves(code: str, bare: str | None) -> None:
    assert bare_program(code, "f") == bare


def test_what_cannot_be_ranked_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="coder_reviewer"):
        CoderReviewer(ModelSpec(), SameNumber())
    reward = UnitTestReward([SUM], PromptStyle("chat"))
    with pytest.raises(OSError, match="could not be had"):
        CoderReviewer(ModelSpec(str(tmp_path / "none")), OutputsAgree(reward)).check()
