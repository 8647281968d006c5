"""The command end to end on pairs with a known answer: the printed accuracies are those of a few plain lines.

Layer 1 says how good an answer is, layer 2, which is read where nothing is chosen, is noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

import qprobe_preference.__main__ as command
from qprobe.models.language_model import ModelSpec
from qprobe.report.results import Results

pytestmark = pytest.mark.usefixtures("plain_figures")

WORDS = (
    *("experiment=trl", "model=hub", "model.dtype=float32", "model.device=cpu", "dataset.prompts=text"),
    *("embedder.layers=[1,2]", "evaluation.seeds=2", "evaluation.bootstrap=4000", "evaluation.curve_shares=[]"),
    *("evaluation.controls=[length]", "dataset.max_tokens=null"),
    *("probe.steps=60", "probe.learning_rate=0.05", "probe.minimum_mixed=3", "probe.check_every=5"),
)


def drawn(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16)


@pytest.mark.parametrize("word", ["layer=best", "compare.layers=[1,2]"])
def test_the_accuracy_on_pairs_is_how_often_the_larger_signal_was_chosen(
    word: str,
    composed: Callable[..., dict[str, Any]],
    fakes: ModuleType,
    tiny_model: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Thirty prompts with one to five pairs; four labels in five follow the numbers, nothing tells equal numbers apart."""
    monkeypatch.setattr("qprobe.sampling.hf.HFSampler", fakes.PlantedSampler)
    monkeypatch.setattr("qprobe.embedding.hf.HFEmbedder", fakes.PlantedEmbedder)
    rows, right, prompts = [], [], []
    for prompt in range(30):
        for pair in range(1 + prompt % 5):
            high, low = sorted((drawn(prompt, pair, side) % 90 + 10 for side in range(2)), reverse=True)
            follows = drawn("label", prompt, pair) % 5 > 0
            chosen, rejected = (high, low) if follows else (low, high)
            tied = pair == 3
            rows.append(
                {
                    "prompt": f"task {prompt:03d}: ",
                    # A tie has other words and the same number.
                    "chosen": f"answer {chosen}" if not tied else f"answer it {high}",
                    "rejected": f"answer {rejected}" if not tied else f"answer is {high}",
                }
            )
            right.append(0.5 if tied else float(chosen > rejected))
            prompts.append(prompt)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    command.run(
        composed(*WORDS, word, f"dataset.path={path}", f"model.name={tiny_model.name}", f"paths.runs={tmp_path}")
    )
    printed = capsys.readouterr().out
    accuracy = np.mean(right)
    assert 0.6 < accuracy < 0.95
    folder = tmp_path / "trl" if word == "layer=best" else tmp_path / "trl" / "compared" / "layer=01.linear"
    (path,) = (folder / "results").glob("*.json")
    (row,) = [row for row in Results.read(path).rows if row.method == "Q-probe L_QP"]
    assert (row.value, row.auc) == (pytest.approx(accuracy), pytest.approx(accuracy))
    assert f"{accuracy:.3f} [" in printed or f"| {accuracy:.3f} |" in printed
    # Its interval is over prompts, each with all of its pairs.
    sums, sizes = np.bincount(prompts, right), np.bincount(prompts)
    taken = np.random.default_rng(1).integers(30, size=(20_000, 30))
    means = sums[taken].sum(axis=1) / sizes[taken].sum(axis=1)
    end = stats.norm.cdf(np.sqrt(30 / 29) * stats.t.ppf(0.025, 29))
    assert (row.low, row.high) == pytest.approx(np.quantile(means, [end, 1 - end]), abs=0.01)
