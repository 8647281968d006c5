"""Candidates added to a file after its import: they join, what is embedded stays, and all is as of an import from scratch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qprobe import store
from qprobe.cli import main
from qprobe.models.language_model import ModelSpec
from qprobe.run import additions

FEATURES = "features/prompts.sample"


@pytest.fixture
def imported(tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def call(lines: list[dict[str, Any]], run: str = "run") -> int:
        Path("mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
        words = [f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu", "embedder.layers=[1,2]"]
        return main.main(
            [
                "import",
                "mine.jsonl",
                "--run",
                run,
                *words,
                "stages=[sample,reward,embed]",
                "sampler.batch_rows=4",
                "evaluation.folds=2",
            ]
        )

    return call


def lines(prompts: int, each: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {p}.", "completion": f"{p} and {s}", "reward": s % 2}
        for s in range(each)
        for p in range(prompts)
    ]


def features(run: str) -> dict[tuple[str, str, int], np.ndarray]:
    """Embedding by prompt, completion and layer."""
    pool, found = Path(run) / "completions/prompts.sample", {}
    prompts = store.found_table(Path(run) / "prompts/prompts", store.PROMPTS).read().to_pylist()
    texts = {row["task_id"]: row["prompt"] for row in prompts}
    completions = store.found_table(pool, store.COMPLETIONS).read().to_pylist()
    names = {(row["task_id"], row["sample"]): (texts[row["task_id"]], row["completion"]) for row in completions}
    for folder in sorted((Path(run) / FEATURES).glob("*/layer=*")):
        for row in store.found_table(folder).read().to_pylist():
            found[(*names[row["task_id"], row["sample"]], int(folder.name[-2:]))] = np.array(row["embedding"])
    return found


@pytest.mark.parametrize(
    "more",
    [
        [{"prompt": "Say 9.", "completion": "a", "reward": 1}, {"prompt": "Say 9.", "completion": "b", "reward": 0}],
        [{"prompt": "Say 0.", "completion": "new", "reward": 1}],
        [{"prompt": "Say 1.", "completion": "1 and 0", "reward": 0}],  # a further draw of one that is there
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_added_candidates_join_whatever_their_place(
    imported: Callable[..., int], more: list[dict[str, Any]], first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(lines(6, 2)) == 0
    before = features("run")
    whole = [*more, *lines(6, 2)] if first else [*lines(6, 2), *more]  # at the top the lines have other numbers
    capsys.readouterr()
    assert imported(whole) == 0
    assert f"{len(more)} candidates were added to the 12 of run" in capsys.readouterr().err
    assert imported(whole, "afresh") == 0
    after, afresh = features("run"), features("afresh")
    assert after.keys() == afresh.keys()
    assert before.keys() <= after.keys()
    for key, embedding in afresh.items():
        np.testing.assert_allclose(after[key], embedding, rtol=2e-3, atol=2e-3)
    assert not list(Path("run").rglob("*adding*"))


def test_nothing_is_embedded_where_only_whole_batches_are_added(
    imported: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qprobe.embedding.hf import HFEmbedder

    assert imported(lines(4, 2)) == 0
    embedded: list[int] = []
    embed = HFEmbedder.embed

    def counting(self: Any, prompts: Any, completions: Any) -> Any:
        embedded.append(sum(map(len, completions)))
        return embed(self, prompts, completions)

    monkeypatch.setattr(HFEmbedder, "embed", counting)
    assert imported([*lines(4, 2), *[line | {"prompt": f"{line['prompt']}!"} for line in lines(2, 2)]]) == 0
    assert sum(embedded) == 4


def test_a_call_that_was_stopped_on_its_way_goes_on(
    imported: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imported(lines(4, 2)) == 0
    whole = lines(4, 3)
    removed = shutil.rmtree
    for stop in range(1, 8):  # at every removal in turn
        calls = iter(range(stop))

        def killed(*arguments: Any, calls: Any = calls, **named: Any) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            removed(*arguments, **named)

        monkeypatch.setattr(additions.shutil, "rmtree", killed)
        status = imported(whole)
        monkeypatch.setattr(additions.shutil, "rmtree", removed)
        assert status in (0, 130)
    assert imported(whole) == 0
    assert imported(whole, "afresh") == 0
    after, afresh = features("run"), features("afresh")
    assert after.keys() == afresh.keys()
    for key, embedding in afresh.items():
        np.testing.assert_allclose(after[key], embedding, rtol=2e-3, atol=2e-3)
