"""Policy experiments end to end on a tiny model: every shipped one, shrunk; killed in each stage; bad settings as sentences."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import qprobe_preference.__main__ as command
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiError
from qprobe.pipeline.pipeline import Pipeline
from qprobe.run import stages
from qprobe.settings import build
from qprobe_preference import policy
from qprobe_preference.judges import implicit
from qprobe_preference.pairs.base import Found, collect
from qprobe_preference.policy import PolicySettings, drawn_prompts

CONF = Path(command.__file__).parent / "conf"
POLICIES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if "policy" in path.read_text())
FILES = ("win_rates.csv", "win_rates.md")
WORDS = ["red", "blue", "green", "gold", "grey", "pink", "black", "white", "brown", "plum"]


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_module("qprobe_preference.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def hh_file(folder: Path) -> Path:
    """Ten pairs of one turn."""
    start = "\n\nHuman: Is {0} a colour?\n\nAssistant:"
    rows = [{"chosen": f"{start.format(w)} {w}!", "rejected": f"{start.format(w)} no {w}"} for w in WORDS]
    path = folder / "hh.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def shrunk(model: ModelSpec, folder: Path, name: str) -> list[str]:
    tiny = ["dtype=float32", "device=cpu", f"name={model.name}"]
    words = [
        *("model=hub", *(f"model.{word}" for word in tiny), f"paths.runs={folder}", "embedder.layers=[2]"),
        *("sampler.n=3", "sampler.max_new_tokens=4", "probe.steps=5", "probe.chunks_per_batch=4", "evaluation.k=3"),
        *("evaluation.seeds=2", "evaluation.bootstrap=100", "evaluation.draws=10", "policy.prompts=4"),
    ]
    words += ["judge=implicit", *(f"judge.a.model.{word}" for word in tiny)]
    if name.startswith("hh_"):
        return [*words, "dataset.test_share=0.5", "dataset.max_tokens=200", f"dataset.path={hh_file(folder)}"]
    words += ["dataset=hh_local", f"dataset.path={hh_file(folder)}", "+dataset.test_share=0.5"]
    return [word.replace("+dataset", "dataset") for word in words]


def configured(name: str, model: ModelSpec, folder: Path, *more: str) -> dict[str, Any]:
    words = shrunk(model, folder, name)
    if name.startswith(("table", "fig")):
        # The sets of the hub are not there: a local one stands in for each.
        local = {"format": "hh", "name": "a", "path": str(hh_file(folder)), "test_share": 0.5, "split": "test"}
        words = [word for word in words if not word.startswith("dataset")]
        config = composed([f"experiment={name}", *words, *more])
        config["dataset"]["sets"] = {"a": local}
        config["dataset"]["train_share"] = 1.0
    else:
        config = composed([f"experiment={name}", *words, *more])
    for entry in (entry for entry in config["policy"]["policies"] if "model" in entry):
        entry["model"] = {"name": model.name, "dtype": "float32"}
    return config


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "tables" / "win_rates.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "preference_demo"])
def test_every_policy_experiment_runs_shrunk(
    name: str, tiny_code_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(name, tiny_code_model, tmp_path)
    command.run(config)
    printed = capsys.readouterr()
    assert "This run needs: 12 completions of 4 prompts to draw (at most 48 tokens" in printed.err
    labels = min(config["policy"]["label_pairs"], 5)
    comparisons = 12 + 4 * len(config["policy"]["policies"]) + labels
    assert f": at most {comparisons} comparisons" in printed.err
    assert "One example" in printed.out
    limit = config["dataset"]["limit"]
    run = tmp_path / (name if limit is None else f"{name}-limit{limit}")
    rows = rows_of(run)
    methods = [row["method"] for row in rows]
    others = [entry["name"] for entry in config["policy"]["policies"]]
    assert methods[0] == "base"
    assert methods[1 : 1 + len(others)] == others
    assert methods[-1] == "skyline"
    shapes = max(1, len(config["compare"]["hidden"]))
    assert sum(method.startswith("Q-probe L_QP") for method in methods) == shapes
    assert all(row["paper"] == "" for row in rows)  # neither judge nor model is the paper's
    assert {row["prompts"] for row in rows} == {"4"}
    for row in rows:
        assert float(row["wins"]) + float(row["ties"]) + float(row["losses"]) + float(
            row["undecided"]
        ) == pytest.approx(4)
    rate = {row["method"]: float(row["rate"]) for row in rows}
    assert rate["skyline"] >= max(rate[m] for m in methods if m.startswith("Q-probe")) - 1e-12
    figures = {path.name for path in (run / "figures").glob("*.png")}
    expected = {"win_rate_against_k.png"}
    assert figures == expected | ({"win_rate_against_share.png"} if config["evaluation"]["curve_shares"] else set())


def test_the_papers_settings_are_said_where_they_must_be() -> None:
    # What a shrunk run overrides is looked at here.
    config = composed(["experiment=table3", "judge.api.model=gpt-4-0613"])
    assert config["model"]["name"] == config["policy"]["paper_when"]["model.name"]
    assert (config["sampler"]["n"], config["evaluation"]["k"], config["policy"]["prompts"]) == (48, 48, 512)
    assert (config["sampler"]["temperature"], config["sampler"]["top_p"]) == (1.0, 0.95)
    assert (config["probe"]["learning_rate"], config["probe"]["epochs"]) == (5e-5, 150)
    assert list(config["dataset"]["sets"]) == ["hh", "shp", "oasst"]
    assert config["dataset"]["train_share"] == 0.2
    assert composed(["experiment=fig6", "judge.api.model=m"])["compare"]["hidden"] == [[], [1024], [1024, 1024]]


def test_killed_in_each_stage_and_continued_it_gives_the_same_tables(
    tiny_code_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(folder: str) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        made = configured("hh_demo", tiny_code_model, tmp_path / folder, "sampler.batch_rows=3")
        made["policy"]["policies"] = [{"name": "other", "model": {"name": tiny_code_model.name, "dtype": "float32"}}]
        return made

    class Killed(BaseException):
        pass

    command.run(config("whole"))

    def killed_at(owner: Any, name: str, call: int) -> None:
        """Stand in for a kill: nothing of the program's own catches it."""
        work, count = getattr(owner, name), 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            return work(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, wrapped)
            with pytest.raises(Killed):
                command.run(config("killed"))

    for owner, name, call in (
        (stages.Pool, "draw", 7),
        (implicit.ImplicitJudge, "compare", 2),
        (stages, "_embed_once", 3),
        (stages, "sample", 3),  # of the other policy
        (Pipeline, "save_final_probes", 2),
        (Pipeline, "evaluate", 1),
        (command.outcome, "write", 1),
    ):
        killed_at(owner, name, call)
    command.run(config("killed"))
    for file in FILES:
        whole, killed = (next((tmp_path / folder).rglob(f"tables/{file}")) for folder in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


def test_recorded_candidates_are_judged_beside_their_true_rewards(
    tiny_code_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of pairs is a run with rewards: its candidates come back, in their order, with what they earned."""
    first = configured("hh_demo", tiny_code_model, tmp_path, "dataset.limit=10", "name=first")
    for key in ("policy", "judge"):
        first.pop(key)
    first["compare"] = {"layers": [], "hidden": []}
    first["dataset"]["test_share"] = None
    first["evaluation"]["k"] = 2
    first["stages"] = ["sample", "reward"]
    command.run(first)
    words = shrunk(tiny_code_model, tmp_path, "preference_demo")
    words = [word for word in words if not word.startswith("dataset")]
    pool = f"dataset.path={tmp_path}/first-limit10"
    config = composed(["experiment=preference_demo", *words, pool, "dataset.options.pool=hh.sample"])
    config["evaluation"]["k"] = 2
    config["policy"]["prompts"] = None
    command.run(config)
    printed = capsys.readouterr()
    assert "to draw" not in printed.err
    assert "and the true verdicts agree on" in printed.out
    truth = list(csv.DictReader((tmp_path / "preference_demo" / "tables" / "truth.csv").read_text().splitlines()))
    # One chosen (1) and one rejected (0) answer of each prompt, against the first, which is chosen: a tie and a loss.
    assert float(truth[0]["rate"]) == pytest.approx(0.25)
    assert float(truth[-1]["rate"]) == pytest.approx(0.5)
    # A candidate that is the reference itself is a tie for the judge as well.
    rows = rows_of(tmp_path / "preference_demo")
    assert float(rows[0]["ties"]) >= 5


def test_prompts_are_drawn_by_lot_over_all_sets_each_once() -> None:
    found = [Found(f"prompt {number % 20}", f"good {number}", "bad") for number in range(40)]
    pairs = collect("p", found, {})
    drawn = drawn_prompts(pairs, 6, seed=1)
    assert len({pair.prompt for pair in drawn.pairs}) == 6
    assert all(pair.pair_id.endswith(".000") for pair in drawn.pairs)
    assert [p.prompt for p in drawn.pairs] != [p.prompt for p in drawn_prompts(pairs, None, seed=1).pairs][:6]
    assert len(drawn_prompts(pairs, None, seed=1).pairs) == 20
    assert drawn.identity() != drawn_prompts(pairs, 6, seed=2).identity()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("policy.prompts=0", "policy.prompts is 0: at least 1"),
        ("policy.label_pairs=-1", "policy.label_pairs is -1"),
        ("policy.policies=[{name: KTO}]", "needs a name and a model"),
        ("policy.policies=[{name: a, model: b}, {name: a, model: c}]", "has a name twice"),
        ("dataset.test_share=null", "trains on other prompts than it is tested on"),
        ("+policy.judge=x", "policy has no key judge"),
        ("evaluation.k=9", "only n=3 completions"),
    ],
)
def test_a_bad_value_is_a_sentence_before_any_work(
    change: str, sentence: str, tiny_code_model: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        command.run(configured("hh_demo", tiny_code_model, tmp_path, change))
    assert [path.name for path in tmp_path.iterdir()] == ["hh.jsonl"]


def test_an_experiment_without_a_judge_is_a_sentence(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    config = configured("hh_demo", tiny_code_model, tmp_path)
    config.pop("judge")
    with pytest.raises(ValueError, match="needs a judge: say judge=implicit"):
        policy.load(config)


def test_the_papers_values_need_the_papers_judge_and_model(tiny_code_model: ModelSpec, tmp_path: Path) -> None:
    experiment = policy.load(configured("hh_demo", tiny_code_model, tmp_path))

    def values(name: str, *words: str) -> dict[str, float]:
        config = composed([f"experiment={name}", *words])
        settings = build(PolicySettings, config["policy"], "policy")
        return policy.paper_values(dataclasses.replace(experiment, config=config, settings=settings))

    judge = "judge.api.model=gpt-4-0613"
    for name in ("table3", "fig5"):
        assert values(name, judge)["Q-probe"] == 50.10
    assert values("table3_kto", judge)["Q-probe"] == 55.01
    for name in ("table3_ours", "fig6"):
        assert values(name, judge) == {}
    for word in (
        *(
            "++judge.backend=implicit",
            "judge.api.model=another",
            "model.name=another",
            "evaluation.k=24",
            "sampler.n=96",
        ),
        *("probe.hidden=[1024]", "probe.learning_rate=0.01", "layer=best", "embedder.layers=[20]", "policy.prompts=9"),
        *("compare.hidden=[[],[8]]", "dataset.train_share=1.0", "dataset.limit=100", "evaluation.seeds=5"),
    ):
        assert values("table3", judge, word) == {}, word


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith(("table", "fig"))])
def test_a_full_experiment_stops_with_what_it_is_for_where_its_data_or_model_cannot_be_had(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = composed([f"experiment={name}", "judge.api.model=m", f"paths.runs={tmp_path}/runs"])
    with pytest.raises(OSError, match=r"24,576 completions of 512 prompts, at most 12,582,912 tokens") as caught:
        command.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_judge_without_a_key_ends_a_run_that_has_said_what_it_needs(
    tiny_code_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = configured("table3", tiny_code_model, tmp_path)
    config["judge"] = composed(["experiment=table3", "judge.api.model=m"])["judge"]
    with pytest.raises(ApiError, match="needs a key: set the environment variable OPENAI_API_KEY"):
        command.run(config)
    assert "Judge judge-m: at most 29 comparisons (58 calls" in capsys.readouterr().err
