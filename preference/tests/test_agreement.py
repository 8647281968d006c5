"""Cohen's kappa of two judges: scikit-learn's value, an interval as wide as theory says."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from qprobe_preference.agreement import agreement
from qprobe_preference.winrates import Judgements

WORDS = ["win", "tie", "loss"]


def two_judges(count: int = 300, alike: float = 0.6, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    a = rng.choice(WORDS, p=[0.5, 0.2, 0.3], size=count)
    b = np.where(rng.random(count) < alike, a, rng.choice(WORDS, size=count))
    return list(a), list(b)


def judge(words: list[str], each: int = 1) -> Judgements:
    wins = [{"win": 1.0, "tie": 0.5, "loss": 0.0, "unparsed": 0.5}[w] for w in words]
    return Judgements(wins, np.arange(len(words)) // each, words)


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learn_s(seed: int) -> None:
    a, b = two_judges(seed=seed)
    found = agreement(judge(a), judge(b))
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(cohen_kappa_score(a, b))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.agreed == pytest.approx(np.mean(np.array(a) == np.array(b)))
    assert found.compared == 300


def test_kappa_s_interval_is_as_wide_as_theory_says_and_wider_over_few_prompts() -> None:
    a, b = two_judges(count=1000)
    found = agreement(judge(a), judge(b), draws=4000).kappa
    assert found is not None
    # Fleiss, Cohen and Everitt (1969): large-sample standard error of kappa.
    t = np.array([[np.mean((np.array(a) == x) & (np.array(b) == y)) for y in WORDS] for x in WORDS])
    r, c, k = t.sum(1), t.sum(0), found.value
    chance = r @ c
    diagonal = sum(t[i, i] * (1 - (r[i] + c[i]) * (1 - k)) ** 2 for i in range(3))
    off = (1 - k) ** 2 * sum(t[i, j] * (c[i] + r[j]) ** 2 for i in range(3) for j in range(3) if i != j)
    error = np.sqrt((diagonal + off - (k - chance * (1 - k)) ** 2) / 1000) / (1 - chance)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.07)
    copies = agreement(
        judge([w for w in a[:100] for _ in range(10)], 10), judge([w for w in b[:100] for _ in range(10)], 10)
    )
    once = agreement(judge(a[:100]), judge(b[:100]))
    assert copies.kappa == once.kappa


def test_kappa_of_one_verdict_throughout_and_of_none() -> None:
    assert agreement(judge(["win"] * 5), judge(["win"] * 5)).kappa is None
    found = agreement(judge(["win", "loss", "unparsed", "tie"]), judge(["win", "loss", "win", "unparsed"]))
    assert (found.left_out, found.agreed, found.compared) == (2, 1.0, 2)
    with pytest.raises(ValueError, match="no comparison"):
        agreement(judge(["unparsed"]), judge(["win"]))
    with pytest.raises(ValueError, match="other comparisons"):
        agreement(judge(["win", "loss"]), judge(["win"]))


def test_agreement_in_a_sentence() -> None:
    words = ["win"] * 30 + ["loss"] * 20 + ["tie"] * 10
    first = Judgements([1] * 30 + [0] * 20 + [0.5] * 10, range(60), words)
    sentence = agreement(first, first).sentence("judge A", "judge B")
    assert sentence == "judge A and judge B agree on 100.0% of 60 comparisons, Cohen's kappa 1.00 [1.00, 1.00]."
    one = Judgements([1, 1], range(2))
    assert "kappa undefined" in agreement(one, one).sentence("a", "b")
