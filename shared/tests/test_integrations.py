"""A Q-probe inside other tools, each the real package on a tiny model: what the tool reports is what the probe says.

`make test-integrations` installs the packages; where one is missing, its test is skipped.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qprobe
from qprobe import QProbe
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.serving.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages
LAYER = 3
WORDS = ("add(", "the number", "first, second", "return", "zzz", "sum?")


@pytest.fixture(scope="module")
def policy(tiny_model: ModelSpec) -> Policy:
    """A policy whose probe is a fixed direction of layer 3."""
    sampler = HFSampler(tiny_model, SamplingSettings(n=2, max_new_tokens=4))
    embedder = HFEmbedder(tiny_model, layers=[LAYER], likelihood=False)
    rows = np.random.default_rng(0).normal(size=(400, 32)).astype("float32")
    probe = QProbe("reward_mse", l2=1e-3).fit(rows, rows @ rows[0], np.repeat(np.arange(50), 8))
    probe.use = {
        "prompts": "text",
        "model": dataclasses.asdict(tiny_model),
        "sampler": {"backend": "hf", "greedy": False, "batch_rows": 8, "n": 2, "max_new_tokens": 4, "stop": []},
        "embedder": {"backend": "hf", "layers": [LAYER], "likelihood": False},
    }
    return Policy(sampler, embedder, probe)


def q_alone(policy: Policy, prompt: Prompt, text: str) -> float:
    """Q of one completion by transformers itself: a pass over the joined tokens, the state of the last one times the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    name = policy.embedder.model.name  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    ids = [*policy.sampler.render(prompt)[1], *policy.embedder.encode_completion(text)]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER]
    return float(policy.probe.score(states[0, -1:])[0])


def test_scores_of_completions_from_elsewhere_are_those_of_the_joined_tokens(policy: Policy) -> None:
    talk = [{"role": "user", "content": "What is the sum?"}]
    found = policy.scores(["def ", talk], [WORDS[:3], ["return"]])
    expected = [q_alone(policy, Prompt("x", text="def "), text) for text in WORDS[:3]]
    expected += [q_alone(policy, Prompt("x", messages=tuple(talk)), "return")]
    assert [len(own) for own in found] == [3, 1]
    np.testing.assert_allclose([*found[0], *found[1]], expected, rtol=1e-4, atol=1e-4)


def test_the_page_that_shows_them_names_what_there_is() -> None:
    """Its code compiles, and whatever it imports of ours is there; the tests below run the same calls."""
    page = (Path(__file__).parents[2] / "docs" / "ELSEWHERE.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    imported = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    for node in imported:
        if str(node.module).startswith("qprobe"):
            path = Path(qprobe.__file__).parent.joinpath(*str(node.module).split(".")[1:])
            text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            assert all(alias.name in text or (path / f"{alias.name}.py").is_file() for alias in node.names), node.module


def test_grpo_of_trl_is_rewarded_by_a_probe(policy: Policy, tiny_model: ModelSpec, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: make test-integrations")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from qprobe.integrations.trl import ProbeReward

    reward, seen = ProbeReward(policy), []

    class Watched(ProbeReward):
        def __call__(self, prompts: Any, completions: Any, **more: Any) -> list[float]:
            seen.append((prompts, completions, super().__call__(prompts, completions, **more)))
            return seen[-1][2]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model.name, pad_token="<|end|>")
    asked: list[Any] = [{"prompt": [{"role": "user", "content": word}]} for word in WORDS]
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        tiny_model.name, Watched(policy), settings, train_dataset=Dataset.from_list(asked), processing_class=tokenizer
    )
    trainer.train()
    means = [line["rewards/qprobe/mean"] for line in trainer.state.log_history if "rewards/qprobe/mean" in line]
    assert len(means) == len(seen) == 2
    for (prompts, completions, rewards), mean in zip(seen, means, strict=True):
        alone = [
            q_alone(policy, Prompt("x", messages=tuple(prompt)), said[0]["content"])
            for prompt, said in zip(prompts, completions, strict=True)
        ]
        np.testing.assert_allclose(rewards, alone, rtol=1e-3, atol=1e-3)
        assert mean == pytest.approx(np.mean(alone), abs=1e-3)
    print(f"TRL {trl.__version__}: mean reward of two steps {means}")
    assert reward(["a", "b", "a"], ["x", "y", "z"]) == pytest.approx(
        [
            *policy.scores(["a"], [["x", "z"]])[0][:1],
            *policy.scores(["b"], [["y"]])[0],
            *policy.scores(["a"], [["z"]])[0],
        ],
        abs=1e-4,
    )


def test_lm_evaluation_harness_keeps_the_best_of_its_repeats(policy: Policy, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test-integrations")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answers(LM):  # type: ignore[misc]
        """Repeats of a question are answered by one word after another."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [WORDS[place % len(WORDS)] for place in range(len(requests))]

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    questions = [f"question {number}" for number in range(4)]
    best = [max(WORDS, key=lambda word: q_alone(policy, Prompt("x", text=f"Q: {asked}"), word)) for asked in questions]
    wrong = [*best[:3], "none"]  # the last can not be right
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"q": asked, "a": own}) for asked, own in zip(questions, wrong, strict=True)))
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: 'Q: {{q}}'\ndoc_to_target: '{{a}}'\n"
        f"generation_kwargs: {{until: ['\\n'], do_sample: true}}\nrepeats: {len(WORDS)}\nfilter_list:\n"
        "  - name: first\n    filter: [{function: take_first}]\n"
        "  - name: best\n    filter:\n      - function: !function qprobe.integrations.lm_eval.BestByProbe\n"
        f"        probe: {tmp_path}/probe\n        prompt: 'Q: {{{{q}}}}'\n      - function: take_first\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    policy.probe.save_pretrained(tmp_path / "probe")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(Answers(), tasks=["words"], task_manager=tasks, bootstrap_iters=0)
    results = found["results"]["words"]
    print(f"lm-evaluation-harness {lm_eval.__version__}: {results}")
    assert results["exact_match,best"] == 0.75
    assert results["exact_match,first"] == np.mean([own == WORDS[0] for own in wrong])


def test_inspect_ai_takes_the_epoch_of_highest_q(policy: Policy, tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: make test-integrations")
    from inspect_ai import Epochs, Task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import match, mean_score

    from qprobe.integrations.inspect_ai import best_by_probe, with_probe

    asked = "What is the sum?"
    prompt = Prompt("x", messages=({"role": "user", "content": asked},))
    best = max(WORDS, key=lambda word: q_alone(policy, prompt, word))
    samples = [Sample(input=asked, target=best), Sample(input=asked, target="never")]
    said = [ModelOutput.from_content("mockllm/model", word) for word in WORDS for _ in samples]
    for output in said:
        output.usage = ModelUsage()  # else the mock counts tokens, for which it asks the network
    (log,) = inspect_ai.eval(
        Task(
            samples,
            scorer=with_probe(match("exact"), policy),
            epochs=Epochs(len(WORDS), [mean_score(), best_by_probe()]),
        ),
        model=get_model("mockllm/model", custom_outputs=said),
        log_dir=str(tmp_path),
        display="none",
        max_samples=1,
    )
    assert log.status == "success", log.error
    found = {scored.reducer: scored.metrics["accuracy"].value for scored in log.results.scores}
    print(f"inspect_ai {inspect_ai.__version__}: accuracy by reducer {found}")
    # The first sample has its answer in one of six epochs, the second never.
    assert found == {"mean": pytest.approx(1 / 12), "qprobe/best_by_probe": 0.5}
    for sample in log.samples:
        (score,) = sample.scores.values()
        assert score.metadata["qprobe"] == pytest.approx(q_alone(policy, prompt, sample.output.completion), abs=1e-3)


def test_a_pipeline_of_scikit_learn_is_cross_validated_by_prompt(policy: Policy) -> None:
    import sklearn
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import Pipeline, make_pipeline

    from qprobe.integrations.sklearn import Embeddings

    rows = [(f"question {number}: ", word) for number in range(12) for word in WORDS]
    prompts = np.repeat(np.arange(12), len(WORDS))
    states = Embeddings(policy.sampler, policy.embedder).fit(rows).transform(rows)
    rewards = policy.probe.score(states)  # a linear function of the states
    assert rewards[7] == pytest.approx(q_alone(policy, Prompt("x", text=rows[7][0]), rows[7][1]), abs=1e-4)

    def chosen(probe: Any, tested: Any, earned: np.ndarray) -> float:
        """Mean reward of the best of six of every tested prompt."""
        scores = probe[-1].score(probe[:-1].transform(tested)).reshape(-1, len(WORDS))
        return float(np.take_along_axis(earned.reshape(scores.shape), scores.argmax(1)[:, None], 1).mean())

    pipeline = Pipeline(
        [("embed", Embeddings(policy.sampler, policy.embedder)), ("probe", QProbe("reward_mse", l2=1e-6))]
    )
    folds = GroupKFold(4)
    earned = cross_val_score(
        pipeline, rows, rewards, groups=prompts, cv=folds, scoring=chosen, params={"probe__prompts": prompts}
    )
    most = rewards.reshape(12, -1).max(1)
    expected = [most[np.unique(prompts[tested])].mean() for _, tested in folds.split(rows, rewards, prompts)]
    print(f"scikit-learn {sklearn.__version__}: best of six by fold {earned}, the largest there is {expected}")
    np.testing.assert_allclose(earned, expected, rtol=0.1)
    fitted = make_pipeline(Embeddings(policy.sampler, policy.embedder), Ridge(1e-6)).fit(rows, rewards)
    np.testing.assert_allclose(fitted.predict(rows), rewards, atol=0.05)
