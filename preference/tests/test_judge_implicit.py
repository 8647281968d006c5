"""The implicit judge on tiny real models, against log-likelihoods by stock transformers, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import qprobe_preference
from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe_preference.judges import Comparison, Judgement, configured
from qprobe_preference.judges.implicit import ImplicitJudge, Side

CONFIG = Path(qprobe_preference.__file__).parent / "conf" / "judge" / "implicit.yaml"
CHAT = ({"role": "user", "content": "What is the sum?"},)
END = 4  # <|end|>, what the tiny chat template puts behind an answer
EOS = 1
LogProbs = Callable[[ModelSpec, Sequence[int]], torch.Tensor]


class Reference:
    """Log-likelihoods one sequence at a time, by the stock model."""

    def __init__(self, logprobs: LogProbs, spec: ModelSpec) -> None:
        self.logprobs, self.spec = logprobs, spec
        self.rows = 0

    def log_likelihood(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        self.rows += sum(map(len, completions))
        return [
            [self.one(prompt, ids) for ids in of_prompt] for prompt, of_prompt in zip(prompts, completions, strict=True)
        ]

    def one(self, prompt: Sequence[int], ids: Sequence[int]) -> float:
        after = self.logprobs(self.spec, [*prompt, *ids])
        return sum(float(after[len(prompt) - 1 + place, token]) for place, token in enumerate(ids))


Make = Callable[..., tuple[ImplicitJudge, dict[ModelSpec, Reference]]]


@pytest.fixture
def make(stock_logprobs: LogProbs) -> Make:
    def judge(a: Side, b: Side, **changes: Any) -> tuple[ImplicitJudge, dict[ModelSpec, Reference]]:
        made: dict[ModelSpec, Reference] = {}
        likelihood = lambda spec: made.setdefault(spec, Reference(stock_logprobs, spec))  # noqa: E731
        return ImplicitJudge(a, b, likelihood=likelihood, **changes), made

    return judge


@pytest.fixture(scope="session")
def other_model(make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """The tiny Llama with other random weights."""
    return make_model(seed=1)


def ids(spec: ModelSpec, text: str) -> list[int]:
    encoded: list[int] = models.load_tokenizer(spec).tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


def rendered(system: str | None) -> str:
    turns = "" if system is None else f"<|system|>{system}<|end|>\n"
    return f"<|bos|>{turns}<|user|>What is the sum?<|end|>\n<|assistant|>\n"


def rewards(judgement: Judgement) -> list[float]:
    values = json.loads(judgement.detail)
    return [values["first"], values["second"]]


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("end", [True, False])
def test_rewards_of_two_models_are_differences_of_log_likelihoods(
    tiny_model: ModelSpec, other_model: ModelSpec, stock_logprobs: LogProbs, make: Make, per: str, end: bool
) -> None:
    judge, _ = make(Side(tiny_model), Side(other_model), per=per, end=end)
    answers = ["the letters", "first + second of the word"]
    (judgement,) = judge.compare([Comparison("t", CHAT, *answers)])
    expected = []
    for answer in answers:
        tokens = ids(tiny_model, answer) + ([END] if end else [])
        a, b = (
            Reference(stock_logprobs, spec).one(ids(spec, rendered(None)), tokens) for spec in (tiny_model, other_model)
        )
        expected.append((a - b) / (len(tokens) if per == "token" else 1))
    assert rewards(judgement) == pytest.approx(expected, abs=1e-6)
    assert judgement.win == float(expected[0] > expected[1])


def test_the_cores_own_log_likelihoods_give_the_same_judgements(
    tiny_model: ModelSpec, other_model: ModelSpec, make: Make
) -> None:
    comparisons = [
        Comparison("t", CHAT, "the letters", "first + second of the word"),
        Comparison("t", CHAT, "", "the letters"),
        Comparison("u", "The sum", " is", ""),
        Comparison("v", "z" * 300, "a", "b"),
    ]
    for changes in ({"end": False, "per": "token"}, {"end": True, "soft": True}):
        slow = make(Side(tiny_model, "Be good."), Side(other_model), **changes)[0].compare(comparisons)
        fast = ImplicitJudge(Side(tiny_model, "Be good."), Side(other_model), **changes).compare(comparisons)
        assert [j.verdict for j in fast] == [j.verdict for j in slow]
        assert fast[3].verdict == "too_long"
        for one, other in zip(fast[:3], slow[:3], strict=True):
            assert rewards(one) == pytest.approx(rewards(other), abs=1e-4)
    only_too_long = ImplicitJudge(Side(tiny_model), Side(other_model)).compare(comparisons[3:])
    assert [j.verdict for j in only_too_long] == ["too_long"]


def test_one_model_under_two_system_prompts_is_loaded_once(
    tiny_model: ModelSpec, stock_logprobs: LogProbs, make: Make
) -> None:
    judge, made = make(Side(tiny_model, "Be good."), Side(tiny_model, "Be bad."), soft=True, beta=0.1)
    judge.check()
    (judgement,) = judge.compare([Comparison("t", CHAT, "yes", "no")])
    expected = []
    for answer in ("yes", "no"):
        a, b = (
            Reference(stock_logprobs, tiny_model).one(
                ids(tiny_model, rendered(system)), [*ids(tiny_model, answer), END]
            )
            for system in ("Be good.", "Be bad.")
        )
        expected.append(a - b)
    assert rewards(judgement) == pytest.approx(expected, abs=1e-6)
    sigmoid = torch.sigmoid(torch.tensor(0.1 * (expected[0] - expected[1]), dtype=torch.float64))
    assert judgement.win == pytest.approx(float(sigmoid))
    assert list(made) == [tiny_model]


def test_plain_text_is_continued_and_ends_with_the_end_of_the_sequence(
    tiny_model: ModelSpec, other_model: ModelSpec, stock_logprobs: LogProbs, make: Make
) -> None:
    judge, _ = make(Side(tiny_model, "Be good."), Side(other_model))
    (judgement,) = judge.compare([Comparison("t", "The sum", " is", "")])
    texts = {tiny_model: "Be good.\n\nThe sum", other_model: "The sum"}
    expected = []
    for answer in (" is", ""):
        a, b = (
            Reference(stock_logprobs, spec).one([0, *ids(spec, text)], [*ids(spec, answer), EOS])
            for spec, text in texts.items()
        )
        expected.append(a - b)
    assert rewards(judgement) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_an_answer_without_tokens_has_reward_0(
    tiny_model: ModelSpec, other_model: ModelSpec, make: Make, per: str
) -> None:
    judge, _ = make(Side(tiny_model), Side(other_model), end=False, per=per)
    judgements = judge.compare([Comparison("t", CHAT, "", "yes"), Comparison("u", "Hi", "", "")])
    assert rewards(judgements[0])[0] == 0.0
    assert rewards(judgements[1]) == [0.0, 0.0]
    assert judgements[1].verdict == "tie"


def test_a_prompts_answers_are_scored_once_together_and_equal_ones_tie(
    tiny_model: ModelSpec, other_model: ModelSpec, make: Make
) -> None:
    judge, made = make(Side(tiny_model), Side(other_model))
    comparisons = [Comparison("t", CHAT, text, "the") for text in ("a", "word", "the", "a")]
    comparisons.append(Comparison("u", "other text", "the", "a"))
    judgements = judge.compare(comparisons)
    assert [reference.rows for reference in made.values()] == [5, 5]
    assert judgements[2].verdict == "tie"
    assert judgements[0] == judgements[3]
    alone = [judge.compare([comparison])[0] for comparison in comparisons]
    for together, single in zip(judgements, alone, strict=True):
        assert rewards(together) == pytest.approx(rewards(single))


def test_swapping_the_answers_or_the_sides_turns_the_judgement(
    tiny_model: ModelSpec, other_model: ModelSpec, make: Make
) -> None:
    forward, _ = make(Side(tiny_model), Side(other_model), soft=True)
    backward, _ = make(Side(other_model), Side(tiny_model), soft=True)
    win = forward.compare([Comparison("t", CHAT, "yes", "no")])[0].win
    assert forward.compare([Comparison("t", CHAT, "no", "yes")])[0].win == pytest.approx(1 - win)
    assert backward.compare([Comparison("t", CHAT, "yes", "no")])[0].win == pytest.approx(1 - win)


def test_what_exceeds_the_context_is_counted_and_the_rest_is_judged(
    tiny_model: ModelSpec, other_model: ModelSpec, make: Make
) -> None:
    judge, _ = make(Side(tiny_model), Side(other_model))
    comparisons = [
        Comparison("t", CHAT, "x" * 300, "no"),
        Comparison("t", CHAT, "yes", "no"),
        Comparison("u", "z" * 300, "yes", "no"),
    ]
    judgements = judge.compare(comparisons)
    assert [j.verdict for j in judgements] == ["too_long", judgements[1].verdict, "too_long"]
    assert judgements[1].verdict in ("win", "loss")
    assert judgements[0].win == judgements[2].win == 0.5


def test_a_system_message_of_the_conversation_stays_behind_the_sides_own(
    tiny_model: ModelSpec, stock_logprobs: LogProbs, make: Make
) -> None:
    judge, _ = make(Side(tiny_model, "Good."), Side(tiny_model, "Bad."), end=False)
    with_system = ({"role": "system", "content": "Be brief."}, *CHAT)
    (judgement,) = judge.compare([Comparison("t", with_system, "yes", "no")])
    a, b = (
        Reference(stock_logprobs, tiny_model).one(
            ids(tiny_model, rendered(f"{s}\n\nBe brief.")), ids(tiny_model, "yes")
        )
        for s in ("Good.", "Bad.")
    )
    assert rewards(judgement)[0] == pytest.approx(a - b, abs=1e-6)


def test_an_opening_is_part_of_the_prompt_and_white_space_around_a_turn_is_not_read(
    tiny_model: ModelSpec, other_model: ModelSpec, stock_logprobs: LogProbs, make: Make
) -> None:
    judge, _ = make(Side(tiny_model), Side(other_model))
    opened = Comparison("t", CHAT, " of the word", "no", opening="The letters")
    a, b = (
        Reference(stock_logprobs, spec).one(
            ids(spec, rendered(None) + "The letters"), [*ids(spec, " of the word"), END]
        )
        for spec in (tiny_model, other_model)
    )
    assert rewards(judge.compare([opened])[0])[0] == pytest.approx(a - b, abs=1e-6)
    spaced, plain = judge.compare([Comparison("t", CHAT, " yes\n", "no"), Comparison("t", CHAT, "yes", "no")])
    assert spaced == plain


# ------------------------------------------------------------------------------------------------ what fails is a sentence


def test_sides_that_are_the_same_are_refused(tiny_model: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"judge\.a and judge\.b are the same"):
        ImplicitJudge(Side(tiny_model, "x"), Side(tiny_model, "x"))
    with pytest.raises(ValueError, match=r"judge\.per is 'word': choose sequence or token"):
        ImplicitJudge(Side(tiny_model, "x"), Side(tiny_model), per="word")


def test_a_chat_template_that_drops_or_refuses_system_prompts_is_said_before_any_work(
    make_model: Callable[..., ModelSpec],
) -> None:
    users = "{% for m in messages if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    drops = make_model(chat_template=users)
    with pytest.raises(ValueError, match="leaves system prompts out"):
        ImplicitJudge(Side(drops, "Be good."), Side(drops)).check()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + users
    with pytest.raises(ValueError, match=r"refuses the conversation check \(no system role\)"):
        ImplicitJudge(Side(make_model(chat_template=refuses), "Be good."), Side(drops)).check()


def test_a_model_without_a_chat_template_takes_plain_text_only(make_model: Callable[..., ModelSpec]) -> None:
    plain = make_model(chat_template=None)
    judge = ImplicitJudge(Side(plain, "Good."), Side(plain, "Bad."))
    judge.check()
    with pytest.raises(ValueError, match="has no chat template"):
        judge.compare([Comparison("t", CHAT, "yes", "no")])


def test_the_identity_knows_what_decides_and_no_more(tiny_model: ModelSpec) -> None:
    def identity(**changes: Any) -> str:
        return json.dumps(ImplicitJudge(Side(tiny_model, "Good."), Side(tiny_model, "Bad."), **changes).identity())

    assert identity(beta=2.0) == identity()  # beta scales soft judgements only
    different = [identity(), identity(per="token"), identity(end=False), identity(soft=True), identity(tie=0.1)]
    assert len(set(different)) == 5
    assert identity(soft=True, beta=2.0) not in different


def test_the_shipped_configuration_is_one_model_under_two_system_prompts(tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIG), resolve=True)
    judge = configured(values, tmp_path)
    assert isinstance(judge, ImplicitJudge)
    a, b = judge.sides
    assert a.model == b.model == ModelSpec()
    assert a.system != b.system
    assert judge.name == "judge-implicit-embedded"
    with pytest.raises(ValueError, match=r"judge\.a\.model has no key nam"):
        configured(values | {"a": {"model": {"nam": "x"}}}, tmp_path)
