"""The probes that a pipeline keeps: what their cards say, which layer they read, and that a lost one is made again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qprobe import store
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.probe.training import TrainingSettings

pytestmark = pytest.mark.usefixtures("plain_figures")

TRAINING = TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5)
SETTINGS = EvaluationSettings(losses=("reward_mse", "policy_gradient"), seeds=2, folds=3, draws=5, bootstrap=100)
WORK = STAGES[:-1]  # all but the report, whose figures take a second

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """12 prompts x 4 samples, cross-validated."""
    made: Make = fakes.maker(tmp_path / "run", training=TRAINING, settings=SETTINGS)
    return made


def test_the_saved_probes_know_what_they_read(make: Make) -> None:
    pipeline = make()
    pipeline.execute(("sample", "reward", "embed", "train"))
    folder = pipeline.run / "probes" / "numbers"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["policy_gradient", "reward_mse"]
    probe = QProbe.from_pretrained(folder / "policy_gradient")
    assert probe.source == EmbeddingSource({"name": "numbers"}, 1, "last", "bytes")
    assert (probe.loss, probe.k, probe.settings) == ("policy_gradient", 4, TRAINING)
    features = store.embeddings_of(
        store.found_table(pipeline.run / "features" / "numbers.sample" / "fake-numbers" / "layer=01").read()
    )
    assert probe.score(features).shape == (48,)
    with pytest.raises(ValueError, match="layer 1"):
        probe.score(features, EmbeddingSource({"name": "numbers"}, 2, "last", "bytes"))


def test_a_final_probe_that_is_missing_is_made_again_the_same(make: Make) -> None:
    pipeline = make()
    pipeline.execute(WORK)
    folder = pipeline.run / "probes" / "numbers"
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "reward_mse" / "probe.json").unlink()
    make().execute(["train"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole


def test_what_an_application_needs_is_in_the_cards(make: Make) -> None:
    make(use={"prompts": "chat"}).execute(WORK)
    pipeline = make(use={"prompts": "text"})
    folder = pipeline.final_probe()
    assert QProbe.from_pretrained(folder).use == {"prompts": "chat"}
    sweep = (folder.parent / "sweep.json").stat().st_mtime_ns
    pipeline.execute(WORK)
    assert QProbe.from_pretrained(folder).use == {"prompts": "text"}
    assert (folder.parent / "sweep.json").stat().st_mtime_ns == sweep  # only the cards are older


def test_probes_read_the_highest_layer_unless_another_is_asked_for(make: Make, fakes: ModuleType) -> None:
    first = make(embedder=fakes.Embedder((2, 1)))
    assert first.probe_layer == 2
    first.execute(("sample", "reward", "embed", "train"))
    probe = QProbe.from_pretrained(first.run / "probes" / "numbers" / "reward_mse")
    assert probe.source is not None
    assert probe.source.layer == 2
    make(embedder=fakes.Embedder((2, 1)), layer=1).execute(["train"])
    probe = QProbe.from_pretrained(first.run / "probes" / "numbers" / "reward_mse")
    assert probe.source is not None
    assert probe.source.layer == 1


def test_a_split_may_have_its_own_number_of_samples_and_is_chosen_from_all_of_them(
    make: Make, fakes: ModuleType
) -> None:
    few, many = fakes.split("few", 8), fakes.split("many", 9)
    pipeline = make(tests=[few, many], training_split=few, greedy=None, samples={"many": 7})
    pipeline.execute(WORK)
    assert [pool.smallest for pool in pipeline.test_pools] == [4, 7]
    assert [pipeline.results(split).k for split in (few, many)] == [4, 7]
    assert pipeline.k == 4  # what probes are trained for
    rewards = pipeline.rows(pipeline.test_pools[1], 1).rewards.reshape(9, 7)
    (skyline,) = [row for row in pipeline.results(many).rows if row.method == "skyline pass@7"]
    assert skyline.value == pytest.approx(rewards.max(axis=1).mean())


@pytest.mark.parametrize("samples", [{"nobody": 3}, {"numbers": 0}])
def test_a_number_of_samples_that_cannot_be_is_refused(make: Make, samples: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="samples"):
        make(samples=samples)


def test_auto_alone_is_a_table_of_its_own_and_points_to_its_probe(make: Make, fakes: ModuleType) -> None:
    settings = dataclasses.replace(SETTINGS, losses=("auto",), controls=("likelihood_columns", "shuffled_labels"))
    pipeline = make(embedder=fakes.EmbedderWithColumns((1, 2)), settings=settings)
    pipeline.execute(WORK)
    rows = {row.method: row for row in pipeline.results(pipeline.tests[0]).rows}
    assert rows["shuffled labels"].value is None  # not run: there is no loss to train it by
    assert rows["Q-probe auto"].value is not None
    probe = QProbe.from_pretrained(pipeline.final_probe())
    assert probe.source is not None
    assert (probe.source.blocks, probe.source.likelihood) == ((1, 2, -1), {"columns": "fake"})
    # The signal of these fakes is layer 1's first number: the probe finds it.
    assert rows["Q-probe auto"].value == rows["skyline pass@4"].value
