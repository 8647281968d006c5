"""Every shipped experiment composes; local ones run, shrunk, on a tiny model; bad settings are sentences before any work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import qprobe_preference.__main__ as command
from qprobe.models.language_model import ModelSpec
from qprobe.report.results import Results
from qprobe_preference import comparison
from qprobe_preference.dataset import Dataset

CONF = Path(command.__file__).parent / "conf"
# Those of policies are in test_policy.py.
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml") if "policy" not in p.read_text())
WORDS = ["red", "blue", "green", "gold", "grey", "pink", "black", "white", "brown", "plum"]


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_module("qprobe_preference.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def hh_file(folder: Path) -> Path:
    """Ten pairs of two turns, and one without an answer."""
    start = "\n\nHuman: Is {0} a colour?\n\nAssistant: Yes.\n\nHuman: And {0} again?\n\nAssistant:"
    rows = [{"chosen": f"{start.format(w)} {w}!", "rejected": f"{start.format(w)} no {w}"} for w in WORDS]
    rows.append({"chosen": f"{start.format('x')} x", "rejected": f"{start.format('x')} "})
    path = folder / "hh.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def shrunk(model: ModelSpec, folder: Path) -> list[str]:
    return [
        *("model=hub", f"model.name={model.name}", "model.dtype=float32", "model.device=cpu", f"paths.runs={folder}"),
        *("embedder.layers=[1,2]", "probe.steps=5", "evaluation.seeds=2", "evaluation.bootstrap=100"),
    ]


def test_every_experiment_composes_with_pairs_as_candidates() -> None:
    assert "hh_local" in EXPERIMENTS
    for name in EXPERIMENTS:
        config = composed(
            [f"experiment={name}", "dataset.path=x", *(["dataset.options.pool=p"] if name == "run_pairs" else [])]
        )
        assert (config["evaluation"]["losses"], config["evaluation"]["k"]) == (["bradley_terry"], 2), name
        assert (config["sampler"]["greedy"], config["evaluation"]["beta"]) == (False, 0.0), name
        dataset = config["dataset"] | {"train_split": None}
        assert Dataset.of(dataset, 0).name == config["dataset"]["name"]


def test_hh_local_compares_layers_and_shapes_on_one_embedding(
    tiny_code_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "experiment=hh_local",
        f"dataset.path={hh_file(tmp_path)}",
        "dataset.limit=8",
        "compare.hidden=[[3]]",
    ]
    config = composed([*overrides, *shrunk(tiny_code_model, tmp_path)])
    command.run(config)
    printed = capsys.readouterr().out
    assert "hh: 8 pairs of 8 prompts. None was dropped." in printed  # the empty one comes after them
    run = tmp_path / "hh_local-limit8"
    table = (run / "tables" / "compared.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| 0") or line[:3] in ("| 1", "| 2")
    ]
    assert [row[:3] for row in rows] == [[layer, "MLP [3]", "L_QP"] for layer in ("1", "2")]
    for row, folder in zip(rows, ["01.3", "02.3"], strict=True):
        results = Results.read(run / "compared" / f"layer={folder}" / "results" / "hh.json")
        probe = next(r for r in results.rows if r.method == "Q-probe L_QP")
        assert row[3] == f"{probe.auc:.3f}"
        # nothing is held out of eight pairs: the temperature is 0, and the reward is the pair accuracy
        assert probe.beta == 0
        assert probe.value == pytest.approx(probe.auc)
        assert results.rows[0].value == pytest.approx(0.5)
    assert {p.parent.name for p in (run / "features").rglob("part-*")} == {"layer=01", "layer=02"}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("part-*.parquet")}
    command.run(config | {"stages": ["sample", "reward", "embed", "train", "evaluate"]})
    assert {path: path.stat().st_mtime_ns for path in run.rglob("part-*.parquet")} == before


def test_variants_are_all_layers_by_all_shapes() -> None:
    every = comparison.variants({"layers": [6, 12], "hidden": [[], [256]]})
    assert [(v.layer, v.hidden) for v in every] == [(6, ()), (6, (256,)), (12, ()), (12, (256,))]
    assert [(v.layer, v.hidden) for v in comparison.variants({"layers": [6], "hidden": []})] == [(6, None)]
    assert comparison.variants({"layers": [], "hidden": []}) == []


def test_a_training_and_a_test_set_of_files_share_no_prompt(
    tiny_code_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str, words: list[str]) -> Path:
        rows = [{"prompt": [{"role": "user", "content": w}], "chosen": f"{w}!", "rejected": "no"} for w in words]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    files = [f"dataset.path={written('b.jsonl', WORDS[7:])}", f"dataset.train_path={written('a.jsonl', WORDS[:8])}"]
    stages = "stages=[sample,reward,embed,train,evaluate]"
    command.run(composed(["experiment=trl", *files, *shrunk(tiny_code_model, tmp_path), stages]))
    printed = capsys.readouterr().out
    assert "pairs-train: 7 pairs of 7 prompts. Dropped: shared_with_test 1." in printed
    results = Results.read(tmp_path / "trl" / "results" / "pairs.json")
    assert results.protocol == "trained on pairs-train, tested here"
    assert results.rows[0].prompts == 3


def test_one_set_is_cut_by_prompts(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    overrides = ["experiment=hh_local", f"dataset.path={hh_file(tmp_path)}", "dataset.test_share=0.3"]
    pipeline = command.make_pipeline(composed([*overrides, *shrunk(tiny_code_model, tmp_path)]))
    assert pipeline.training_split is not None
    assert [len(s.prompts) for s in (pipeline.training_split, *pipeline.tests)] == [7, 3]


def test_dialogues_are_cut_to_a_budget_of_the_embedders_tokens(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    overrides = ["experiment=hh_local", f"dataset.path={hh_file(tmp_path)}", "dataset.max_tokens=45"]
    pipeline = command.make_pipeline(composed([*overrides, *shrunk(tiny_code_model, tmp_path)]))
    (split,) = pipeline.tests
    assert split.recorded is not None
    assert {len(prompt.messages) for prompt in split.prompts} == {1}
    for prompt in split.prompts:
        longest = max(len(pipeline.embedder.encode_completion(text)) for text in split.recorded[prompt.task_id])
        assert len(pipeline.sampler.render(prompt)[1]) + longest <= 45


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.format=csv"], r"dataset\.format is 'csv': choose from hh, shp, oasst, trl, run"),
        (["dataset.limit=0"], r"dataset\.limit is 0"),
        (["dataset.limit=few"], r"dataset\.limit is 'few': it should be int"),
        (["dataset.test_share=1.5"], r"dataset\.test_share is 1\.5"),
        (["dataset.test_share=0.5", "dataset.train_path=x"], "test_share cuts one set in two"),
        (["dataset.train_split=train"], r"give dataset\.train_path=FILE"),
        (["dataset.path=null"], "There are no pairs to read"),
        (["dataset.prompts=poem"], r"dataset\.prompts is 'poem'"),
        (["+dataset.options.ratio=2"], r"dataset\.options has no key ratio"),
        (["+dataset.pairs=2"], "dataset has no key pairs"),
        (["dataset.max_tokens=0"], r"dataset\.max_tokens is 0"),
        (["sampler.greedy=true"], "answers of pairs are there already"),
    ],
)
def test_bad_settings_are_sentences_before_any_work(
    overrides: list[str], message: str, tiny_code_model: ModelSpec, tmp_path: Path
) -> None:
    start = ["experiment=hh_local", f"dataset.path={hh_file(tmp_path)}", *shrunk(tiny_code_model, tmp_path)]
    with pytest.raises(ValueError, match=message):
        command.make_pipeline(composed([*start, *overrides]))
    assert not (tmp_path / "hh_local").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compare.layers", "[3]", "The probes read layer 3, but the embedder makes"),
        ("compare.layers", "3", r"compare\.layers is 3: a list"),
        ("compare.hidden", "[256]", r"compare\.hidden is \[256\]: a list of lists"),
    ],
)
def test_layers_and_shapes_that_cannot_be_compared_are_sentences(
    key: str, value: str, message: str, tiny_code_model: ModelSpec, tmp_path: Path
) -> None:
    start = ["experiment=hh_local", f"dataset.path={hh_file(tmp_path)}", *shrunk(tiny_code_model, tmp_path)]
    with pytest.raises(ValueError, match=message):
        command.run(composed([*start, f"{key}={value}"]))


def test_a_file_must_be_named() -> None:
    with pytest.raises(MissingMandatoryValue, match=r"dataset\.path"):
        composed(["experiment=hh_local"])


def test_every_key_of_every_configuration_has_a_comment() -> None:
    files = sorted(CONF.rglob("*.yaml"))
    assert len(files) > 12
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        if path.parent.name != "experiment":  # an experiment overrides keys that are commented where they are defined
            keys = [n for n, line in enumerate(lines) if re.match(r"\s*\w+: [^|]", line)]
            bare = [lines[n] for n in keys if not lines[n - 1].strip().startswith("#") and "hydra" not in lines[n]]
            assert not bare, (path, bare)
