"""Every shipped experiment composes and keeps what the user says; local ones run, shrunk; bad settings are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf.errors import MissingMandatoryValue

import qprobe_preference.__main__ as command
from qprobe.cli import composition
from qprobe.report.results import Results
from qprobe.settings import build
from qprobe_preference.dataset import Dataset

pytestmark = pytest.mark.usefixtures("plain_figures")

EXPERIMENTS = sorted(path.stem for path in (Path(command.__file__).parent / "conf" / "experiment").glob("*.yaml"))
# Those of policies run in test_policy.py.
PAIRS = ["hh", "hh_local", "oasst", "run_pairs", "shp", "trl"]
PROBE: dict[str, Any] = {"hidden": [3], "steps": 7, "learning_rate": 0.123, "held_out": 0.37, "standardize": True}
EVALUATION: dict[str, Any] = {"seeds": 3, "k": 2, "beta": 0.7, "curve_shares": [0.3], "controls": ["length", "logprob"]}

Composed = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", PAIRS)
def test_an_experiment_on_pairs_takes_them_as_two_candidates(name: str, composed: Composed) -> None:
    pool = ["dataset.options.pool=p"] if name == "run_pairs" else []
    config = composed(f"experiment={name}", "dataset.path=x", *pool)
    assert (config["evaluation"]["losses"], config["evaluation"]["k"]) == (["bradley_terry"], 2)
    assert (config["sampler"]["greedy"], config["evaluation"]["beta"]) == (False, 0.0)
    build(Dataset, config["dataset"] | {"train_split": None}, "dataset", seed=0)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("choice", ["probe=linear", "probe=mlp"])
def test_what_the_user_says_is_what_runs(name: str, choice: str, composed: Composed) -> None:
    words = [
        *(f"probe.{key}={v}" for key, v in PROBE.items()),
        *(f"evaluation.{key}={v}" for key, v in EVALUATION.items()),
    ]
    config = composed(f"experiment={name}", choice, "layer=best", "model=embedded", *words, missing=True)
    procedure = composition.procedures(config)[0]
    found = dataclasses.asdict(procedure.training) | dataclasses.asdict(procedure.settings)
    assert {
        key: list(v) if isinstance(v := found[key], tuple) else v for key in PROBE | EVALUATION
    } == PROBE | EVALUATION
    assert procedure.layer == "best"
    assert (config["model"]["name"], config["model"]["device_map"]) == ("embedded", None)
    hub = composed(f"experiment={name}", "model=hub", "model.name=own", missing=True)["model"]
    assert hub == config["model"] | {"name": "own"}


def test_hh_local_compares_layers_and_shapes_on_one_embedding(
    composed: Composed, tiny_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        "experiment=hh_local", *tiny_words, "embedder.layers=[1,2]", "dataset.limit=8", "compare.hidden=[[3]]"
    )
    command.run(config)
    assert "hh: 8 pairs of 8 prompts. None was dropped." in capsys.readouterr().out  # the empty one comes after them
    run = tmp_path / "hh_local-limit8"
    table = (run / "tables" / "compared.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [row for row in cells if row[0] in ("1", "2")]
    assert [row[:3] for row in rows] == [[layer, "MLP [3]", "L_QP"] for layer in ("1", "2")]
    for row, folder in zip(rows, ["01.3", "02.3"], strict=True):
        results = Results.read(run / "compared" / f"layer={folder}" / "results" / "hh.json")
        probe = next(r for r in results.rows if r.method == "Q-probe L_QP")
        assert row[3] == f"{probe.auc:.3f}"
        # Nothing is held out of eight pairs: the temperature is 0, and the reward is the pair accuracy.
        assert probe.beta == 0
        assert probe.value == pytest.approx(probe.auc)
        assert results.rows[0].value == pytest.approx(0.5)
    assert {p.parent.name for p in (run / "features").rglob("part-*")} == {"layer=01", "layer=02"}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("part-*.parquet")}
    command.run(config | {"stages": ["sample", "reward", "embed", "train", "evaluate"]})
    assert {path: path.stat().st_mtime_ns for path in run.rglob("part-*.parquet")} == before


def test_a_training_and_a_test_set_of_files_share_no_prompt(
    composed: Composed, tiny_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str, numbers: range) -> Path:
        rows = [
            {"prompt": [{"role": "user", "content": f"{n}?"}], "chosen": f"{n}!", "rejected": "no"} for n in numbers
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    files = [f"dataset.path={written('b.jsonl', range(7, 10))}", f"dataset.train_path={written('a.jsonl', range(8))}"]
    stages = "stages=[sample,reward,embed,train,evaluate]"
    command.run(composed("experiment=trl", *tiny_words, *files, "embedder.layers=[2]", stages))
    assert "pairs-train: 7 pairs of 7 prompts. Dropped: shared_with_test 1." in capsys.readouterr().out
    results = Results.read(tmp_path / "trl" / "results" / "pairs.json")
    assert results.protocol == "trained on pairs-train, tested here"
    assert results.rows[0].prompts == 3


def test_one_set_is_cut_by_prompts_and_dialogues_to_a_budget_of_the_embedders_tokens(
    composed: Composed, tiny_words: list[str]
) -> None:
    words = [
        "experiment=hh_local",
        *tiny_words,
        "embedder.layers=[1,2]",
        "dataset.test_share=0.3",
        "dataset.max_tokens=45",
    ]
    pipeline = command.make_pipeline(composed(*words))
    (test,) = pipeline.tests
    assert pipeline.training_split is not None
    assert [len(split.prompts) for split in (pipeline.training_split, test)] == [7, 3]
    assert test.recorded is not None
    for prompt in test.prompts:
        assert len(prompt.messages) == 1
        longest = max(len(pipeline.embedder.encode_completion(text)) for text in test.recorded[prompt.task_id])
        assert len(pipeline.sampler.render(prompt)[1]) + longest <= 45


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["dataset.format=csv"], r"dataset\.format"),
        (["dataset.limit=0"], r"dataset\.limit"),
        (["dataset.limit=few"], r"dataset\.limit"),
        (["dataset.test_share=1.5"], r"dataset\.test_share"),
        (["dataset.test_share=0.5", "dataset.train_path=x"], r"dataset\.test_share"),
        (["dataset.train_split=train"], r"dataset\.train_path"),
        (["dataset.path=null"], r"dataset\.path"),
        (["dataset.prompts=poem"], r"dataset\.prompts"),
        (["+dataset.options.ratio=2"], r"dataset\.options has no key ratio"),
        (["+dataset.pairs=2"], "dataset has no key pairs"),
        (["dataset.max_tokens=0"], r"dataset\.max_tokens"),
        (["sampler.greedy=true"], r"sampler\.greedy"),
        (["layer=9"], "layer is 9"),
        (["compare.layers=[3]"], "layer 3"),
    ],
)
def test_a_bad_setting_is_said_before_any_work(
    words: list[str], key: str, composed: Composed, tiny_words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=key):
        command.run(composed("experiment=hh_local", *tiny_words, "embedder.layers=[1,2]", *words, "stages=[train]"))
    assert not (tmp_path / "hh_local").exists()


def test_a_file_must_be_named(composed: Composed) -> None:
    with pytest.raises(MissingMandatoryValue, match=r"dataset\.path"):
        composed("experiment=hh_local")


def test_every_key_of_every_configuration_has_a_comment(conf: Path) -> None:
    files = sorted(conf.rglob("*.yaml"))
    assert len(files) > 12
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        # An experiment, and a file with defaults, override keys that are commented where they are defined.
        if path.parent.name != "experiment" and (
            path.parent.name != "dataset" or "\ndefaults:" not in path.read_text()
        ):
            keys = [n for n, line in enumerate(lines) if re.match(r"\s*\w+: [^|]", line)]
            bare = [lines[n] for n in keys if not lines[n - 1].strip().startswith("#") and "hydra" not in lines[n]]
            assert not bare, (path, bare)
