"""The implicit judge on tiny real models, against log-likelihoods by stock transformers, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe_preference.judges import Comparison, Judgement, configured, implicit
from qprobe_preference.judges.implicit import ImplicitJudge, Side

CHAT = ({"role": "user", "content": "What is the sum?"},)
END = 4  # <|end|>, what the tiny chat template puts behind an answer
EOS = 1


@pytest.fixture(scope="session")
def other_model(make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """The tiny Llama with other random weights."""
    return make_model(seed=1)


@pytest.fixture
def judge(tiny_model: ModelSpec, other_model: ModelSpec) -> ImplicitJudge:
    """The tiny model against the other one."""
    return ImplicitJudge(Side(tiny_model), Side(other_model))


@pytest.fixture
def reward(stock_logprobs: Callable[[ModelSpec, Sequence[int]], torch.Tensor]) -> Callable[..., float]:
    """log pi_a(answer | prompt) - log pi_b(answer | prompt) by stock transformers; each side a model and its prompt's text."""

    def one(spec: ModelSpec, text: str, answer: Sequence[int]) -> float:
        prompt = ids(spec, text)
        after = stock_logprobs(spec, [*prompt, *answer])
        return sum(float(after[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))

    def difference(a: tuple[ModelSpec, str], b: tuple[ModelSpec, str], answer: str, *end: int) -> float:
        tokens = [*ids(a[0], answer), *end]
        return one(*a, tokens) - one(*b, tokens)

    return difference


def ids(spec: ModelSpec, text: str) -> list[int]:
    encoded: list[int] = models.load_tokenizer(spec).tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


def rendered(system: str | None = None) -> str:
    turns = "" if system is None else f"<|system|>{system}<|end|>\n"
    return f"<|bos|>{turns}<|user|>What is the sum?<|end|>\n<|assistant|>\n"


def rewards(judgement: Judgement) -> list[float]:
    values = json.loads(judgement.detail)
    return [values["first"], values["second"]]


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("end", [True, False])
def test_rewards_of_two_models_are_differences_of_log_likelihoods(
    tiny_model: ModelSpec, other_model: ModelSpec, reward: Callable[..., float], per: str, end: bool
) -> None:
    judge = ImplicitJudge(Side(tiny_model), Side(other_model), per=per, end=end)
    answers = ["the letters", "first + second of the word"]
    (judgement,) = judge.compare([Comparison("t", CHAT, *answers)])
    sides = (tiny_model, rendered()), (other_model, rendered())
    expected = [reward(*sides, answer, *[END] * end) for answer in answers]
    if per == "token":
        expected = [
            total / (len(ids(tiny_model, answer)) + end) for total, answer in zip(expected, answers, strict=True)
        ]
    assert rewards(judgement) == pytest.approx(expected, abs=1e-4)
    assert judgement.win == float(expected[0] > expected[1])


@pytest.mark.parametrize(
    ("prompt", "systems", "first", "opening", "texts"),
    [
        # Plain text is continued behind the system prompt and ends with the end of the sequence.
        ("The sum", ("Be good.", None), " is", "", ("<|bos|>Be good.\n\nThe sum", "<|bos|>The sum")),
        ("The sum", ("Be good.", None), "", "", ("<|bos|>Be good.\n\nThe sum", "<|bos|>The sum")),
        # A system message of the conversation stays behind the side's own.
        (
            ({"role": "system", "content": "Be brief."}, *CHAT),
            ("Good.", "Bad."),
            "yes",
            "",
            (rendered("Good.\n\nBe brief."), rendered("Bad.\n\nBe brief.")),
        ),
        # An opening is part of the prompt.
        (CHAT, (None, None), " of the word", "The letters", (rendered() + "The letters",) * 2),
    ],
)
def test_a_prompt_is_read_with_its_system_prompts_and_opening(
    tiny_model: ModelSpec,
    other_model: ModelSpec,
    reward: Callable[..., float],
    prompt: Any,
    systems: tuple[str | None, str | None],
    first: str,
    opening: str,
    texts: tuple[str, str],
) -> None:
    judge = ImplicitJudge(Side(tiny_model, systems[0]), Side(other_model, systems[1]))
    (judgement,) = judge.compare([Comparison("t", prompt, first, "no", opening=opening)])
    end = EOS if isinstance(prompt, str) else END
    expected = reward((tiny_model, texts[0]), (other_model, texts[1]), first, end)
    assert rewards(judgement)[0] == pytest.approx(expected, abs=1e-4)


def test_one_model_under_two_system_prompts_is_loaded_once(tiny_model: ModelSpec, reward: Callable[..., float]) -> None:
    judge = ImplicitJudge(Side(tiny_model, "Be good."), Side(tiny_model, "Be bad."), soft=True, beta=0.1)
    judge.check()
    (judgement,) = judge.compare([Comparison("t", CHAT, "yes", "no")])
    sides = [(tiny_model, rendered(system)) for system in ("Be good.", "Be bad.")]
    expected = [reward(*sides, answer, END) for answer in ("yes", "no")]
    assert rewards(judgement) == pytest.approx(expected, abs=1e-4)
    sigmoid = torch.sigmoid(torch.tensor(0.1 * (expected[0] - expected[1]), dtype=torch.float64))
    assert judgement.win == pytest.approx(float(sigmoid), abs=1e-5)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_an_answer_without_tokens_has_reward_0(tiny_model: ModelSpec, other_model: ModelSpec, per: str) -> None:
    judge = ImplicitJudge(Side(tiny_model), Side(other_model), end=False, per=per)
    judgements = judge.compare([Comparison("t", CHAT, "", "yes"), Comparison("u", "Hi", "", "")])
    assert rewards(judgements[0])[0] == 0.0
    assert rewards(judgements[1]) == [0.0, 0.0]
    assert judgements[1].verdict == "tie"


def test_a_prompts_answers_are_scored_once_together_and_equal_ones_tie(
    judge: ImplicitJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    class Counted(implicit.Likelihood):  # type: ignore[misc]
        def log_likelihood(self, prompts: Any, completions: Any) -> Any:
            rows.append(sum(map(len, completions)))
            return super().log_likelihood(prompts, completions)

    monkeypatch.setattr(implicit, "Likelihood", Counted)
    comparisons = [Comparison("t", CHAT, text, "the") for text in ("a", "word", "the", "a", " a\n")]
    comparisons.append(Comparison("u", "other text", "the", "a"))
    judgements = judge.compare(comparisons)
    assert rows == [5, 5]
    assert judgements[2].verdict == "tie"
    assert judgements[0] == judgements[3] == judgements[4]  # white space around a turn is not read
    alone = [judge.compare([comparison])[0] for comparison in comparisons]
    for together, single in zip(judgements, alone, strict=True):
        assert rewards(together) == pytest.approx(rewards(single), abs=1e-4)


def test_swapping_the_answers_or_the_sides_turns_the_judgement(tiny_model: ModelSpec, other_model: ModelSpec) -> None:
    forward = ImplicitJudge(Side(tiny_model), Side(other_model), soft=True)
    backward = ImplicitJudge(Side(other_model), Side(tiny_model), soft=True)
    win = forward.compare([Comparison("t", CHAT, "yes", "no")])[0].win
    assert forward.compare([Comparison("t", CHAT, "no", "yes")])[0].win == pytest.approx(1 - win)
    assert backward.compare([Comparison("t", CHAT, "yes", "no")])[0].win == pytest.approx(1 - win)


def test_what_exceeds_the_context_is_counted_and_the_rest_is_judged(judge: ImplicitJudge) -> None:
    long = [Comparison("t", CHAT, "x" * 300, "no"), Comparison("u", "z" * 300, "yes", "no")]
    judgements = judge.compare([long[0], Comparison("t", CHAT, "yes", "no"), long[1]])
    assert [j.verdict for j in judgements] == ["too_long", judgements[1].verdict, "too_long"]
    assert judgements[1].verdict in ("win", "loss")
    assert judgements[0].win == judgements[2].win == 0.5
    assert [j.verdict for j in judge.compare(long[1:])] == ["too_long"]


def test_sides_that_are_the_same_and_unknown_means_are_refused(tiny_model: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"judge\.a and judge\.b"):
        ImplicitJudge(Side(tiny_model, "x"), Side(tiny_model, "x"))
    with pytest.raises(ValueError, match=r"judge\.per"):
        ImplicitJudge(Side(tiny_model, "x"), Side(tiny_model), per="word")


def test_a_chat_template_that_drops_or_refuses_system_prompts_is_said_before_any_work(
    make_model: Callable[..., ModelSpec],
) -> None:
    users = "{% for m in messages if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    drops = make_model(chat_template=users)
    with pytest.raises(ValueError, match="leaves system prompts out"):
        ImplicitJudge(Side(drops, "Be good."), Side(drops)).check()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + users
    with pytest.raises(ValueError, match="no system role"):
        ImplicitJudge(Side(make_model(chat_template=refuses), "Be good."), Side(drops)).check()


def test_a_model_without_a_chat_template_takes_plain_text_only(make_model: Callable[..., ModelSpec]) -> None:
    plain = make_model(chat_template=None)
    judge = ImplicitJudge(Side(plain, "Good."), Side(plain, "Bad."))
    judge.check()
    with pytest.raises(ValueError, match="chat template"):
        judge.compare([Comparison("t", CHAT, "yes", "no")])


def test_the_identity_knows_what_decides_and_no_more(tiny_model: ModelSpec) -> None:
    def identity(**changes: Any) -> str:
        return json.dumps(ImplicitJudge(Side(tiny_model, "Good."), Side(tiny_model, "Bad."), **changes).identity())

    assert identity(beta=2.0) == identity()  # beta scales soft judgements only
    different = [identity(), identity(per="token"), identity(end=False), identity(soft=True), identity(tie=0.1)]
    assert len({*different, identity(soft=True, beta=2.0)}) == 6


def test_the_shipped_configuration_is_one_model_under_two_system_prompts(conf: Path, tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(conf / "judge" / "implicit.yaml"), resolve=True)
    judge = configured(values, tmp_path)
    assert isinstance(judge, ImplicitJudge)
    a, b = judge.sides
    assert a.model == b.model == ModelSpec()
    assert a.system != b.system
    assert judge.name == "judge-implicit-embedded"
    with pytest.raises(ValueError, match=r"judge\.a\.model has no key nam"):
        configured(values | {"a": {"model": {"nam": "x"}}}, tmp_path)
