"""What a configuration's data sets bring to the pipeline, and bad values, refused before any work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf.errors import MissingMandatoryValue

import qprobe_code_gen.__main__ as command

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def words(local_data: dict[str, list[str]], tmp_path: Path) -> dict[str, list[str]]:
    """Words of experiments on local data."""
    data = {name: local_data["gsm8k" if name == "gsm8k" else "mbpp"] for name in ("demo", "mbpp", "humaneval", "gsm8k")}
    return {name: [f"experiment={name}", *own, f"paths.runs={tmp_path}/runs"] for name, own in data.items()}


def test_problems_that_share_a_name_with_a_training_one_are_reported_apart_and_folded_together(
    composed: Composed, words: dict[str, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "mbpp.jsonl"
    path.write_text(path.read_text().replace("add_601(", "add_11(").replace("add_602(", "add_603("))
    mbpp = [*words["mbpp"], "dataset.test=[mbpp-test]"]
    (why, ids), *_ = command.make_pipeline(composed(mbpp)).apart["mbpp-test"].items()
    assert why.startswith("share an entry point (1) or their text (0) with a problem of mbpp-train")
    assert ids == {"MBPP/011"}
    folded = [*mbpp, "dataset.test=[mbpp-train]", "dataset.train=null", "evaluation.folds=2"]
    pipeline = command.make_pipeline(composed(folded))
    assert pipeline.apart == {}
    assert pipeline.test_pools[0].clusters is not None
    assert pipeline.test_pools[0].clusters.tolist() == [0, 1, 1, 2, 3]


def test_few_shot_examples_are_left_out_of_the_evaluation(composed: Composed, words: dict[str, list[str]]) -> None:
    shown = ["dataset.prompt_style=few_shot", "dataset.examples=[HumanEval/0,HumanEval/5]", "model.name=embedded"]
    pipeline = command.make_pipeline(composed([*words["humaneval"], *shown]))
    ids = {prompt.task_id for prompt in pipeline.tests[0].prompts}
    assert ids == {f"HumanEval/{number}" for number in range(164)} - {"HumanEval/0", "HumanEval/5"}


def test_a_set_may_have_its_own_number_of_completions(composed: Composed, words: dict[str, list[str]]) -> None:
    own = [
        "+dataset.samples.humaneval=5",
        "+dataset.samples.gsm8k-test=9",
        "sampler.n=2",
    ]  # of sets in use, and of another
    pipeline = command.make_pipeline(composed([*words["humaneval"], *own, "model.name=embedded"]))
    assert (pipeline.samples, pipeline.test_pools[0].smallest) == ({"humaneval": 5}, 5)


def test_worked_questions_are_the_first_and_left_out(composed: Composed, words: dict[str, list[str]]) -> None:
    pipeline = command.make_pipeline(composed(words["gsm8k"]))
    assert pipeline.training_split is not None
    assert [p.task_id for p in pipeline.training_split.prompts] == [f"gsm8k-train/{i}" for i in (8, 9, 10)]
    [prompt, *others] = pipeline.tests[0].prompts
    assert str(prompt.text).count("Question:") == 9
    assert str(prompt.text).endswith("#### 8\n\nQuestion: What is 0 + 1?\nAnswer:")
    assert len(others) == 2
    assert pipeline.sampler.settings.stop == ("\nQuestion:",)
    chat = [*words["gsm8k"], "dataset.prompt_style=chat", "dataset.examples=[gsm8k-train/3]"]
    prompt = command.make_pipeline(composed(chat)).tests[0].prompts[0]
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("experiment", "overrides", "word"),
    [
        ("demo", "evaluation.losses=[policy_gradiant]", "policy_gradiant"),
        ("demo", "evaluation.k=9", "n=8"),
        ("demo", "+dataset.limits.mbpp-test=3", "mbpp-test"),
        ("demo", "+dataset.limits.humaneval=0", "dataset.limits.humaneval"),
        ("demo", "+sampler.temprature=1", "temprature"),
        ("demo", "+probe.width=1", "width"),
        ("demo", "+extra=1", "extra"),
        ("demo", "dataset.test=[mbqp]", "mbqp"),
        ("demo", "dataset.prompt_style=socratic", "socratic"),
        ("demo", "sampler.backend=vlm", "vlm"),
        ("demo", "limit=0", "limit is 0"),
        ("demo", "shard=3", "3/16"),
        ("demo", "shard=5/4", "4/4"),
        ("demo", "limit=3", "5 folds"),
        ("demo", "layer=7", "layer 7"),
        ("demo", "sandbox.memory_mib=1", "memory_mib"),
        ("demo", "model.dtype=int4", "int4"),
        (
            "demo",
            "sampler=openai dataset.prompt_style=zero_shot sampler.api.model=m +sampler.api.api_key=secret",
            "key",
        ),
        ("demo", "baselines.names=[few_shots]", "few_shots"),
        ("demo", "baselines.names=[few_shot]", "training split"),
        ("demo", "baselines.names=[few_shot] dataset.train=mbpp-train baselines.few_shot.shots=0", "shots is 0"),
        ("demo", "+baselines.sft2.rank=8", "sft2"),
        ("demo", "+baselines.prompt_rm.words=1 baselines.names=[prompt_rm]", "words"),
        ("demo", "dataset.shots=runs/none", "dataset.train"),
        ("demo", "dataset.shots=runs/none dataset.train=mbpp-train", "mbpp-train.sample"),
        ("gsm8k", "dataset.examples=12", "1 to 11"),
        ("gsm8k", "dataset.examples=-1", "examples is -1"),
        ("gsm8k", "dataset.examples=[gsm8k-train/99]", "gsm8k-train/99"),
        ("gsm8k", "dataset.examples=[]", "no examples"),
        ("gsm8k", "dataset.prompt_style=zero_shot", "zero_shot"),
        ("gsm8k", "+dataset.mbpp_file=x", "mbpp_file"),
        ("gsm8k", "dataset.test=[gsm8k-test,humaneval]", "humaneval"),
        ("gsm8k", "dataset.examples_from=mbpp-fewshot", "examples_from"),
    ],
)
def test_a_bad_value_is_refused_before_any_work(
    experiment: str, overrides: str, word: str, composed: Composed, words: dict[str, list[str]], tmp_path: Path
) -> None:
    config = composed([*words[experiment], *overrides.split()])
    with pytest.raises(ValueError, match=re.escape(word)) as caught:
        command.make_pipeline(config)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_stage_and_a_missing_model_of_an_api_are_refused_before_any_work(
    composed: Composed, words: dict[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="polish"):
        command.make_pipeline(composed(words["demo"])).execute(["polish", "sample"])
    with pytest.raises(MissingMandatoryValue, match=r"sampler\.api\.model"):
        composed([*words["demo"], "sampler=openai", "dataset.prompt_style=zero_shot"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("experiment=gsm8k dataset.train_file=none.jsonl", "112,631 completions of 2,319 prompts"),
        # 464 + 500 + 164 problems of 200 samples, and 664 greedy ones.
        ("experiment=table1 dataset.mbpp_file=none.jsonl", "226,264 completions of 1,128 prompts, at most 67,879,200"),
    ],
)
def test_data_that_cannot_be_had_is_a_sentence_with_what_the_run_would_need(
    override: str, needed: str, composed: Composed, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=f"none.jsonl.* {needed}"):
        command.make_pipeline(composed([*override.split(), f"paths.runs={tmp_path}/runs"]))
    assert not (tmp_path / "runs").exists()
