"""Every shipped experiment composes and runs, shrunk, on a tiny model; bad configurations are sentences before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import qprobe
import qprobe_code_gen.__main__ as command
from qprobe.cli import composition
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineSettings
from qprobe.pipeline.pipeline import STAGES
from qprobe.sampling.vllm import VLLMSampler

CONF, CORE = Path(command.__file__).parent / "conf", Path(qprobe.__file__).parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CORE_GROUPS = {path.parent.name for path in CORE.glob("*/*.yaml")}
# What a procedure puts on top follows from it, and is no choice of its own.
CORE_GROUPS -= {"on_top"}
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


def said(experiment: str) -> list[str]:
    """What an experiment asks its user for; a group chosen otherwise may not know the key."""
    return [f"experiment={experiment}", *(["++sampler.api.model=m"] if experiment in ON_API else [])]


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_module("qprobe_code_gen.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def few_mbpp_problems(folder: Path) -> str:
    """Problems of MBPP's shape, five in each of the splits that the experiments read."""
    rows = [
        {
            "task_id": number,
            "text": f"Write a function to add {number}.",
            "code": f"def add_{number}(x):\r\n  return x + {number}",
            "test_setup_code": "",
            "test_list": [f"assert add_{number}(1) == {number + 1}"],
        }
        for number in (*range(11, 16), *range(601, 606))
    ]
    path = folder / "mbpp.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def few_questions(folder: Path, count: int) -> str:
    """Problems of GSM-8K's shape."""
    path = folder / f"gsm8k-{count}.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}.\n#### {i + 1}"} for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def local_data(experiment: str, folder: Path) -> list[str]:
    """Files for what an experiment reads from the hub."""
    if experiment.startswith("gsm8k"):
        return [f"dataset.train_file={few_questions(folder, 11)}", f"dataset.test_file={few_questions(folder, 3)}"]
    return [f"dataset.mbpp_file={few_mbpp_problems(folder)}"]


def shrunk(model: ModelSpec, folder: Path, experiment: str = "demo") -> list[str]:
    return [
        *local_data(experiment, folder),
        "evaluation.k=2",
        *("model=hub", f"model.name={model.name}", "model.dtype=float32", "model.device=cpu", "limit=2"),
        *("sampler.n=2", "sampler.max_new_tokens=5", "embedder.layers=[2]", f"paths.runs={folder}"),
        # The tiny model has no success.
        *("baselines.few_shot.shots=1", "baselines.few_shot.success=0.0", "baselines.sft.success=0.0"),
        *("baselines.sft.epochs=1", "baselines.finetune_rm.epochs=1", "baselines.prompt_rm.model=null"),
        *("probe.steps=5", "evaluation.seeds=2", "evaluation.folds=2", "evaluation.bootstrap=100"),
    ]


def weighed(name: str) -> Any:
    """Variants of another experiment, and those that fine-tune, are for CI."""
    heavy = name == "table1" or name.endswith(("_ours", "_mlp", "_few_shot", "_baselines"))
    return pytest.param(name, marks=pytest.mark.slow) if heavy else name


@pytest.mark.parametrize("name", [weighed(name) for name in EXPERIMENTS])
def test_every_experiment_runs_shrunk(
    name: str,
    make_server: Callable[[ModelSpec], Any],
    tiny_code_model: ModelSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"experiment={name}", *shrunk(tiny_code_model, tmp_path, name), "model.device_map=null"]
    if name.startswith("recorded"):  # model and problems are those of the recording
        words = [word for word in words if not word.startswith(("model", "embedder", "sampler.max", "dataset"))]
    words += ["embedder.layers=[1,2]"] if name.endswith("_ours") else []
    words += ["authors.layer=1"] if name in ("table1_ours", "table2_ours") else []
    if name in ON_API:
        server = make_server(tiny_code_model)
        words += ["sampler.api.model=tiny", f"sampler.api.base_url={server.url}"]
        embedding = [f"embedder.api.base_url={server.url}", "embedder.api.model=tiny"]
        words += embedding if name.startswith("table4") else []
    if name == "table1_few_shot":
        command.run(composed([*words, "experiment=table1", "stages=[sample,reward]"][1:]))
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
    # All is there: the same words draw and read nothing, so that nothing needs to be said.
    command.run(config)
    assert "needs" not in capsys.readouterr().err


@pytest.mark.parametrize("embedder", ["hf", "openai"])
def test_completions_from_an_api_with_local_or_remote_embeddings_are_a_choice_of_words(
    make_server: Callable[[ModelSpec], Any], tiny_code_model: ModelSpec, tmp_path: Path, embedder: str, key: str
) -> None:
    server = make_server(tiny_code_model)
    api = [f"sampler.api.base_url={server.url}", "sampler.api.model=tiny"]
    if embedder == "openai":
        api += [f"embedder.api.base_url={server.url}", "embedder.api.model=tiny"]
    words = ["experiment=demo", "sampler=openai", f"embedder={embedder}", "dataset.prompt_style=zero_shot"]
    config = composed([*words, *shrunk(tiny_code_model, tmp_path), *api, "stages=[sample,reward,embed,train,evaluate]"])
    command.run(config)
    asked = {path for path, _, _ in server.requests}
    assert asked == {"/v1/completions"} | ({"/v1/embeddings"} if embedder == "openai" else set())
    run = tmp_path / "demo-limit2"
    assert list((run / "probes").rglob("*.safetensors"))
    calls = [json.loads(line)["calls"] for path in run.rglob("usage.jsonl") for line in path.read_text().splitlines()]
    assert sum(calls) == len(server.requests)
    assert not [path for path in run.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    group, _, name = choice.partition("=")
    words = [choice, *MUST_BE_SAID.get(choice, [])]
    for experiment in [name] if group == "experiment" else EXPERIMENTS:
        config = composed([*(words if group != "experiment" else []), *said(experiment)])
        assert set(config) == command.KEYS
    if (CORE / group / f"{name}.yaml").exists():
        assert set(composition.composed("run", words)) >= composition.KEYS


def test_an_unknown_or_missing_key_of_the_api_is_a_sentence(tmp_path: Path) -> None:
    words = ["experiment=demo", "sampler=openai", "dataset.prompt_style=zero_shot", f"paths.runs={tmp_path}"]
    with pytest.raises(MissingMandatoryValue, match=r"sampler\.api\.model"):
        composed(words)
    config = composed([*words, "sampler.api.model=m", "+sampler.api.api_key=secret"])
    with pytest.raises(ValueError, match=r"sampler\.api has no key api_key") as caught:
        command.make_pipeline(config)
    assert "secret" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("evaluation.losses=[policy_gradiant]", "no loss named 'policy_gradiant': choose one of"),
        ("evaluation.k=9", "k is 9, but only n=8 completions"),
        ("+dataset.limits.mbpp-test=3", "dataset.limits has no key mbpp-test: it knows humaneval"),
        ("+dataset.limits.humaneval=0", "dataset.limits.humaneval is 0: a number of problems, at least 1"),
        ("+sampler.temprature=1", "sampler has no key temprature"),
        ("+probe.width=1", "probe has no key width"),
        ("+extra=1", "the configuration has no key extra"),
        ("dataset.test=[mbqp]", "no problem set 'mbqp': choose from"),
        ("dataset.prompt_style=socratic", "Prompt style 'socratic' is unknown"),
        ("sampler.backend=vlm", "sampler.backend is 'vlm'"),
        ("limit=0", "limit is 0"),
        ("shard=3", "shard is 3: say 3/16 for the third of sixteen"),
        ("shard=5/4", "shard is 5/4: say 1/4 to 4/4"),
        ("limit=3", "3 prompts cannot make 5 folds"),
        ("layer=7", "read layer 7, but the embedder makes"),
        ("sandbox.memory_mib=1", "memory_mib is 1"),
        ("model.dtype=int4", "dtype is 'int4'"),
    ],
)
def test_a_bad_value_is_a_sentence_before_any_work(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        command.make_pipeline(composed(["experiment=demo", f"paths.runs={tmp_path}", override]))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_stage_is_a_sentence_before_any_work(tmp_path: Path) -> None:
    pipeline = command.make_pipeline(composed(["experiment=demo", f"paths.runs={tmp_path}"]))
    with pytest.raises(ValueError, match="no stage polish: choose from sample"):
        pipeline.execute(["polish", "sample"])
    assert list(tmp_path.iterdir()) == []


def test_the_back_ends_of_vllm_are_a_word_of_the_command(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
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


def test_problems_that_share_a_name_with_a_training_one_are_reported_apart_and_folded_together(tmp_path: Path) -> None:
    path = Path(few_mbpp_problems(tmp_path))
    path.write_text(path.read_text().replace("add_601(", "add_11(").replace("add_602(", "add_603("))
    words = ["experiment=mbpp", f"dataset.mbpp_file={path}", f"paths.runs={tmp_path}", "dataset.test=[mbpp-test]"]
    (why, ids), *_ = command.make_pipeline(composed(words)).apart["mbpp-test"].items()
    assert why.startswith("share an entry point (1) or their text (0) with a problem of mbpp-train")
    assert ids == {"MBPP/011"}
    folded = command.make_pipeline(
        composed([*words, "dataset.test=[mbpp-train]", "dataset.train=null", "evaluation.folds=2"])
    )
    assert folded.apart == {}
    assert folded.test_pools[0].clusters is not None
    assert folded.test_pools[0].clusters.tolist() == [0, 1, 1, 2, 3]


def test_few_shot_examples_are_left_out_of_the_evaluation(tmp_path: Path) -> None:
    overrides = [
        "dataset.prompt_style=few_shot",
        "dataset.examples=[HumanEval/0,HumanEval/5]",
        f"paths.runs={tmp_path}",
    ]
    pipeline = command.make_pipeline(composed(["experiment=humaneval", "model.name=embedded", *overrides]))
    ids = [prompt.task_id for prompt in pipeline.tests[0].prompts]
    assert len(ids) == 162
    assert not {"HumanEval/0", "HumanEval/5"} & set(ids)


def test_worked_questions_are_the_first_and_left_out(tmp_path: Path) -> None:
    words = ["experiment=gsm8k", f"paths.runs={tmp_path}", *local_data("gsm8k", tmp_path)]
    pipeline = command.make_pipeline(composed(words))
    assert pipeline.training_split is not None
    assert [p.task_id for p in pipeline.training_split.prompts] == [f"gsm8k-train/{i}" for i in (8, 9, 10)]
    [prompt, *others] = pipeline.tests[0].prompts
    assert str(prompt.text).count("Question:") == 9
    assert str(prompt.text).endswith("#### 8\n\nQuestion: What is 0 + 1?\nAnswer:")
    assert len(others) == 2
    assert pipeline.sampler.settings.stop == ("\nQuestion:",)
    chat = [*words, "dataset.prompt_style=chat", "dataset.examples=[gsm8k-train/3]"]
    prompt = command.make_pipeline(composed(chat)).tests[0].prompts[0]
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dataset.examples=12", "dataset.examples is 12: gsm8k-train has 1 to 11 to show"),
        ("dataset.examples=-1", "dataset.examples is -1"),
        ("dataset.examples=[gsm8k-train/99]", "gsm8k-train has no problem gsm8k-train/99"),
        ("dataset.examples=[]", "few_shot was given no examples"),
        ("dataset.prompt_style=zero_shot", "'zero_shot' does not suit questions"),
        ("+dataset.mbpp_file=x", "dataset has no key mbpp_file"),
        ("dataset.test=[gsm8k-test,humaneval]", "are not all rewarded in the same way: run them apart"),
        ("dataset.examples_from=mbpp-fewshot", "dataset.examples_from is 'mbpp-fewshot': choose from gsm8k-train"),
    ],
)
def test_a_bad_value_for_questions_is_a_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    words = ["experiment=gsm8k", f"paths.runs={tmp_path / 'runs'}", *local_data("gsm8k", tmp_path), override]
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        command.make_pipeline(composed(words))


def test_data_that_cannot_be_had_is_a_sentence_with_what_the_run_would_need(tmp_path: Path) -> None:
    words = ["experiment=gsm8k", f"paths.runs={tmp_path}", "dataset.train_file=none.jsonl"]
    with pytest.raises(OSError, match=r"no file none.jsonl.*draws 112,631 completions of 2,319 prompts"):
        command.make_pipeline(composed(words))


def test_every_baseline_that_can_be_named_has_a_row(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    # The tiny model solves nothing, so that a reward model finds one class only; shared/tests/test_baselines_trained.py has it.
    names = [name for name in composition.BASELINES if name != "finetune_rm"]
    words = ["experiment=mbpp", f"baselines.names=[{','.join(names)}]", "baselines.few_shot.success=0"]
    quick = ["evaluation.curve_shares=[]", "stages=[sample,reward,embed,baselines,train,evaluate]"]
    pipeline = command.make_pipeline(composed([*words, *shrunk(tiny_code_model, tmp_path), *quick]))
    pipeline.execute(STAGES[:-1])
    assert len(names) == len(pipeline.baselines) >= 3
    for split in pipeline.tests:
        rows = {row.method: row for row in pipeline.results(split).rows}
        assert all(rows[baseline.method].value is not None for baseline in pipeline.baselines)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["baselines.names=[few_shots]"], r"baselines.names has few_shots: choose from few_shot, sft"),
        (["baselines.names=[few_shot]"], "The baselines few_shot learn from a training split and there is none"),
        (["baselines.names=[few_shot]", "dataset.train=mbpp-train", "baselines.few_shot.shots=0"], "shots is 0"),
        (["+baselines.sft2.rank=8"], "baselines has no key sft2"),
        (["+baselines.prompt_rm.words=1", "baselines.names=[prompt_rm]"], "baselines.prompt_rm has no key words"),
        (["dataset.shots=runs/none"], "dataset.train names none"),
        (["dataset.shots=runs/none", "dataset.train=mbpp-train"], "holds no rewards of mbpp-train.sample"),
    ],
)
def test_a_baseline_that_cannot_be_is_a_sentence(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    words = ["experiment=demo", f"dataset.mbpp_file={few_mbpp_problems(tmp_path)}", f"paths.runs={tmp_path}/runs"]
    with pytest.raises(ValueError, match=sentence):
        command.make_pipeline(composed([*words, *overrides]))
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_misses_its_inputs_says_which(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    pipeline = command.make_pipeline(composed(["experiment=demo", *shrunk(tiny_code_model, tmp_path)]))
    with pytest.raises(RuntimeError, match=r"completions/humaneval.sample is missing 1 of 1 parts"):
        pipeline.execute(["reward"])


FULL = [name for name in EXPERIMENTS if name.startswith(("table", "fig", "humaneval")) or name == "mbpp"]


@pytest.mark.parametrize(
    "name", [name for name in FULL if name != "table1_few_shot"]
)  # that one needs a finished table1
def test_a_full_experiment_says_what_it_needs_and_stops_where_that_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: Any, **named: Any) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refused)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = [*said(name), f"dataset.mbpp_file={few_mbpp_problems(tmp_path)}", f"paths.runs={tmp_path}/runs"]
    config = composed([*words, *(["model.name=some/model"] if name in ("humaneval", "mbpp") else [])])
    with pytest.raises((OSError, RuntimeError)) as caught:
        command.run(config)
    local = not name.startswith("table4")
    missing = f"Model '{config['model']['name']}' could not be had (401 Unauthorized)" if local else "OPENAI_API_KEY"
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    if config["embedder"]["layers"] == [-1]:
        return  # which layer is the last is not known without the model's configuration, nor what is to be done
    printed = capsys.readouterr().err
    prompts = sum(
        164 if test == "humaneval" else 5 for test in {*config["dataset"]["test"], config["dataset"]["train"]} - {None}
    )
    drawn = prompts * config["sampler"]["n"] + sum(
        164 if test == "humaneval" else 5 for test in config["dataset"]["test"]
    )
    assert f"This run needs: {drawn:,} completions of {prompts:,} prompts to draw" in printed
    assert (name in ON_API) == ("API m: at least" in printed)
    answers = sum(164 if test == "humaneval" else 5 for test in config["dataset"]["test"])
    beside = f"Baselines, beside these hours: few-shot (5 successes) ({answers} answers)"
    assert bool(config["baselines"]["names"]) == (beside in printed)


def test_a_data_set_that_cannot_be_had_is_a_sentence_with_what_it_is_for(tmp_path: Path) -> None:
    config = composed(["experiment=table1", f"paths.runs={tmp_path}/runs", f"dataset.mbpp_file={tmp_path}/none.jsonl"])
    # 464 + 500 + 164 problems of 200 samples, and 664 greedy ones.
    with pytest.raises(
        OSError, match=r"no file .*none\.jsonl; .* draws 226,264 completions of 1,128 prompts, at most 67,879,200"
    ):
        command.make_pipeline(config)
    assert not (tmp_path / "runs").exists()


def test_the_papers_values_stand_beside_the_papers_set_up_alone() -> None:
    def values(*words: str) -> dict[str, Any]:
        return composition.published(composed(list(words)))

    assert values("experiment=table1")["mbpp-test"]["Q-probe L_PG"] == 0.4573
    for name in ("table1_ours", "fig2", "fig3", "fig4"):
        assert values(f"experiment={name}"), name
    for name in ("fig2_ours", "fig3_ours", "fig4_ours"):
        assert values(f"experiment={name}") == {}, name
    for word in (
        *("model.name=other/model", "limit=8", "sampler.temperature=1.0", "evaluation.k=8", "sampler.top_p=1.0"),
        *("probe=mlp", "embedder.layers=[5]", "dataset.prompt_style=chat", "sampler.n=48", "procedure=ours"),
        *("sampler.max_new_tokens=100", "evaluation.seeds=1", "probe.learning_rate=0.01", "evaluation.beta=0"),
        *("probe.hidden=[256]", "dataset.train=null", "sampler.top_k=40", "evaluation.partition=false"),
        *("probe.epochs=10", "+dataset.limits.mbpp-train=9", "model.adapter=a", "dataset.shots=a"),
        "baselines.prompt_rm.model=null",
    ):
        assert values("experiment=table1", word) == {}, word
    # Beside ours it is their probes that have to be the paper's.
    for word in (
        "authors.layer=20",
        "authors.probe.learning_rate=0.1",
        "authors.evaluation.beta=0",
        "probe.hidden=[9]",
    ):
        assert values("experiment=table1_ours", word) == {}, word
    assert values("experiment=table1_ours", "probe.learning_rate=0.1", "embedder.layers=[20,26]")
    theirs = "sampler.api.model=gpt-3.5-turbo-1106"
    assert values("experiment=table2", theirs)["humaneval"]["Q-probe L_CE"] == 0.64
    assert values("experiment=table2", theirs, "model.name=other/model") == {}
    assert values("experiment=table2", "sampler.api.model=another") == {}
    assert values("experiment=table4", theirs)["mbpp-test"]["Q-probe L_PG"] == 0.66
    assert values("experiment=table4_mlp", theirs)["mbpp-test"]["Q-probe L_PG"] == 0.68
    assert values("experiment=table4", theirs, "probe.hidden=[256]") == {}
    assert values("experiment=table4_mlp", theirs, "probe=linear") == {}
    assert values("experiment=table2_ours", theirs)["humaneval"]["Q-probe L_CE"] == 0.64
    assert values("experiment=table4_ours", theirs)["humaneval"]["Q-probe L_CE"] == 0.54
    for word in (
        "sampler.n=48",
        "procedure=ours",
        "probe=mlp",
        "dataset.prompt_style=zero_shot",
        "embedder.layers=[80]",
    ):
        assert values("experiment=table2", theirs, word) == {}, word
    assert values("experiment=table4", theirs, "embedder.api.model=another") == {}
    assert values("experiment=demo") == {}
    with pytest.raises(ValueError, match="paper_when does not say of which set-up"):
        composition.published({"paper": {"a": {"pass@1": 0.5}}, "paper_when": {}})


def test_all_of_table_1_and_its_figures_read_one_run() -> None:
    runs = {
        name: composed([f"experiment={name}"])["paths"] for name in EXPERIMENTS if name[:4] in ("fig2", "fig3", "fig4")
    }
    assert len(runs) == 6
    assert {paths["run"] for paths in runs.values()} == {composed(["experiment=table1"])["paths"]["run"]}
    assert len({paths["outputs"] for paths in runs.values()}) == 6


def test_papers_settings_are_the_papers_and_ours_are_the_defaults() -> None:
    defaults = composed(["experiment=mbpp", "model.name=m"])
    for name in (name for name in EXPERIMENTS if name.startswith(("table", "fig"))):
        config = composed(said(name))
        law = [config["sampler"][key] for key in ("temperature", "top_p", "max_new_tokens")]
        assert law == [0.8, 0.95, 300], name
        first, beside = composition.procedures(config)
        assert (first.settings.k, first.settings.seeds, len(first.settings.losses)) == (48, 10, 3), name
        if name.endswith("_ours"):
            assert (config["probe"], first.settings.beta) == (defaults["probe"], None), name
        # A table has both, so that the difference has a sentence; a figure has one.
        assert (beside is not None) == (name.startswith("table") and name.endswith("_ours")), name
        if name.startswith("fig") and name.endswith("_ours"):
            continue
        papers = beside or first
        assert papers.layer in (None, *config["embedder"]["layers"]), name
        training, beta = papers.training, papers.settings.beta
        assert (training.learning_rate, training.steps, training.epochs) == (5e-5, None, 150), name
        assert (training.chunks_per_batch, training.chunk, training.training_beta) == (100, 10, 1.0), name
        assert (training.standardize, training.held_out, beta) == (False, 0.0, 0.1), name
    assert composed(["experiment=table1"])["embedder"]["layers"] == [26]
    assert composed(["experiment=table1"])["sampler"]["n"] == 200
    assert composed(["experiment=fig2"])["evaluation"]["curve_prompts"] == [5, 10, 20, 50, 100, 200]
