"""Features of the user's own: whose row is whose, in every kind of file, and what cannot be is a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe.cli import composition, main
from qprobe.embedding.given import GivenEmbedder
from qprobe.probe.estimator import QProbe

TEXTS = {("a", 0): ("A?", "one"), ("a", 1): ("A?", "two"), ("b", 0): ("B?", "one"), ("b", 1): ("B?", "one")}
PLACES = {("a", 0): 0, ("a", 1): 2, ("b", 0): 3, ("b", 1): 4}  # the line between is of a prompt that was left out
VALUES = np.array([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [5.0, 6.0], [7.0, 6.0]])


def asked(given: GivenEmbedder, *pairs: tuple[str, str]) -> list[list[list[float]]]:
    prompts = [given.encode_prompt(prompt, False) for prompt, _ in pairs]
    found = given.embed(prompts, [[given.encode_completion(text)] for _, text in pairs])
    return [found[layer].tolist() for layer in given.layers]


def test_rows_of_an_array_are_the_candidates_in_the_order_of_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", VALUES)
    np.save(tmp_path / "one.npy", VALUES[:, 0].astype(np.float16))
    given = GivenEmbedder(None, [str(tmp_path / "own.npy"), str(tmp_path / "one.npy")])
    said = given.take(TEXTS, PLACES, 5)
    assert (given.layers, given.names, given.widths) == ((0, 1), {0: "own", 1: "one"}, {0: 2, 1: 1})
    assert asked(given, ("B?", "one"), ("A?", "two"))[0] == [[6.0, 6.0], [3.0, 4.0]]  # of equal completions the mean
    assert asked(given, ("A?", "one"))[1] == [[1.0]]
    assert said is not None
    assert "mean" in said
    with pytest.raises(ValueError, match="no features"):
        asked(given, ("A?", "three"))
    again = GivenEmbedder(None, [str(tmp_path / "own.npy"), str(tmp_path / "one.npy")])
    again.take(TEXTS, PLACES, 5)
    assert again.identity() == given.identity()
    np.save(tmp_path / "one.npy", VALUES[:, 1])
    assert GivenEmbedder(None, [str(tmp_path / "own.npy"), str(tmp_path / "one.npy")]).identity() != given.identity()


def test_parquet_says_whose_row_is_whose_and_may_be_a_run_folders(tmp_path: Path) -> None:
    keys = [("b", 1), ("a", 1), ("a", 0), ("b", 0), ("z", 5)]
    columns: dict[str, Any] = {"task_id": [k for k, _ in keys], "sample": [s for _, s in keys]}
    (tmp_path / "layer=02").mkdir()
    lists = pa.array([[7.0, 1.0], [3.0, 1.0], [1.0, 1.0], [5.0, 1.0], [0.0, 0.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table(columns | {"embedding": lists}), tmp_path / "layer=02" / "part-0.parquet")
    pq.write_table(pa.table({"length": [1, 9, 3, 5, 7], "score": VALUES[:, 1]}), tmp_path / "plain.parquet")
    given = GivenEmbedder(None, [str(tmp_path / "layer=02"), str(tmp_path / "plain.parquet")])
    given.take(TEXTS, PLACES, 5)
    assert asked(given, ("A?", "one"), ("A?", "two")) == [[[1.0, 1.0], [3.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]]


def spoiled(path: Path, kind: str) -> tuple[Path, int]:
    """A file that cannot be used, and the number of lines of the candidates' file."""
    columns: dict[str, Any] = {"task_id": ["a", "a", "b", "b"], "sample": [0, 1, 0, 1], "x": [1.0, 2.0, 3.0, 4.0]}
    lines = 5
    if kind == "rows":
        np.save(path / "f.npy", VALUES[:4])
    elif kind == "finite":
        np.save(path / "f.npy", np.where(VALUES == 9, np.nan, VALUES))
    elif kind == "large":
        np.save(path / "f.npy", np.where(VALUES == 9, 1e39, VALUES))
    elif kind == "objects":
        pq.write_table(pa.table({"x": pa.array([{"a": 1}] * 5)}), path / "f.parquet")
        return path / "f.parquet", lines
    elif kind == "words":
        np.save(path / "f.npy", np.array(["a"] * 5))
    elif kind == "pickle":
        np.save(path / "f.npy", np.array([{}] * 5, dtype=object), allow_pickle=True)
    elif kind == "text":
        (path / "f.npy").write_text("1,2,3")
    else:
        columns["sample"] = {"twice": [0, 1, 0, 0], "lacks": [0, 1, 0, 2]}[kind]
        pq.write_table(pa.table(columns), path / "f.parquet")
        return path / "f.parquet", lines
    return path / "f.npy", lines


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("rows", "4 rows"),
        ("finite", "row 1 "),
        ("large", "row 1 .*float32"),
        ("objects", "no array"),
        ("words", "give numbers"),
        ("pickle", "no array"),
        ("text", "no array"),
        ("twice", "two rows"),
        ("lacks", "sample 1 of b"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path: Path, kind: str, word: str) -> None:
    file, lines = spoiled(tmp_path, kind)
    with pytest.raises(ValueError, match=word):
        GivenEmbedder(None, [str(file)]).take(TEXTS, PLACES, lines)


def imported(folder: Path, prompts: int = 40) -> tuple[list[str], np.ndarray]:
    """Candidates in lines that go round the prompts, rewards that the second of two files of features knows."""
    rng = np.random.default_rng(0)
    lines, knows = [], []
    for sample in range(5):
        for prompt in range(prompts):
            good = rng.normal()
            reward = float(good + 0.2 * rng.normal() > 0)
            text = {"prompt": f"Say {prompt}.", "completion": f"{prompt} {sample}", "reward": reward}
            lines.append(json.dumps(text))
            knows.append(good)
    (folder / "mine.jsonl").write_text("\n".join(lines))
    np.save(folder / "noise.npy", rng.normal(size=(len(lines), 3)))
    np.save(folder / "knows.npy", np.array(knows)[:, None] * 1e5 + 7e5)  # beyond float16
    return lines, np.array(knows)


def test_probes_are_trained_on_them_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    lines, knows = imported(tmp_path)
    model = ("model=hub", f"model.name={tiny_model.name}", "prompts=text")
    quick = ("evaluation.seeds=1", "evaluation.folds=3", "evaluation.bootstrap=100", "evaluation.losses=[auto]")
    words = [
        "import",
        "mine.jsonl",
        "--run",
        "run",
        "--features",
        "noise.npy",
        "--features",
        "knows.npy",
        *model,
        *quick,
    ]
    assert main.main(words) == 0
    said = capsys.readouterr()
    assert "QProbe.from_pretrained" in said.out
    probe = QProbe.from_pretrained("run/probes/prompts/auto")
    scores = probe.score(np.concatenate([np.load("noise.npy"), np.load("knows.npy")], axis=1))
    assert np.corrcoef(scores, knows)[0, 1] > 0.99
    assert "knows" in probe.training_["note"]
    with pytest.raises(ValueError, match="features of your own"):
        composition.policy(probe)
    # More candidates in both files: they join the run.
    Path("mine.jsonl").write_text(
        "\n".join([*lines, json.dumps({"prompt": "Say 0.", "completion": "x", "reward": 1.0})])
    )
    for name in ("noise", "knows"):
        values = np.load(f"{name}.npy")
        np.save(f"{name}.npy", np.concatenate([values, values[:1]]))
    assert main.main(words) == 0
    assert "1 candidates were added" in capsys.readouterr().err


def test_a_row_that_becomes_another_candidates_is_no_longer_the_same_features(tmp_path: Path) -> None:
    """The files' numbers stay as they are; whose they are changes, by the columns of one or by the lines of the candidates."""
    columns: dict[str, Any] = {"task_id": ["a", "a", "b", "b"], "x": [1.0, 2.0, 3.0, 4.0]}
    found = []
    for samples in ([0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1]):
        pq.write_table(pa.table(columns | {"sample": samples}), tmp_path / "f.parquet")
        given = GivenEmbedder(None, [str(tmp_path / "f.parquet")])
        given.take(TEXTS, PLACES, 5)
        found.append(given.identity())
    assert found[0] == found[2] != found[1]
    np.save(tmp_path / "f.npy", VALUES)
    found = []
    for places in (PLACES, PLACES | {("a", 1): 1}):
        given = GivenEmbedder(None, [str(tmp_path / "f.npy")])
        given.take(TEXTS, places, 5)
        found.append(given.identity())
    assert found[0] != found[1]
