"""A probe in use: the candidates are the sampler's, the choice is softmax(Q / beta), and another source is refused."""

import dataclasses
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe import models
from qprobe.embedding import LIKELIHOOD, columns_identity
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.probe.calibration import Calibration
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.prompts import Prompt
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.serving.policy import Choice, Policy

PROMPT = Prompt("t-000", text="task 000: ")


@pytest.fixture
def probe(fakes: ModuleType) -> QProbe:
    """Trained on goodness, which is the first number of an embedding at layer 2 (times ten)."""
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 1, (400, fakes.WIDTH)).astype("float32") * 10
    probe = QProbe(loss="reward_mse", steps=300, learning_rate=0.05).fit(
        features, features[:, 0] / 10, np.arange(400) // 8
    )
    embedder = fakes.Embedder((2,))
    probe.source = EmbeddingSource.of(embedder.identity(), 2, embedder.tokenizer_fingerprint())
    return probe


def goodness(choice: Choice) -> list[int]:
    return [int(candidate.text.removeprefix("answer ")) for candidate in choice.candidates]


def test_the_best_candidate_is_the_answer_at_temperature_zero(probe: QProbe, fakes: ModuleType) -> None:
    policy = Policy(fakes.Sampler(6), fakes.Embedder((1, 2)), probe, beta=0)
    for seed in range(5):
        choice = policy.choose(PROMPT, seed)
        assert len(set(goodness(choice))) > 1
        assert goodness(choice)[choice.chosen] == max(goodness(choice))
        assert choice.candidates[choice.chosen].probability == 1
        assert choice.answer == policy.answer(PROMPT, seed) == choice.candidates[choice.chosen].text


def test_it_is_chosen_with_the_probability_that_is_shown(probe: QProbe, fakes: ModuleType) -> None:
    sampler, embedder = fakes.Sampler(4), fakes.Embedder((2,))
    choice = Policy(sampler, embedder, probe, beta=0.3).choose(PROMPT, 0)
    weights = [math.exp(candidate.score / 0.3) for candidate in choice.candidates]
    shown = [candidate.probability for candidate in choice.candidates]
    assert shown == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)
    drawn = Counter()  # type: ignore[var-annotated]
    expected = [0.0] * 4
    policy = Policy(sampler, embedder, probe, beta=0.3)
    for seed in range(400):
        choice = policy.choose(PROMPT, seed)
        by_score = sorted(range(4), key=lambda place: choice.candidates[place].score)
        drawn[by_score.index(choice.chosen)] += 1
        for rank, place in enumerate(by_score):
            expected[rank] += choice.candidates[place].probability
    # Four standard deviations of a binomial count are 40 at most.
    assert all(abs(drawn[rank] - expected[rank]) < 40 for rank in range(4))
    assert min(drawn.values()) > 20


def test_how_likely_each_candidate_is_right_is_said_where_the_probe_was_calibrated(
    probe: QProbe, fakes: ModuleType
) -> None:
    assert Policy(fakes.Sampler(4), fakes.Embedder((2,)), probe).choose(PROMPT, 0).right is None
    weights = np.zeros(fakes.WIDTH)
    weights[0] = 1.0  # the level is the goodness
    probe.calibration_ = Calibration(weights, 0.0, -5.0, 1.0, 0.5)
    choice = Policy(fakes.Sampler(4), fakes.Embedder((2,)), probe, beta=0).choose(PROMPT, 0)
    levels = [number / 10 for number in goodness(choice)]  # as they are embedded
    mean = sum(levels) / 4
    expected = [1 / (1 + math.exp(5 - level - 0.5 * mean)) for level in levels]
    assert [candidate.right for candidate in choice.candidates] == pytest.approx(expected, rel=1e-4)
    assert choice.right == choice.candidates[choice.chosen].right


def test_the_same_seed_gives_the_same_answer_and_no_seed_a_new_one(probe: QProbe, fakes: ModuleType) -> None:
    policy = Policy(fakes.Sampler(4), fakes.Embedder((2,)), probe)
    assert policy.choose(PROMPT, 3) == policy.choose(PROMPT, 3)
    assert policy.choose(PROMPT, 3) != policy.choose(PROMPT, 4)
    assert len({tuple(goodness(policy.choose(PROMPT))) for _ in range(5)}) == 5


def test_the_probes_own_temperature_is_used_unless_another_is_given(probe: QProbe, fakes: ModuleType) -> None:
    probe.beta_ = 0.05
    assert Policy(fakes.Sampler(), fakes.Embedder((2,)), probe).beta == 0.05
    assert Policy(fakes.Sampler(), fakes.Embedder((2,)), probe, beta=0).beta == 0
    with pytest.raises(ValueError, match="beta"):
        Policy(fakes.Sampler(), fakes.Embedder((2,)), probe, beta=-1)


@pytest.mark.parametrize(
    ("changes", "word"), [({"layers": (1,)}, "layer 2"), ({"layers": (2,), "tokenizer": "another"}, "numbers")]
)
def test_another_source_is_refused_before_anything_is_drawn(
    changes: dict[str, Any], word: str, probe: QProbe, fakes: ModuleType
) -> None:
    with pytest.raises(ValueError, match=word):
        Policy(fakes.Sampler(), fakes.Embedder(**changes), probe)


def test_a_probe_without_a_source_reads_the_only_layer(probe: QProbe, fakes: ModuleType) -> None:
    probe.source = None
    assert Policy(fakes.Sampler(), fakes.Embedder((2,)), probe).layer == 2
    with pytest.raises(ValueError, match="which layer"):
        Policy(fakes.Sampler(), fakes.Embedder((1, 2)), probe)


def test_plain_text_is_rendered_as_in_training(
    probe: QProbe, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Prompt] = []
    sampler = fakes.Sampler()
    render = sampler.render
    monkeypatch.setattr(sampler, "render", lambda prompt: seen.append(prompt) or render(prompt))
    with pytest.raises(ValueError, match="style"):
        Policy(sampler, fakes.Embedder((2,)), probe).answer("task 001: ")
    probe.use = {"prompts": "chat"}
    Policy(sampler, fakes.Embedder((2,)), probe).answer("task 001: ")
    Policy(sampler, fakes.Embedder((2,)), probe, style="text").answer("task 001: ")
    message = {"role": "user", "content": "task 001: "}
    Policy(sampler, fakes.Embedder((2,)), probe).answer([message])
    assert [(prompt.messages, prompt.text) for prompt in seen] == [
        ((message,), None),
        ((), "task 001: "),
        ((message,), None),
    ]


def test_the_tokens_are_the_samplers_own_where_they_mean_the_same(probe: QProbe, fakes: ModuleType) -> None:
    embedder = fakes.Embedder((2,))
    choice = Policy(fakes.Sampler(3), embedder, probe).choose(PROMPT, 0)
    assert [(bytes(p).decode(), bytes(c).decode()) for p, c in embedder.seen] == [
        ("task 000: ", candidate.text) for candidate in choice.candidates
    ]
    embedder.seen.clear()
    Policy(fakes.Sampler(3, tokens=False), embedder, probe).answer(PROMPT)
    assert [prompt[0] for prompt, _ in embedder.seen] == [fakes.PROMPT_MARK] * 3  # encoded anew, as in `stages.embed`


def test_a_list_is_answered_with_a_list(probe: QProbe, fakes: ModuleType) -> None:
    policy = Policy(fakes.Sampler(4), fakes.Embedder((2,)), probe, style="text")
    prompts = ["task 000: ", "task 001: ", Prompt("b", text="task 002: ")]
    answers = policy.answer(prompts, 3)
    assert answers == [policy.answer(prompt, 3) for prompt in prompts]
    assert len(set(map(tuple, (goodness(choice) for choice in policy.choose(prompts, 3))))) == 3
    assert policy.answer(tuple(prompts[:1]), 3) == answers[:1]
    assert policy.answer([], 3) == []
    for wrong in (7, ["task 000: ", 7], [["task 000: "]], None):
        with pytest.raises(ValueError, match=r"prompt|message"):
            policy.answer(wrong)


@pytest.mark.parametrize(
    ("layers", "likelihood", "ending"), [((3,), False, None), ((2, 4), True, None), ((4,), True, "ab")]
)
def test_what_is_kept_while_drawing_is_what_the_embedder_reads(
    tiny_model: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    layers: tuple[int, ...],
    likelihood: bool,
    ending: str | None,
) -> None:
    embedder = HFEmbedder(tiny_model, layers, likelihood=likelihood, ending=ending)
    blocks = (*layers, LIKELIHOOD) if likelihood else ()
    width = len(layers) * models.outline(tiny_model).width + (len(COLUMNS) if likelihood else 0)
    features = np.random.default_rng(0).normal(size=(200, width)).astype("float32")
    probe = QProbe(loss="reward_mse", steps=20, beta=0.1)
    probe.fit(features, (features[:, 0] > 0).astype("float32"), np.arange(200) // 4)
    source = EmbeddingSource.of(embedder.identity(), layers[-1], embedder.tokenizer_fingerprint())
    probe.source = dataclasses.replace(source, blocks=blocks, likelihood=columns_identity(embedder, blocks))
    sampler = HFSampler(tiny_model, SamplingSettings(n=4, temperature=1.0, top_p=1.0, max_new_tokens=8))
    policy = Policy(sampler, embedder, probe, style="text")
    calls: list[int] = []
    embed = HFEmbedder.embed
    monkeypatch.setattr(HFEmbedder, "embed", lambda *given: [calls.append(1), embed(*given)][1])
    kept = policy.choose(["the sea", "a"], 3)
    assert bool(calls) == (ending is not None)  # an ending of several tokens is not drawn
    assert not sampler.keep  # the caller's own is as it was
    monkeypatch.setattr(Policy, "known", lambda *_: None)
    read = policy.choose(["the sea", "a"], 3)
    assert calls
    for one, other in zip(kept, read, strict=True):
        assert (one.chosen, one.answer) == (other.chosen, other.answer)
        assert [c.score for c in one.candidates] == pytest.approx(
            [c.score for c in other.candidates], rel=1e-4, abs=1e-5
        )


def test_threads_may_ask_one_policy(tiny_model: ModelSpec) -> None:
    """As a web framework's threads do: each is answered as if it were alone."""
    embedder = HFEmbedder(tiny_model, (3,))
    features = np.random.default_rng(0).normal(size=(200, models.outline(tiny_model).width)).astype("float32")
    probe = QProbe(loss="reward_mse", steps=20, beta=0.1)
    probe.fit(features, (features[:, 0] > 0).astype("float32"), np.arange(200) // 4)
    settings = SamplingSettings(n=4, temperature=1.0, top_p=1.0, max_new_tokens=8)
    policy = Policy(HFSampler(tiny_model, settings), embedder, probe, style="text")
    asked = [("the sea " * length, seed) for seed in range(4) for length in (1, 2, 3, 4)]
    alone = [policy.choose(*one) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: policy.choose(*one), asked))
    for one, other in zip(found, alone, strict=True):
        assert [candidate.text for candidate in one.candidates] == [candidate.text for candidate in other.candidates]
        assert [c.score for c in one.candidates] == pytest.approx([c.score for c in other.candidates], abs=1e-5)
        assert one.chosen == other.chosen
