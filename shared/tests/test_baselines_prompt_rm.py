"""Prompt RM: its scores are those of a plain forward pass, and no candidate is cut."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from qprobe import models
from qprobe.baselines.prompt_rm import PromptRM, PromptRMSettings
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool, RewardBatch, Split

TEMPLATE = "Q: {problem}\nA: {candidate}\nRight?"
PROMPTS = [Prompt("a", text="2 + 2 = "), Prompt("b", messages=({"role": "user", "content": "Sum?"},), opening="```\nx")]
ROWS = [("a", 0, "4"), ("a", 1, "five {candidate}"), ("b", 0, " = 1\n"), ("b", 1, "")]
ASKED = [
    "Q: 2 + 2 = \nA: 4\nRight?",
    "Q: 2 + 2 = \nA: five {candidate}\nRight?",
    "Q: Sum?\nA: ```\nx = 1\n```\nRight?",
    "Q: Sum?\nA: ```\nx\n```\nRight?",
]


def plain(spec: ModelSpec, text: str, word: str) -> float:
    """log p(word | text), token by token, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(spec.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(spec.name)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    continued = tokenizer(word, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continued])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(continued))


def score(judge: PromptRM, fakes: ModuleType, folder: Path) -> list[float]:
    pool = Pool(folder, Split("test", PROMPTS, {}), "sample", fakes.Sampler(2), 0)
    ((_, rows),) = judge.scores(pool, folder, [RewardBatch(("a", "b"), ROWS)])
    return [row.reward for row in rows]


def test_scores_are_those_of_a_plain_forward_pass(tiny_model: ModelSpec, fakes: ModuleType, tmp_path: Path) -> None:
    judge = PromptRM(tiny_model, PromptRMSettings(TEMPLATE, good="Yes", bad="Not so"))
    put = [f"<|bos|><|user|>{text}<|end|>\n<|assistant|>\n" for text in ASKED]
    expected = [plain(tiny_model, text, "Yes") - plain(tiny_model, text, "Not so") for text in put]
    assert score(judge, fakes, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_a_model_without_a_chat_template_continues_text(
    tiny_model: ModelSpec, fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Tokenizer, "has_chat_template", False)
    judge = PromptRM(tiny_model, PromptRMSettings(TEMPLATE))
    put = [f"<|bos|>{text}\nReply:" for text in ASKED]
    expected = [plain(tiny_model, text, " Yes") - plain(tiny_model, text, " No") for text in put]
    assert score(judge, fakes, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_a_problem_that_is_too_long_is_cut_from_its_beginning_and_a_candidate_never(tiny_model: ModelSpec) -> None:
    judge, tokenizer = PromptRM(tiny_model, PromptRMSettings(TEMPLATE)), models.load_tokenizer(tiny_model)
    problem = "".join(f"line {n}\n" for n in range(100))
    ids = judge.ask(Prompt("a", text=problem), "the candidate")
    assert len(ids) + max(map(len, judge.words)) <= 192  # the model's context
    assert len(ids) > 100
    text = tokenizer.tokenizer.decode(ids)
    assert "line 99\n\nA: the candidate\nRight?" in text
    assert "line 0\n" not in text
    with pytest.raises(ValueError, match="reads 192"):
        judge.ask(Prompt("a", text="?"), "long " * 100)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"template": "no places"}, "template"),
        ({"template": "{candidate} {problem}"}, "template"),
        ({"template": "{problem} {candidate} {candidate}"}, "template"),
        ({"bad": "Yes"}, "differ"),
        ({"good": " "}, "empty"),
    ],
)
def test_what_cannot_be_asked(changes: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        PromptRMSettings(**{"template": TEMPLATE, **changes})
