"""From configurations to back ends and policies: every key has its place, and what cannot be is an error with its name."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qprobe
from qprobe.baselines.consistency import Remembered
from qprobe.baselines.few_shot import FewShot
from qprobe.baselines.prompt_rm import PromptRM
from qprobe.cli import composition, uses
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.probe.estimator import QProbe
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler

USE: dict[str, Any] = {
    "prompts": "chat",
    "model": {"name": "embedded", "revision": None, "dtype": "float32", "device": "cpu", "device_map": None},
    "sampler": {"backend": "hf", "greedy": True, "batch_rows": 6, "n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    | {"max_new_tokens": 9, "stop": ["\n"]},
    "embedder": {"backend": "hf", "layers": [2]},
}


def test_a_configuration_becomes_back_ends() -> None:
    overrides = ["model.dtype=float32", "sampler.n=3", "sampler.stop=[a,b]", "embedder.layers=[2,4]", "sampler.top_k=9"]
    ends = composition.back_ends(composition.composed("run", overrides))
    assert isinstance(ends.sampler, HFSampler)
    assert isinstance(ends.greedy, HFSampler)
    assert isinstance(ends.embedder, HFEmbedder)
    assert ends.sampler.model == ends.greedy.model == ends.embedder.model
    assert ends.sampler.model.dtype == "float32"
    assert ends.sampler.settings == SamplingSettings(3, 1.0, 0.95, 9, 128, ("a", "b"))
    assert ends.greedy.settings == SamplingSettings(1, 0.0, 1.0, 0, 128, ("a", "b"))
    assert ends.embedder.layers == (2, 4)
    without = composition.back_ends(composition.composed("run", ["sampler.greedy=false"]))
    assert without.greedy is None


def test_stop_texts_of_the_caller_replace_the_key() -> None:
    config = composition.composed("run", [])
    del config["sampler"]["stop"]  # as in the code half, whose prompt styles bring their own
    assert composition.back_ends(config, ("x",)).sampler.settings.stop == ("x",)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["samplr.n=3", "seed=1"], "did you mean sampler.n"),
        (["n=3"], "did you mean sampler.n"),
        (["sampler.n=1,2"], "several values"),
        (["model=nope"], "choose from embedded, hub"),
        (["model=hub"], "model.name=VALUE"),
        (["sampler.n="], "sampler.n is"),
        (["=3"], "=3"),
        (["sampler.n = 3"], "sampler.n"),
        (["sampler.backend=vlm"], "sampler.backend is 'vlm'"),
        (["embedder.backend=none"], "embedder.backend is 'none'"),
        (["sampler.greedy=often"], "sampler.greedy is 'often'"),
        (["sampler.batch_rows=many"], "sampler.batch_rows is 'many'"),
        (["+sampler.speed=3"], "speed"),
        (["+sampler.api.model=x"], "sampler has no key api"),
        (["embedder.layers=[one]"], "embedder.layers"),
    ],
)
def test_what_cannot_be_composed_names_its_key(overrides: list[str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        composition.back_ends(composition.composed("run", overrides))


def test_every_group_of_the_core_composes() -> None:
    folder = Path(qprobe.__file__).parent / "conf"
    for path in folder.glob("*/*.yaml"):
        overrides = [f"{path.parent.name}={path.stem}", "model.name=x"]
        needed = {"openai": "api.model=y", "recorded": "recording=y"}
        if path.stem in needed:
            overrides.append(f"{path.parent.name}.{needed[path.stem]}")
        assert composition.composed("run", overrides)["model"]["name"] == "x"


def test_another_judge_has_not_the_models_adapter() -> None:
    words = ["model.name=x", "model.adapter=a", "model.dtype=bfloat16", "baselines.names=[prompt_rm]"]
    for name, adapter in (("y", None), ("null", "a")):
        config = composition.composed("run", [*words, f"baselines.prompt_rm.model={name}"])
        (judge,) = composition._baselines(config, composition.back_ends(config), None)
        assert isinstance(judge, PromptRM)
        assert judge.model == ModelSpec("x" if adapter else "y", dtype="bfloat16", adapter=adapter)


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [([], 192 - 10), (["sampler=vllm"], 192 - 10), (["sampler=vllm", "sampler.engine.max_model_len=100"], 100 - 10)],
)
def test_shots_may_fill_what_the_engine_reads(tiny_model: ModelSpec, overrides: list[str], longest: int) -> None:
    words = [f"model.name={tiny_model.name}", "sampler.max_new_tokens=10", "baselines.names=[few_shot]", *overrides]
    config = composition.composed("run", words)
    (few_shot,) = composition._baselines(config, composition.back_ends(config), None)
    assert isinstance(few_shot, FewShot)
    assert few_shot.longest() == longest


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["baselines.names=[few]"], "baselines.names"),
        (["baselines.names=[self_consistency]"], "self_consistency"),
        (["baselines.names=[self_certainty_borda]"], "self_certainty_borda.*agree"),
        (["baselines.clue.success=high", "baselines.names=[clue]"], "baselines.clue.success"),
        (["+baselines.self_consistency.votes=3", "baselines.names=[self_consistency]"], "votes"),
        (["baselines.few_shot.shots=none", "baselines.names=[few_shot]"], "baselines.few_shot.shots"),
        (["baselines.sft.success=high", "baselines.names=[sft]"], "baselines.sft.success"),
    ],
)
def test_baselines_that_cannot_be_name_their_key(words: list[str], word: str) -> None:
    config = composition.composed("run", words)
    with pytest.raises(ValueError, match=word):
        composition._baselines(config, composition.back_ends(config), None)


def test_baselines_of_one_run_share_their_agreement_and_the_columns_that_they_read(
    tmp_path: Path, fakes: ModuleType
) -> None:
    names = "baselines.names=[self_consistency,self_certainty_borda]"
    words = ["evaluation.losses=[reward_mse]", "evaluation.controls=[]", "sampler.greedy=false"]
    more: dict[str, Any] = {"run": tmp_path, "title": "", "tests": [fakes.split()], "reward": fakes.Reward()}

    def make(*overrides: str) -> Any:
        config = composition.composed("run", [*words, *overrides])
        return composition.pipeline(config, **more, agreement=SameText())

    assert not make().embedder.likelihood  # nobody reads them
    pipeline = make(names)
    assert pipeline.embedder.likelihood
    consistency, borda = pipeline.baselines
    assert isinstance(consistency.agreement, Remembered)  # executed once
    assert consistency.agreement is borda.agreement
    assert borda.embedder is pipeline.embedder
    with pytest.raises(ValueError, match=r"self_certainty_borda.*embedder\.likelihood"):
        make(names, "embedder.likelihood=false")


class SameText:
    def identity(self) -> dict[str, Any]:
        return {"agreement": "text"}

    def check(self) -> None:
        pass

    def keys(self, batches: Any) -> Any:
        for batch in batches:
            yield [text for _, text in batch]


@pytest.mark.parametrize("word", ["seed=first", "layer=1.5", "stages=sample", "shard=3", "shard=3-16"])
def test_what_belongs_to_no_part_is_checked_too(word: str, tmp_path: Path, fakes: ModuleType) -> None:
    config = composition.composed("run", [word])
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        composition.pipeline(config, run=tmp_path, title="", tests=[fakes.split()], reward=fakes.Reward())


def test_a_card_without_a_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="embedder, model, prompts, sampler"):
        composition.policy(QProbe())


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("sampler.speed=1", "sampler.speed.*sampler.n,"),
        ("sampler=hf", "no setting sampler"),
        ("n=3", "did you mean sampler.n"),
        ("sampler.n.more=3", "sampler.n.more"),
        ("sampler.n=many", "sampler.n is 'many'"),
        ("sampler.stop=[", "cannot be read"),
        ("prompts=socratic", "socratic"),
        ("sampler.n=0", "n=0"),
    ],
)
def test_an_override_of_a_card_that_cannot_be_names_its_key(override: str, word: str) -> None:
    probe = QProbe()
    probe.use, probe.beta_ = USE, 0.1
    with pytest.raises(ValueError, match=word):
        composition.policy(probe, [override]).choose("x")


def test_a_card_is_not_changed_by_overrides() -> None:
    changed = uses._overridden(USE, ["sampler.n=5", "sampler.stop=[x]", "prompts=text", "model.device=null"])
    assert (changed["sampler"]["n"], changed["sampler"]["stop"], changed["prompts"]) == (5, ["x"], "text")
    assert changed["model"]["device"] is None
    assert USE["sampler"]["n"] == 3


def test_import_qprobe_costs_torch_and_nothing_more() -> None:
    """Neither a back end nor what run folders and reports are made of."""
    heavy = ("pyarrow", "transformers", "matplotlib", "openai", "hydra", "datasets", "ray", "scipy", "pandas")
    code = f"import sys, qprobe; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
