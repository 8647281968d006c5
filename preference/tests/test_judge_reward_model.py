"""The reward-model judge on tiny real models: a decoder with a chat template and an encoder of text pairs."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.models.language_model import ModelSpec
from qprobe_preference.judges import Comparison, Judgement, configured
from qprobe_preference.judges.reward_model import RewardModelJudge

CHAT = ({"role": "user", "content": "What is the sum?"},)
ANSWERS = ["", "a", "the letters", "first + second of the word", "of the word is the number of the letters"]
Make = Callable[..., ModelSpec]


@pytest.fixture(scope="session")
def make_decoder(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Save a tiny Llama that gives scores, with the tokenizer of the tiny model."""

    def make(labels: int = 1, pad: int | None = 1, safe: bool = True) -> ModelSpec:
        from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

        folder = tmp_path_factory.mktemp("reward")
        config = AutoConfig.from_pretrained(tiny_model.name)
        config.num_labels, config.pad_token_id = labels, pad
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = LlamaForSequenceClassification(config)
        if safe:
            model.save_pretrained(folder)
        else:
            config.architectures = ["LlamaForSequenceClassification"]
            config.save_pretrained(folder)
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        AutoTokenizer.from_pretrained(tiny_model.name).save_pretrained(folder)
        return ModelSpec(str(folder), dtype="float32", device="cpu")

    return make


@pytest.fixture(scope="session")
def encoder(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A tiny BERT that gives two scores; its tokenizer joins a pair of texts and has no chat template."""
    from tokenizers import processors
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reward-bert")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.25, "pad_token_id": 1}
    config = BertConfig(**sizes, **shape, num_labels=2, id2label={0: "bad", 1: "good"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        BertForSequenceClassification(config).save_pretrained(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.name, model_input_names=names)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|end|> $B:1 <|end|>:1", special_tokens=[("<|bos|>", 0), ("<|end|>", 4)]
    )
    tokenizer.save_pretrained(folder)
    return ModelSpec(str(folder), dtype="float32", device="cpu")


def stock_scores(spec: ModelSpec, inputs: list[dict[str, list[int]]]) -> torch.Tensor:
    """All outputs, one row at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(spec.name).eval()
    with torch.inference_mode():
        rows = [model(**{name: torch.tensor([values]) for name, values in row.items()}).logits[0] for row in inputs]
    return torch.stack(rows)


def tokenizer_of(spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec.name)


def chat_inputs(spec: ModelSpec) -> list[dict[str, list[int]]]:
    tokenizer = tokenizer_of(spec)
    texts = [f"<|bos|><|user|>What is the sum?<|end|>\n<|assistant|>{answer}<|end|>\n" for answer in ANSWERS]
    return [{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]


def comparisons() -> list[Comparison]:
    """Every answer against the one of middle length."""
    return [Comparison(f"t-{place}", CHAT, answer, ANSWERS[2]) for place, answer in enumerate(ANSWERS)]


def first_scores(judgements: list[Judgement]) -> list[float]:
    return [json.loads(judgement.detail)["first"] for judgement in judgements]


@pytest.mark.parametrize("pad", [1, 4, None])
@pytest.mark.parametrize("tokens_per_pass", [1, 60, 8192])
def test_scores_are_those_of_every_answer_alone(make_decoder: Make, pad: int | None, tokens_per_pass: int) -> None:
    """Whatever the padding token, the end of a turn (4) included, and however many rows share a pass."""
    spec = make_decoder(pad=pad)
    judgements = RewardModelJudge(spec, tokens_per_pass=tokens_per_pass).compare(comparisons())
    expected = stock_scores(spec, chat_inputs(spec))[:, 0].tolist()
    assert first_scores(judgements) == pytest.approx(expected, abs=1e-5)
    assert [j.win for j in judgements] == [0.5 if e == expected[2] else float(e > expected[2]) for e in expected]


def test_a_pair_of_outputs_is_subtracted_and_a_win_may_be_soft(make_decoder: Make) -> None:
    spec = make_decoder(labels=3)
    judgements = RewardModelJudge(spec, logit=2, minus=0, soft=True, beta=0.5).compare(comparisons())
    logits = stock_scores(spec, chat_inputs(spec)).double()
    scores = logits[:, 2] - logits[:, 0]
    assert first_scores(judgements) == pytest.approx(scores.tolist(), abs=1e-5)
    wins = torch.sigmoid(0.5 * (scores - scores[2]))
    assert [j.win for j in judgements] == pytest.approx(wins.tolist(), abs=1e-5)


def test_a_model_without_a_chat_template_reads_a_pair_of_texts(encoder: ModelSpec) -> None:
    judgements = RewardModelJudge(encoder, logit=1).compare(comparisons()[:4])
    tokenizer = tokenizer_of(encoder)
    inputs = [dict(tokenizer("user: What is the sum?", answer)) for answer in ANSWERS[:4]]
    assert {*inputs[1]["token_type_ids"]} == {0, 1}
    assert first_scores(judgements) == pytest.approx(stock_scores(encoder, inputs)[:, 1].tolist(), abs=1e-5)


def test_a_closed_judge_holds_no_model_and_loads_it_again(make_decoder: Make) -> None:
    judge = RewardModelJudge(make_decoder())
    before = judge.compare(comparisons())
    model = weakref.ref(judge._loaded[0])
    judge.close()
    gc.collect()
    assert model() is None
    judge.close()
    judge.check()
    assert "_loaded" not in vars(judge)  # sampling comes between the check and the judging
    assert judge.compare(comparisons()) == before


def test_plain_text_is_a_users_message(make_decoder: Make) -> None:
    judge = RewardModelJudge(make_decoder())
    plain = Comparison("t", "What is the sum?", "a", "the letters")
    assert judge.compare([plain]) == judge.compare([Comparison("t", CHAT, "a", "the letters")])


def test_equal_answers_tie_and_what_exceeds_the_context_is_counted(make_decoder: Make, encoder: ModelSpec) -> None:
    judge = RewardModelJudge(make_decoder())
    made = [Comparison("t", CHAT, "a", "a"), Comparison("t", CHAT, "x" * 300, "a"), Comparison("t", CHAT, "b", "a")]
    assert [j.verdict == "tie" for j in judge.compare(made)] == [True, False, False]
    assert [j.verdict == "too_long" for j in judge.compare(made)] == [False, True, False]
    assert [j.verdict for j in RewardModelJudge(encoder, logit=0).compare([Comparison("t", "x" * 70, "a", "b")])] == [
        "too_long"
    ]


@pytest.mark.parametrize(
    ("fault", "word"), [("pickle", "safetensors"), ("language model", "score.weight"), ("none", "no/such")]
)
def test_what_is_no_reward_model_is_refused(fault: str, word: str, make_decoder: Make, tiny_model: ModelSpec) -> None:
    specs = {"language model": tiny_model, "none": ModelSpec("no/such-model")}
    spec = specs[fault] if fault in specs else make_decoder(safe=False)
    with pytest.raises(OSError, match=re.escape(word)):
        RewardModelJudge(spec).check()


def test_code_of_a_repository_is_not_run(make_decoder: Make) -> None:
    spec = make_decoder()
    config = Path(spec.name) / "config.json"
    own = {"AutoModelForSequenceClassification": "code.Mine", "AutoConfig": "code.C"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mine", "auto_map": own}))
    (Path(spec.name) / "code.py").write_text(f"open({str(Path(spec.name) / 'ran')!r}, 'w')\n")
    with pytest.raises(OSError, match="reward model"):
        RewardModelJudge(spec).check()
    assert not (Path(spec.name) / "ran").exists()


@pytest.mark.parametrize(
    ("labels", "changes", "key"),
    [
        (2, {}, r"judge\.logit"),
        (2, {"logit": 2}, r"judge\.logit is 2"),
        (2, {"logit": 0, "minus": -1}, r"judge\.minus is -1"),
        (2, {"logit": 0, "minus": 0}, r"judge\.minus=0"),
        (1, {"minus": 0}, r"judge\.minus=0"),
        (1, {"tokens_per_pass": 0}, r"judge\.tokens_per_pass"),
    ],
)
def test_outputs_that_are_not_there_are_refused(
    make_decoder: Make, labels: int, changes: dict[str, int], key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        RewardModelJudge(make_decoder(labels=labels), **changes).check()  # type: ignore[arg-type]


def test_a_gguf_file_is_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        RewardModelJudge(ModelSpec(str(tmp_path / "m.gguf")))


def test_the_identity_knows_weights_and_outputs(make_decoder: Make) -> None:
    one, two = make_decoder(), make_decoder(labels=2)
    identities = [
        RewardModelJudge(one).identity(),
        RewardModelJudge(two, logit=0).identity(),
        RewardModelJudge(two, logit=1).identity(),
        RewardModelJudge(two, logit=1, minus=0).identity(),
        RewardModelJudge(one, soft=True).identity(),
    ]
    assert len({json.dumps(identity) for identity in identities}) == 5
    assert RewardModelJudge(one, tokens_per_pass=9).identity() == identities[0]


def test_the_shipped_configuration_runs_with_a_name(
    make_decoder: Make, tmp_path: Path, judge_config: Callable[..., dict[str, Any]]
) -> None:
    values = judge_config("reward_model")
    assert values["model"]["name"] == "???"
    values["model"]["name"] = make_decoder().name
    judge = configured(values, tmp_path)
    judge.check()
    assert judge.name.startswith("judge-reward-model-reward")
