"""Every shipped experiment composes and runs, shrunk, on a tiny model; what a full one lacks is said before any work."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qprobe
import qprobe_code_gen.__main__ as command
from qprobe.baselines.base import Fitted
from qprobe.cli import composition
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineSettings
from qprobe.pipeline.steps import STAGES
from qprobe.sampling.vllm import VLLMSampler

CONF, CORE = Path(command.__file__).parent / "conf", Path(qprobe.__file__).parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# What a procedure puts on top follows from it, and is no choice of its own.
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for folder in (CONF, CORE)
    for path in folder.glob("*/*.yaml")
    if path.parent.name != "on_top"
)
MUST_BE_SAID = {
    "model=hub": ["model.name=m"],
    "sampler=openai": ["sampler.api.model=m"],
    "embedder=openai": ["embedder.api.model=m"],
    "sampler=recorded": ["sampler.recording=r"],
    "embedder=recorded": ["embedder.recording=r"],
}
# Experiments on an API: by themselves, or by the one that they begin with.
ON_API = [name for name in EXPERIMENTS if name.startswith(("table2", "table4"))]
Composed = Callable[..., dict[str, Any]]


def said(experiment: str) -> list[str]:
    """What an experiment asks its user for; a group chosen otherwise may not know the key."""
    return [f"experiment={experiment}", *(["++sampler.api.model=m"] if experiment in ON_API else [])]


@pytest.fixture
def shrunk(tiny_words: list[str], local_data: dict[str, list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """An experiment in small: local data, two problems a set, two short samples each, the tiny model."""

    def words(experiment: str) -> list[str]:
        return [
            *(f"experiment={experiment}", *local_data["gsm8k" if experiment.startswith("gsm8k") else "mbpp"]),
            *(*tiny_words, "limit=2", "sampler.n=2", "sampler.max_new_tokens=5", f"paths.runs={tmp_path}"),
            # The tiny model has no success.
            *("baselines.few_shot.shots=1", "baselines.few_shot.success=0.0", "baselines.sft.success=0.0"),
            *("baselines.sft.epochs=1", "baselines.finetune_rm.epochs=1", "baselines.prompt_rm.model=null"),
            *("evaluation.k=2", "evaluation.folds=2", "sandbox.workers=1"),
        ]

    return words


def weighed(name: str) -> Any:
    """Variants of another experiment, those that fine-tune, and the longest (seven seconds), are for CI."""
    heavy = name in ("table1", "recorded_mbpp") or name.endswith(("_ours", "_mlp", "_few_shot", "_baselines"))
    return pytest.param(name, marks=pytest.mark.slow) if heavy else name


@pytest.mark.usefixtures("plain_figures")
@pytest.mark.parametrize("name", [weighed(name) for name in EXPERIMENTS])
def test_every_experiment_runs_shrunk(
    name: str,
    make_server: Callable[[ModelSpec], Any],
    tiny_code_model: ModelSpec,
    composed: Composed,
    shrunk: Callable[..., list[str]],
    tmp_path: Path,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*shrunk(name), "model.device_map=null"]
    if name.startswith("recorded"):  # model and problems are those of the recording
        words = [word for word in words if not word.startswith(("model", "embedder", "sampler.max", "dataset"))]
    words += ["embedder.layers=[1,2]"] if name.endswith("_ours") else []
    words += ["authors.layer=1"] if name in ("table1_ours", "table2_ours") else []
    server = make_server(tiny_code_model) if name in ON_API else None
    if server is not None:
        words += ["sampler.api.model=tiny", f"sampler.api.base_url={server.url}"]
        embedding = [f"embedder.api.base_url={server.url}", "embedder.api.model=tiny", "dataset.prompt_style=zero_shot"]
        words += embedding if name.startswith("table4") else []
    if name == "table1_few_shot":
        command.run(composed([*shrunk("table1"), "model.device_map=null", "stages=[sample,reward]"]))
        capsys.readouterr()
        # A model of random weights solves nothing.
        words += [
            f"dataset.shots={tmp_path}/table1-limit2",
            "baselines.few_shot.shots=1",
            "baselines.few_shot.success=0",
        ]
    config = composed(words)
    config["evaluation"]["curve_shares"] = config["evaluation"]["curve_shares"][:1]
    # Without a success it has nothing to learn, and says so (test_baselines_trained.py).
    config["baselines"]["names"] = [name for name in config["baselines"]["names"] if name != "finetune_rm"]
    command.run(config)
    printed = capsys.readouterr()
    assert "This run needs: " in printed.err
    assert "2 prompts x 2 samples" in printed.out
    assert "Q-probe L_PG" in printed.out
    assert ("self-consistency" in printed.out) == ("self_consistency" in config["baselines"]["names"])
    # The model is not the paper's.
    assert not [path for path in tmp_path.rglob("tables/*.md") if "| paper |" in path.read_text()]
    assert str(tmp_path / f"{name}-limit2" / "tables") in printed.out
    figures = sorted((tmp_path / f"{name}-limit2").rglob("*.png"))
    evaluation = config["evaluation"]
    per_test = 3 + bool(evaluation["curve_shares"]) + (config["layer"] == "best")
    assert len(figures) == per_test * len(config["dataset"]["test"])
    if server is not None:
        table4 = {"/v1/completions", "/v1/embeddings"}
        asked = {path for path, _, _ in server.requests}
        assert asked == (table4 if name.startswith("table4") else {"/v1/chat/completions"})
        usage = [line for path in tmp_path.rglob("usage.jsonl") for line in path.read_text().splitlines()]
        assert sum(json.loads(line)["calls"] for line in usage) == len(server.requests)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    # All is there: the same words draw and read nothing, so that nothing needs to be said. Figures would be drawn again.
    command.run(config | {"stages": [stage for stage in config["stages"] if stage != "report"]})
    assert "needs" not in capsys.readouterr().err


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice: str, composed: Composed) -> None:
    words = [choice, *MUST_BE_SAID.get(choice, [])]
    group, _, name = choice.partition("=")
    config = composed(said(name) if group == "experiment" else [*words, "experiment=demo"])
    assert set(config) == command.KEYS
    if (CORE / group / f"{name}.yaml").exists():
        assert set(composition.composed("run", words)) >= composition.KEYS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_choice_of_every_group_composes_with_every_experiment(experiment: str, composed: Composed) -> None:
    # A choice of every group at once, so that all are seen in as few rounds as the largest group has choices.
    chosen = [choice for choice in CHOICES if not choice.startswith("experiment=")]
    groups = [list(own) for _, own in itertools.groupby(chosen, lambda choice: choice.partition("=")[0])]
    seen = set()
    for number in range(max(map(len, groups))):
        words = [own[number % len(own)] for own in groups]
        seen.update(words)
        must = [word for choice in words for word in MUST_BE_SAID.get(choice, [])]
        assert set(composed([*words, *must, *said(experiment)])) == command.KEYS
    assert seen == set(chosen)


def test_every_key_of_every_configuration_has_a_comment() -> None:
    files = [path for folder in (CONF, CORE) for path in folder.rglob("*.yaml")]
    assert len(files) > 8
    for path in files:
        # Experiments and procedures override keys that are commented where they are defined; their first lines say what they are.
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        if path.parent.name in ("experiment", "procedure"):
            assert lines[1].startswith("#"), path
            continue
        for number, line in enumerate(lines):
            key = line.strip()
            if not key or key.startswith(("#", "-")) or key.endswith(":"):
                continue
            assert lines[number - 1].strip().startswith("#"), f"{path}:{number + 1}: {line}"


def test_the_back_ends_of_vllm_are_a_word_of_the_command(
    composed: Composed, tiny_code_model: ModelSpec, tmp_path: Path
) -> None:
    overrides = ["sampler=vllm", "embedder=vllm", "sampler.engine.tensor_parallel_size=2", "embedder.layers=[-1]"]
    pipeline = command.make_pipeline(
        composed(["experiment=humaneval", f"model.name={tiny_code_model.name}", f"paths.runs={tmp_path}", *overrides])
    )
    assert isinstance(pipeline.sampler, VLLMSampler)
    assert isinstance(pipeline.greedy, VLLMSampler)
    assert pipeline.sampler.engine == pipeline.greedy.engine == EngineSettings(tensor_parallel_size=2)
    assert pipeline.greedy.settings.n == 1
    assert isinstance(pipeline.embedder, VLLMEmbedder)
    assert pipeline.probe_layer == 4


def test_every_baseline_that_can_be_named_has_a_row(composed: Composed, shrunk: Callable[..., list[str]]) -> None:
    # The tiny model solves nothing, so that a reward model finds one class only; shared/tests/test_baselines_trained.py has it.
    names = [name for name in composition.BASELINES.names() if name != "finetune_rm"]
    words = [f"baselines.names=[{','.join(names)}]", "evaluation.curve_shares=[]"]
    pipeline = command.make_pipeline(composed([*shrunk("mbpp"), *words]))
    pipeline.execute(STAGES[:-1])
    assert len(names) == len(pipeline.baselines) >= 3
    for split in pipeline.tests:
        rows = {row.method: row for row in pipeline.results(split).rows}
        for baseline in pipeline.baselines:
            # Where all fail there is nothing to fit: such a row is not run, and test_baselines_fitted.py has the others.
            assert rows[baseline.method].value is not None or isinstance(baseline, Fitted)


def test_a_stage_that_misses_its_inputs_says_which(composed: Composed, shrunk: Callable[..., list[str]]) -> None:
    pipeline = command.make_pipeline(composed(shrunk("demo")))
    with pytest.raises(RuntimeError, match="1 of 1 parts"):
        pipeline.execute(["reward"])


FULL = [name for name in EXPERIMENTS if name.startswith(("table", "fig", "humaneval")) or name == "mbpp"]
FULL.remove("table1_few_shot")  # which needs a finished table1


@pytest.mark.parametrize("name", FULL)
def test_a_full_experiment_says_what_it_needs_and_stops_where_that_is_missing(
    name: str,
    composed: Composed,
    local_data: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*args: Any, **named: Any) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refused)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = [*said(name), *local_data["mbpp"], f"paths.runs={tmp_path}/runs"]
    config = composed([*words, *(["model.name=some/model"] if name in ("humaneval", "mbpp") else [])])
    with pytest.raises((OSError, RuntimeError)) as caught:
        command.run(config)
    said_words = ["OPENAI_API_KEY"] if name.startswith("table4") else [config["model"]["name"], "401 Unauthorized"]
    assert all(word in str(caught.value) for word in said_words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    if config["embedder"]["layers"] == [-1]:
        return  # which layer is the last is not known without the model's configuration, nor what is to be done
    printed = capsys.readouterr().err
    dataset = config["dataset"]
    sizes = {name: 164 if name == "humaneval" else 5 for name in (*dataset["test"], dataset["train"]) if name}
    prompts, tested = sum(sizes.values()), sum(sizes[name] for name in dataset["test"])
    drawn = prompts * config["sampler"]["n"] + tested
    assert f"This run needs: {drawn:,} completions of {prompts:,} prompts to draw" in printed
    assert (name in ON_API) == ("API m: at least" in printed)
    few_shot = f"few-shot (5 successes) ({tested} answers)"
    assert bool(config["baselines"]["names"]) == (few_shot in printed)
