"""The command end to end on questions with known answers: printed numbers are those of a few plain lines.

Layer 1 says how far an answer is off, layer 2, which is read where nothing is chosen, is noise.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import qprobe_code_gen.__main__ as command
from qprobe import store
from qprobe.models.language_model import ModelSpec
from qprobe.sampling import Completion

pytestmark = pytest.mark.usefixtures("plain_figures")

K = 3
WORDS = (
    *("experiment=gsm8k", "model=hub", "model.dtype=float32", "model.device=cpu", "dataset.examples=2", "sampler.n=6"),
    *("embedder.layers=[1,2]", "layer=best", f"evaluation.k={K}", "evaluation.beta=0", "evaluation.controls=[length]"),
    *("evaluation.seeds=2", "evaluation.bootstrap=1000", "evaluation.curve_shares=[]", "procedure=both"),
    *("authors.probe.epochs=40", "authors.probe.learning_rate=0.05", "authors.evaluation.beta=0", "+authors.layer=1"),
    *("probe.steps=60", "probe.learning_rate=0.05", "probe.minimum_mixed=3", "probe.check_every=5"),
)


def question(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"{number} + 1 = {number + 1}.\n#### {number + 1}"}


def asked(prompt: str) -> int:
    """The number of the last question."""
    return int(prompt.rpartition("What is ")[2].partition(" + 1?")[0])


def back_ends(fakes: ModuleType) -> tuple[Any, Any]:
    class Adds(fakes.PlantedSampler):  # type: ignore[misc, name-defined]
        """It adds 1, 2, 3 or 4."""

        def sample(self, prompts: Any, seeds: Any) -> list[list[Completion]]:
            def drawn(prompt: list[int], seed: int) -> Completion:
                off = int(hashlib.sha256(str(seed).encode()).hexdigest(), 16) % 4
                text = f" It is {asked(bytes(prompt).decode()) + 1 + off}"
                return Completion(text, list(text.encode()), "stop", -1.0, seed)

            return [[drawn(p, seed) for seed in own] for p, own in zip(prompts, seeds, strict=True)]

    class Reads(fakes.PlantedEmbedder):  # type: ignore[misc, name-defined]
        def goodness(self, prompt: str, completion: str) -> float:
            return (asked(prompt) - int(completion.split()[-1])) / 4

    return Adds, Reads


def test_probes_of_both_procedures_earn_what_the_larger_signal_earns(
    fakes: ModuleType,
    tiny_model: ModelSpec,
    composed: Callable[..., dict[str, Any]],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sampler, embedder = back_ends(fakes)
    monkeypatch.setattr("qprobe.sampling.hf.HFSampler", sampler)
    monkeypatch.setattr("qprobe.embedding.hf.HFEmbedder", embedder)
    numbers = {"train": range(100, 162), "test": range(500, 540)}
    own = [f"dataset.{name}_file={jsonl(map(question, of), name)}" for name, of in numbers.items()]
    command.run(composed([*WORDS, *own, f"model.name={tiny_model.name}", f"paths.runs={tmp_path}"]))
    printed = capsys.readouterr().out

    def completions(kind: str) -> list[list[int]]:
        table = store.found_table(tmp_path / "gsm8k" / "completions" / f"gsm8k-test.{kind}", store.COMPLETIONS)
        found: dict[str, list[int]] = {}
        for row in table.read().to_pylist():
            found.setdefault(row["task_id"], []).append(int(row["completion"].split()[-1]))
        return [found[f"gsm8k-test/{place}"] for place in range(40)]

    base, probe, skyline = [], [], []
    for number, answers in zip(range(500, 540), completions("sample"), strict=True):
        base.append(np.mean([answer == number + 1 for answer in answers]))
        sets = list(itertools.combinations(answers, K))
        # The signal is largest where the answer is smallest, and no answer is smaller than the right one.
        probe.append(np.mean([min(chosen) == number + 1 for chosen in sets]))
        skyline.append(np.mean([number + 1 in chosen for chosen in sets]))
    greedy = [own == [number + 1] for number, own in zip(range(500, 540), completions("greedy"), strict=True)]
    expected = {"pass@1": base, "greedy": greedy, f"skyline pass@{K}": skyline}
    for loss in ("L_Q", "L_CE", "L_PG"):
        expected |= {f"Q-probe {loss}": probe, f"Q-probe {loss}, paper's procedure": probe}
    # One partition of six samples into two sets of three is not all of them: the paper's estimate is close.
    table = (tmp_path / "gsm8k" / "tables" / "gsm8k-test.csv").read_text().splitlines()
    rows = {row["method"]: row for row in csv.DictReader(table)}
    for method, values in expected.items():
        near = 0.05 if "paper" in method else 1e-6
        assert float(rows[method]["value"]) == pytest.approx(np.mean(values), abs=near), method
    for method in ("pass@1", "greedy", "Q-probe L_PG"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{method} "))
        assert f" {np.mean(expected[method]):.3f} [" in line
    assert float(rows["Q-probe L_PG"]["auc"]) == 1.0
    assert float(rows["Q-probe L_PG, paper's procedure"]["auc"]) == 1.0
