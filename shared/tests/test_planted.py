"""The commands end to end on data with a known answer: printed numbers are those of a few plain lines.

Layer 1 says how good an answer is, layer 2, which is read where nothing is chosen, is noise. So a probe that chooses its layer
takes the larger number.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from qprobe import store
from qprobe.cli import main
from qprobe.models.language_model import ModelSpec
from qprobe.report.results import Results

pytestmark = pytest.mark.usefixtures("plain_figures")

SETTINGS = (
    *("model=hub", "model.dtype=float32", "model.device=cpu", "prompts=text", "embedder.layers=[1,2]", "layer=best"),
    *("evaluation.beta=0", "evaluation.seeds=2", "evaluation.folds=3", "evaluation.controls=[length]"),
    *("evaluation.losses=[reward_mse,policy_gradient]", "evaluation.bootstrap=4000", "evaluation.curve_shares=[0.5]"),
    *("probe.steps=60", "probe.learning_rate=0.05", "probe.minimum_mixed=3", "probe.check_every=5"),
)
Call = Callable[..., str]
# Of every prompt: its answers, as numbers, and what each earned.
Pool = list[tuple[list[int], list[float]]]


@pytest.fixture
def call(
    fakes: ModuleType,
    tiny_model: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """The command with planted back ends; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qprobe.sampling.hf.HFSampler", fakes.PlantedSampler)
    monkeypatch.setattr("qprobe.embedding.hf.HFEmbedder", fakes.PlantedEmbedder)

    def called(*arguments: str) -> str:
        assert main.main([*arguments, f"model.name={tiny_model.name}", *SETTINGS]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return called


def table(path: str) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in csv.DictReader(Path(path).read_text().splitlines())}


def over_subsets(pool: Pool, k: int, earns: Callable[[Sequence[int], Sequence[float]], float]) -> np.ndarray:
    """(P,) mean over every choice of k samples of a prompt."""
    found = []
    for answers, rewards in pool:
        chosen = itertools.combinations(range(len(answers)), k)
        found.append(np.mean([earns([answers[i] for i in own], [rewards[i] for i in own]) for own in chosen]))
    return np.array(found)


def of_largest(answers: Sequence[int], rewards: Sequence[float]) -> float:
    return float(np.mean([reward for answer, reward in zip(answers, rewards, strict=True) if answer == max(answers)]))


def auc(pool: Pool) -> list[float]:
    """Of each prompt with different rewards: pairs of different answers in order of reward, equal numbers half."""
    found = []
    for answers, rewards in pool:
        different = dict(zip(answers, rewards, strict=True))
        pairs = [(a, b) for a in different for b in different if different[a] > different[b] + 1e-9]
        if pairs:
            found.append(float(np.mean([a > b for a, b in pairs])))
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Resamples of prompts, between the quantiles that Student's t gives."""
    count = len(values)
    means = values[np.random.default_rng(1).integers(count, size=(20_000, count))].mean(axis=1)
    end = stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    low, high = np.quantile(means, [end, 1 - end])
    return float(low), float(high)


def check(pool: Pool, k: int, name: str, printed: str) -> None:
    """The table of a run, and what was printed, against the pool."""
    base = over_subsets(pool, 1, lambda _, rewards: rewards[0])
    probe = over_subsets(pool, k, of_largest)
    skyline = over_subsets(pool, k, lambda _, rewards: max(rewards))
    assert skyline.mean() > probe.mean() + 0.02 > base.mean() + 0.07  # the three can be told apart
    rows = table(name)
    expected = {"pass@1": base, "Q-probe L_Q": probe, "Q-probe L_PG": probe, f"skyline pass@{k}": skyline}
    for method, values in expected.items():
        row = rows[method]
        assert float(row["value"]) == pytest.approx(values.mean(), rel=1e-5), method
        assert (float(row["low"]), float(row["high"])) == pytest.approx(interval(values), abs=0.02), method
        lines = [line for line in printed.splitlines() if line.startswith(f"{method} ")]
        assert f" {values.mean():.3f} [" in lines[0], method
        if method != "pass@1":
            assert float(row["difference"]) == pytest.approx((values - base).mean(), abs=1e-6)
            ends = float(row["difference_low"]), float(row["difference_high"])
            assert ends == pytest.approx(interval(values - base), abs=0.02)
    assert float(rows["Q-probe L_PG"]["auc"]) == pytest.approx(np.mean(auc(pool)))
    assert f"{len(auc(pool))} prompts have both good and bad completions" in " ".join(printed.split())


def lot(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16)


def test_import_with_unequal_and_equal_candidates_and_soft_rewards(call: Call) -> None:
    """Forty prompts with 3 to 8 candidates, some of them twice; a reward is half what a number says and half luck."""
    pool: Pool = []
    lines = []
    for prompt in range(40):
        answers = [5 * (lot(prompt, sample) % 12) for sample in range(3 + prompt % 6)]
        rewards = [round((answer / 60 + lot("luck", prompt, answer) % 21 / 20) / 2, 3) for answer in answers]
        pool.append((answers, rewards))
        lines += [
            {"prompt": f"task {prompt:03d}: ", "completion": f"answer {answer:02d}", "reward": reward}
            for answer, reward in zip(answers, rewards, strict=True)
        ]
    assert any(len(set(answers)) < len(answers) for answers, _ in pool)
    order = np.random.default_rng(0).permutation(len(lines))
    Path("candidates.jsonl").write_text("\n".join(json.dumps(lines[place]) for place in order))
    printed = call("import", "candidates.jsonl", "--run", "run", "evaluation.k=3")
    check(pool, 3, "run/tables/prompts.csv", printed)
    taken = Results.read(Path("run/results/prompts.json")).reward_against_layer
    assert taken is not None
    assert taken.taken == {"Q-probe L_Q": [6, 0], "Q-probe L_PG": [6, 0]}
    value = float(table("run/tables/prompts.csv")["Q-probe L_PG"]["value"])
    assert taken.series["Q-probe L_PG"].value[0] == pytest.approx(value)


def test_run_with_a_training_set_a_test_set_and_a_reward_of_the_user(call: Call) -> None:
    """Sixty prompts to learn from, thirty to test on; a number passes where it exceeds what its prompt asks, but for luck."""
    Path("own.py").write_text(
        "import hashlib\n\n\ndef reward(prompt, completion, hard):\n"
        "    luck = hashlib.sha256((prompt + completion).encode()).digest()[0]\n"
        "    return float((int(completion.split()[-1]) > hard) != (luck < 40))\n"
    )
    hard = [lot("hard", prompt) % 60 + 20 for prompt in range(90)]
    rows = [
        {"prompt": f"task {prompt:03d}: ", "hard": hard[prompt], "task_id": f"t{prompt:03d}"} for prompt in range(90)
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows[:60])))
    Path("test.jsonl").write_text("\n".join(map(json.dumps, rows[60:])))
    words = ["run", "prompts.jsonl", "--reward", "own.py:reward", "--run", "run", "--test", "test.jsonl"]
    printed = call(*words, "sampler.n=6", "evaluation.k=4")
    pool: Pool = []
    drawn = store.found_table(Path("run/completions/test.sample"), store.COMPLETIONS).read().to_pylist()
    for prompt in range(60, 90):
        texts = [row["completion"] for row in drawn if row["task_id"] == f"t{prompt:03d}"]
        assert len(texts) == 6
        answers = [int(text.split()[-1]) for text in texts]
        lucky = [hashlib.sha256((f"task {prompt:03d}: " + text).encode()).digest()[0] < 40 for text in texts]
        pool.append((answers, [float((a > hard[prompt]) != luck) for a, luck in zip(answers, lucky, strict=True)]))
    check(pool, 4, "run/tables/test.csv", printed)
    greedy = store.found_table(Path("run/completions/test.greedy"), store.COMPLETIONS).read().to_pylist()
    right = []
    for row in greedy:
        luck = hashlib.sha256((f"task {row['task_id'][1:]}: " + row["completion"]).encode()).digest()[0]
        right.append((int(row["completion"].split()[-1]) > hard[int(row["task_id"][1:])]) != (luck < 40))
    assert float(table("run/tables/test.csv")["greedy"]["value"]) == pytest.approx(np.mean(right))
