"""Policy experiments end to end on a tiny model: every shipped one, shrunk; killed in each stage; bad settings refused."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qprobe_preference.__main__ as command
from qprobe.models.openai_client import ApiError
from qprobe.pipeline import evaluated
from qprobe.pipeline.probes import Probes
from qprobe.run import stages
from qprobe.sampling.hf import HFSampler
from qprobe.settings import build
from qprobe_preference import policy
from qprobe_preference.judges import implicit
from qprobe_preference.pairs.base import Found, collect
from qprobe_preference.policy import PolicySettings, drawn_prompts

pytestmark = pytest.mark.usefixtures("plain_figures")

CONF = Path(command.__file__).parent / "conf"
POLICIES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if "policy" in path.read_text())
JUDGE = "judge.api.model=gpt-4-0613"  # the paper's

Composed = Callable[..., dict[str, Any]]
Configured = Callable[..., dict[str, Any]]


@pytest.fixture
def configured(composed: Composed, policy_words: list[str]) -> Configured:
    """The configuration of a policy experiment, shrunk; a local set stands in for those of the hub."""
    words = dict(word.split("=", 1) for word in policy_words)
    model, path = words["model.name"], words.pop("dataset.path")
    tiny = {"name": model, "dtype": "float32", "device": "cpu"}
    local = {"format": "hh", "name": "a", "path": path, "test_share": 0.5, "max_tokens": 200}

    def make(name: str, *more: str) -> dict[str, Any]:
        judge = ["judge=implicit", *(f"judge.a.model.{key}={value}" for key, value in tiny.items())]
        own = [f"dataset.path={path}", "dataset.test_share=0.5", "dataset.max_tokens=200"] if name[:3] == "hh_" else []
        config = composed(
            f"experiment={name}", *(f"{key}={value}" for key, value in words.items()), *judge, *own, *more
        )
        if "sets" in config["dataset"]:
            config["dataset"] |= {"sets": {"a": local}, "train_share": 1.0}
        for entry in (entry for entry in config["policy"]["policies"] if "model" in entry):
            entry["model"] = tiny
        return config

    return make


def rows_of(run: Path, name: str = "win_rates") -> list[dict[str, str]]:
    return list(csv.DictReader((run / "tables" / f"{name}.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "preference_demo"])
def test_every_policy_experiment_runs_shrunk(
    name: str, configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(name)
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
        assert sum(float(row[key]) for key in ("wins", "ties", "losses", "undecided")) == pytest.approx(4)
    rate = {row["method"]: float(row["rate"]) for row in rows}
    assert rate["skyline"] >= max(rate[m] for m in methods if m.startswith("Q-probe")) - 1e-12
    figures = {path.name for path in (run / "figures").glob("*.png")}
    expected = {"win_rate_against_k.png"}
    assert figures == expected | ({"win_rate_against_share.png"} if config["evaluation"]["curve_shares"] else set())


def test_the_papers_settings_are_those_of_its_experiments(composed: Composed) -> None:
    # What a shrunk run overrides is looked at here.
    config = composed("experiment=table3", JUDGE)
    assert config["model"]["name"] == config["policy"]["paper_when"]["model.name"]
    assert (config["sampler"]["n"], config["evaluation"]["k"], config["policy"]["prompts"]) == (48, 48, 512)
    assert (config["sampler"]["temperature"], config["sampler"]["top_p"]) == (1.0, 0.95)
    assert (config["probe"]["learning_rate"], config["probe"]["epochs"]) == (5e-5, 150)
    assert list(config["dataset"]["sets"]) == ["hh", "shp", "oasst"]
    assert config["dataset"]["train_share"] == 0.2
    assert composed("experiment=fig6", "judge.api.model=m")["compare"]["hidden"] == [[], [1024], [1024, 1024]]


def test_killed_in_each_stage_and_continued_it_gives_the_same_tables(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.cache
    def made(folder: str) -> dict[str, Any]:
        config = configured("hh_demo", "sampler.batch_rows=3", f"paths.runs={tmp_path}/{folder}")
        config["policy"]["policies"] = [{"name": "other", "model": config["model"]["name"]}]
        return config

    def config(folder: str) -> dict[str, Any]:
        return copy.deepcopy(made(folder))

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
        (HFSampler, "finished", 2),
        (implicit.ImplicitJudge, "compare", 2),
        (stages, "_embed_once", 3),
        (stages, "sample", 3),  # of the other policy
        (Probes, "_save_final", 2),
        (evaluated, "make", 1),
        (command.outcome, "write", 1),
    ):
        killed_at(owner, name, call)
    command.run(config("killed"))
    for file in ("win_rates.csv", "win_rates.md"):
        whole, killed = (next((tmp_path / folder).rglob(f"tables/{file}")) for folder in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()


def test_recorded_candidates_are_judged_and_keep_their_true_rewards(
    composed: Composed,
    policy_words: list[str],
    configured: Configured,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run of pairs is a run with rewards: its candidates come back, in their order, with what they earned."""
    words = [word for word in policy_words if not word.startswith(("policy", "evaluation.k"))]
    alone = ["compare.hidden=[]", "compare.layers=[]", "dataset.limit=10", "name=first", "stages=[sample,reward]"]
    command.run(composed("experiment=hh_local", *words, *alone))
    pool = [f"dataset.path={tmp_path}/first-limit10", "dataset.options.pool=hh.sample"]
    config = configured("preference_demo", *pool, "evaluation.k=2", "policy.prompts=null")
    command.run(config)
    printed = capsys.readouterr()
    assert "to draw" not in printed.err
    assert "and the true verdicts agree on" in printed.out
    truth, rows = rows_of(tmp_path / "preference_demo", "truth"), rows_of(tmp_path / "preference_demo")
    # One chosen (1) and one rejected (0) answer of each prompt, against the first, which is chosen: a tie and a loss.
    assert float(truth[0]["rate"]) == pytest.approx(0.25)
    assert float(truth[-1]["rate"]) == pytest.approx(0.5)
    # A candidate that is the reference itself is a tie for the judge as well.
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
    ("change", "key"),
    [
        ("policy.prompts=0", r"policy\.prompts"),
        ("policy.label_pairs=-1", r"policy\.label_pairs"),
        ("policy.policies=[{name: KTO}]", r"policy\.policies"),
        ("policy.policies=[{name: a, model: b}, {name: a, model: c}]", r"policy\.policies .* twice"),
        ("dataset.test_share=null", r"dataset\.test_share"),
        ("+policy.judge=x", "policy has no key judge"),
        ("evaluation.k=9", "n=3"),
        ("judge=null", "judge=implicit"),
    ],
)
def test_a_bad_value_is_refused_before_any_work(change: str, key: str, configured: Configured, tmp_path: Path) -> None:
    config = configured("hh_demo", *([] if change == "judge=null" else [change]))
    if change == "judge=null":
        config.pop("judge")
    with pytest.raises(ValueError, match=key):
        command.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["hh.jsonl"]


def test_the_papers_values_need_the_papers_judge_and_model(configured: Configured, composed: Composed) -> None:
    experiment = policy.load(configured("hh_demo"))

    def values(name: str, *words: str) -> dict[str, float]:
        config = composed(f"experiment={name}", JUDGE, *words)
        settings = build(PolicySettings, config["policy"], "policy")
        return policy.paper_values(dataclasses.replace(experiment, config=config, settings=settings))

    for name in ("table3", "fig5"):
        assert values(name)["Q-probe"] == 50.10
    assert values("table3_kto")["Q-probe"] == 55.01
    for name in ("table3_ours", "fig6"):
        assert values(name) == {}
    for word in (
        *("++judge.backend=implicit", "judge.api.model=another", "model.name=another", "evaluation.k=24"),
        *("sampler.n=96", "probe.hidden=[1024]", "probe.learning_rate=0.01", "layer=best", "embedder.layers=[20]"),
        *("policy.prompts=9", "compare.hidden=[[],[8]]", "dataset.train_share=1.0", "dataset.limit=100"),
        "evaluation.seeds=5",
    ):
        assert values("table3", word) == {}, word


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith(("table", "fig"))])
def test_a_full_experiment_stops_with_what_it_is_for_where_its_data_or_model_cannot_be_had(
    name: str, composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = composed(f"experiment={name}", "judge.api.model=m", f"paths.runs={tmp_path}/runs")
    with pytest.raises(OSError, match="24,576 completions") as caught:
        command.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_judge_without_a_key_ends_a_run_that_has_said_what_it_needs(
    configured: Configured, composed: Composed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = configured("table3") | {"judge": composed("experiment=table3", "judge.api.model=m")["judge"]}
    with pytest.raises(ApiError, match="OPENAI_API_KEY"):
        command.run(config)
    assert "Judge judge-m: at most 29 comparisons (58 calls" in capsys.readouterr().err
