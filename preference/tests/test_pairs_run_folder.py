"""A run folder with rewards gives passed and failed completions of one prompt, under the run's own prompts."""

from pathlib import Path
from typing import Any

import pytest

from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.run import rewarding, stages
from qprobe.run.pools import Pool, Split
from qprobe.run.rewards import RecordedReward
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe_preference.pairs import Found, run_folder
from qprobe_preference.pairs.base import collect

ASK = ({"role": "user", "content": "Add."},)
TEXTS = {"a": ["p0", "f0", "p1", "f1", "p0"], "b": ["p", "q"], "c": ["f", "g"], "d": ["x", "x", "f"], "e": ["p", "f"]}
REWARDS = {"a": [1.0, 0.0, 0.5, 0.4, 1.0], "b": [1.0, 1.0], "c": [0.0, 0.0], "d": [1.0, 0.0, 0.0], "e": [1.0, 0.0]}


@pytest.fixture
def sampler(tiny_model: ModelSpec) -> HFSampler:
    return HFSampler(tiny_model, SamplingSettings(n=1))


@pytest.fixture
def run(sampler: HFSampler, tmp_path: Path) -> Path:
    prompts = [Prompt(key, text=f"def {key}():") for key in "abcd"] + [Prompt("e", messages=ASK, opening="def e")]
    pool = Pool(tmp_path, Split("tasks", prompts, {}, TEXTS), "sample", sampler, 0, batch_rows=6)
    stages.sample(pool, progress=False)
    rewarding.reward(pool, RecordedReward(REWARDS), progress=False)
    return tmp_path


def read(run: Path, sampler: HFSampler, **options: Any) -> list[Found | str]:
    return list(run_folder.pairs(run, "tasks.sample", lambda p: sampler.render(p)[0], **options))


def test_passed_and_failed_completions_of_one_prompt_are_pairs(run: Path, sampler: HFSampler) -> None:
    found = read(run, sampler)
    assert [(f.prompt, f.chosen, f.rejected) for f in found if isinstance(f, Found)] == [
        *[("def a():", good, bad) for good in ("p0", "p1") for bad in ("f0", "f1")],
        (ASK, "p", "f"),
    ]
    # every completion of d that failed passed as well, but one; what passed failed too
    assert [f for f in found if isinstance(f, str)] == ["none_failed", "none_passed", "none_passed"]
    assert found[-1] == Found(ASK, "p", "f", cluster="task e", opening="def e")


def test_the_prompt_of_a_pair_renders_as_it_did_in_the_run(run: Path, sampler: HFSampler) -> None:
    pairs = collect("run", read(run, sampler), {}).pairs
    rendered = [sampler.render(pair.as_prompt("chat")) for pair in pairs]
    was = {
        p.task_id: sampler.render(p) for p in (Prompt("a", text="def a():"), Prompt("e", messages=ASK, opening="def e"))
    }
    assert rendered == [was["a"]] * 4 + [was["e"]]


def test_at_most_so_many_pairs_of_a_prompt_by_lot(run: Path, sampler: HFSampler) -> None:
    drawn = [[f for f in read(run, sampler, per_prompt=1, seed=seed) if isinstance(f, Found)] for seed in range(12)]
    assert all(len(found) == 2 for found in drawn)
    assert len({(found[0].chosen, found[0].rejected) for found in drawn}) > 1
    assert read(run, sampler, per_prompt=1, seed=3) == read(run, sampler, per_prompt=1, seed=3)


def test_what_passes_is_a_setting(run: Path, sampler: HFSampler) -> None:
    strict = {f.chosen for f in read(run, sampler, passed=1.0) if isinstance(f, Found)}
    assert strict == {"p0", "p"}


def test_what_is_not_there_is_a_sentence(run: Path, sampler: HFSampler) -> None:
    render = lambda p: sampler.render(p)[0]  # noqa: E731
    with pytest.raises(ValueError, match=r"tasks\.other"):
        list(run_folder.pairs(run, "tasks.other", render))
    with pytest.raises(ValueError, match=r"has no folder judge: it has imported"):
        list(run_folder.pairs(run, "tasks.sample", render, reward="judge"))
    with pytest.raises(ValueError, match="prompts has no folder other: it has tasks"):
        list(run_folder.pairs(run, "other.sample", render))
    with pytest.raises(ValueError, match="another model's chat template"):
        list(run_folder.pairs(run, "tasks.sample", lambda p: "elsewhere"))
    with pytest.raises(ValueError, match="at least one pair"):
        read(run, sampler, per_prompt=0)
