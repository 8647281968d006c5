"""A recorded run stands in for its model: the same tables, and a sentence for everything that was not recorded."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe import store
from qprobe.baselines.few_shot import FewShot, FewShotSettings
from qprobe.cli.main import main
from qprobe.embedding import LIKELIHOOD
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.models.language_model import ModelSpec
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.prompts import Prompt
from qprobe.run.recording import RecordedEmbedder, RecordedSampler, open_recording, pack
from qprobe.sampling import SamplingSettings
from qprobe.store.table import StoreError

MODEL = ModelSpec("none is loaded")
TRAINING = TrainingSettings(steps=20, learning_rate=0.1, minimum_mixed=2, check_every=5)
SETTINGS = EvaluationSettings(losses=("reward_mse",), seeds=2, folds=3, draws=5, bootstrap=100)

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    def made(name: str, **changes: Any) -> Pipeline:
        settled = {"training": TRAINING, "settings": SETTINGS, "embedder": fakes.Embedder((1, 2))} | changes
        piped: Pipeline = fakes.pipeline(tmp_path / name, **settled)
        return piped

    return made


@pytest.fixture
def packed(make: Make, tmp_path: Path) -> str:
    make("real").execute(["sample", "embed"])
    pack(tmp_path / "real", tmp_path / "packed", notes={"weights": "arithmetic"})
    return str(tmp_path / "packed")


def recorded(packed: str, n: int = 4, layers: list[int] | None = None) -> dict[str, Any]:
    """Back ends that give back what was recorded."""
    law = SamplingSettings(n=n)
    return {
        "sampler": RecordedSampler(MODEL, law, packed),
        "greedy": RecordedSampler(MODEL, dataclasses.replace(law, n=1, temperature=0.0), packed),
        "embedder": RecordedEmbedder(MODEL, packed, layers),
    }


def table_of(pipeline: Pipeline, kind: str) -> list[dict[str, Any]]:
    pool = pipeline.pools[["sample", "greedy"].index(kind)]
    rows: list[dict[str, Any]] = pool.completions.read(pool.batches).to_pylist()
    return rows


def test_a_recorded_run_gives_the_tables_and_results_of_the_run_itself(make: Make, packed: str) -> None:
    real, again = make("real"), make("again", **recorded(packed))
    real.execute(["reward", "train", "evaluate"])
    again.execute(["sample", "reward", "embed", "train", "evaluate"])
    for kind in ("sample", "greedy"):
        assert table_of(again, kind) == table_of(real, kind)
    for layer in (1, 2):
        theirs, ours = (
            p.sample_pools[0].features(p.embedder, layer).read_embeddings(p.sample_pools[0].batches)
            for p in (real, again)
        )
        assert ours[0] == theirs[0]
        np.testing.assert_array_equal(ours[1], theirs[1])
    split = real.tests[0]
    assert again.results(split).rows == real.results(split).rows
    # Whose completions they are is known by content: other results than of another recording.
    assert again.results(split).made_from != real.results(split).made_from


def test_likelihood_columns_are_recorded_digit_for_digit_and_read_by_auto(
    make: Make, fakes: ModuleType, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, losses=("auto", "reward_mse"), controls=("likelihood_columns",))
    real = make("real", embedder=fakes.EmbedderWithColumns((1, 2)), settings=settings)
    real.execute(["sample", "reward", "embed", "train", "evaluate"])
    pack(tmp_path / "real", tmp_path / "packed", layers=[1])
    back_ends = recorded(str(tmp_path / "packed"))
    assert back_ends["embedder"].layers == [1]
    with_columns = RecordedEmbedder(MODEL, str(tmp_path / "packed"), likelihood=True)
    again = make("again", **back_ends | {"embedder": with_columns}, settings=settings)
    again.execute(["sample", "reward", "embed", "train", "evaluate"])
    (theirs, ours) = (p.rows(p.sample_pools[0], LIKELIHOOD).features for p in (real, again))
    assert theirs is not None
    assert ours is not None
    np.testing.assert_array_equal(theirs, ours)
    assert len(np.unique(theirs % 1)) == 1  # float16 would have lost the .25
    assert theirs.dtype == np.float32
    found = {row.method: row for row in again.results(again.tests[0]).rows}
    assert found["Q-probe auto"].value is not None
    # All columns rise together: what the sum of tokens says is said by each, up to its sign.
    assert found["highest self-certainty"].value == found["highest least log-probability"].value
    assert found["lowest mean entropy"].value != found["highest self-certainty"].value


def test_a_recording_without_columns_says_so(packed: str) -> None:
    with pytest.raises(ValueError, match="likelihood"):
        RecordedEmbedder(MODEL, packed, likelihood=True)


def test_fewer_prompts_and_completions_than_were_recorded_are_its_first(
    make: Make, fakes: ModuleType, packed: str
) -> None:
    few = make("few", tests=[fakes.split("numbers", 5)], **recorded(packed, n=2, layers=[2]))
    few.execute(["sample", "embed"])
    everything = {(row["task_id"], row["sample"]): row for row in table_of(make("real"), "sample")}
    rows = table_of(few, "sample")
    assert len(rows) == 10
    assert all(row == everything[row["task_id"], row["sample"]] for row in rows)


def test_the_card_says_who_made_what(packed: str) -> None:
    card = json.loads((Path(packed) / "recording.json").read_text())
    assert card["notes"] == {"weights": "arithmetic"}
    assert card["completions"]["numbers.sample"]["inputs"]["sampler"]["model"] == {"name": "numbers"}
    assert "created" in card["completions"]["numbers.greedy"]
    assert [entry["inputs"]["layer"] for entry in card["features"]] == [1, 2]


def test_what_was_not_recorded_is_a_sentence(fakes: ModuleType, packed: str) -> None:
    ends = recorded(packed)
    prompt = fakes.prompts(1)[0]
    with pytest.raises(ValueError, match="t-900"):
        ends["sampler"].render(Prompt("t-900", text="x"))
    with pytest.raises(ValueError, match="recorded"):
        ends["sampler"].render(dataclasses.replace(prompt, text="Task 0"))
    with pytest.raises(ValueError, match="completions"):
        ends["sampler"].sample([[1]], [[1, 2]])
    with pytest.raises(ValueError, match="completions"):
        ends["embedder"].embed([[1]], [[[2]]])
    with pytest.raises(ValueError, match="layer 7"):
        RecordedEmbedder(MODEL, packed, [7])
    with pytest.raises(StoreError, match="recording"):
        open_recording(str(Path(packed) / "features"))
    with pytest.raises(StoreError, match="no_such_package"):
        open_recording("no_such_package:folder")


def test_a_damaged_file_is_a_sentence(packed: str) -> None:
    path = Path(packed) / "features" / "numbers.sample.layer=01.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(StoreError, match="parquet"):
        RecordedEmbedder(MODEL, packed).embed([[1]], [[[2]]])


def test_an_unfinished_run_is_not_packed(make: Make, tmp_path: Path) -> None:
    pipeline = make("half")
    pipeline.execute(["sample"])
    with pytest.raises(StoreError, match="stages"):
        pack(tmp_path / "half", tmp_path / "out")
    pipeline.execute(["embed"])
    with pytest.raises(StoreError, match="layer 9"):
        pack(tmp_path / "half", tmp_path / "out", [9])
    pool = pipeline.sample_pools[0]
    pool.features(pipeline.embedder, 2).part(pool.batches[0]).unlink()
    with pytest.raises(StoreError, match="missing"):
        pack(tmp_path / "half", tmp_path / "out")
    assert pack(tmp_path / "half", tmp_path / "out", [1]) > 0  # that layer is whole
    pool.completions.part(pool.batches[0]).unlink()
    with pytest.raises(StoreError, match="missing"):
        pack(tmp_path / "half", tmp_path / "out", [1])
    assert not store.found_table(tmp_path / "half" / "completions" / "numbers.sample").has(pool.batches[0])


def test_what_baselines_asked_is_not_recorded(make: Make, fakes: ModuleType, tmp_path: Path) -> None:
    """Few-shot puts the same task ids in other prompts, which must not stand in the place of the split's own."""
    splits = {"tests": [fakes.split("tested", 6, start=50)], "training_split": fakes.split("learnt", 8)}
    shown = FewShot(fakes.Sampler(1, temperature=0.0), FewShotSettings(shots=1), lambda: None)
    make("real", baselines=[shown], **splits).execute(["sample", "reward", "embed", "baselines"])
    assert (tmp_path / "real" / "completions" / "tested.few_shot").is_dir()
    pack(tmp_path / "real", tmp_path / "packed")
    again = make("again", **splits, **recorded(str(tmp_path / "packed")))
    again.execute(["sample", "embed"])
    assert table_of(again, "sample") == table_of(make("real", **splits), "sample")
    assert sorted(open_recording(str(tmp_path / "packed")).card["prompts"]) == ["learnt", "tested"]


def test_a_layer_by_two_embedders_is_a_sentence(
    make: Make, fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would share a file, and whoever came first would be lost."""
    make("real").execute(["sample", "embed"])
    monkeypatch.setattr(fakes.Embedder, "folder_name", lambda self: "other")
    make("real", embedder=fakes.Embedder((2,), width=9)).execute(["embed"])
    with pytest.raises(StoreError, match="embedders"):
        pack(tmp_path / "real", tmp_path / "packed")
    assert pack(tmp_path / "real", tmp_path / "packed", [1]) > 0


def test_a_pool_may_have_more_layers_than_another(make: Make, fakes: ModuleType, tmp_path: Path) -> None:
    one, two = fakes.split("one", 6), fakes.split("two", 6, start=50)
    make("real", tests=[one, two], embedder=fakes.Embedder((2,))).execute(["sample", "embed"])
    make("real", tests=[one]).execute(["embed"])
    pack(tmp_path / "real", tmp_path / "packed")
    ends = recorded(str(tmp_path / "packed"))
    assert ends["embedder"].layers == [1, 2]
    make("again", tests=[one], **ends).execute(["sample", "embed"])
    with pytest.raises(ValueError, match="completions"):
        make("both", tests=[one, two], **ends).execute(["sample", "embed"])
    make("higher", tests=[one, two], **recorded(str(tmp_path / "packed"), layers=[2])).execute(["sample", "embed"])


def test_the_command_packs_and_says_how_to_use_it(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("real").execute(["sample", "embed"])
    words = ["pack", str(tmp_path / "real"), str(tmp_path / "out"), "--layers", "2", "--note"]
    assert main([*words, "weights=a=b"]) == 0
    assert f"embedder.recording={tmp_path / 'out'}" in capsys.readouterr().out
    opened = open_recording(str(tmp_path / "out"))
    assert (opened.layers, opened.card["notes"]) == ([2], {"weights": "a=b"})
    assert main([*words, "nameless"]) == 1
    assert "has no name: write NAME=TEXT" in capsys.readouterr().err
