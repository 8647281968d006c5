"""From configurations to back ends and policies: every key has its place, and what cannot be is a sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qprobe
from qprobe.baselines.prompt_rm import PromptRM
from qprobe.cli import composition
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.probe.estimator import QProbe
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler

USE: dict[str, Any] = {
    "prompts": "chat",
    "model": {"name": "embedded", "revision": None, "dtype": "float32", "device": "cpu", "device_map": None},
    "sampler": {
        "backend": "hf",
        "n": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_new_tokens": 9,
        "stop": ["\n"],
    }
    | {"greedy": True, "batch_rows": 6},
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
    ("overrides", "message"),
    [
        (["samplr.n=3", "seed=1"], r"samplr.n=3: there is no setting samplr.n \(did you mean sampler.n\?\)"),
        (["n=3"], r"there is no setting n \(did you mean sampler.n\?\)"),
        (["sampler.n=1,2"], "sampler.n=1,2 says several values: for a list write brackets"),
        (["model=nope"], "There is no model nope: choose from embedded, hub"),
        (["model=hub"], "The setting model.name is missing: say model.name=VALUE"),
        (["sampler.n="], "sampler.n is ''|sampler.n is None"),
        (["=3"], "=3 names no setting"),
        (["sampler.n = 3"], "sampler.n = 3 cannot be read|'sampler.n'"),
        (["sampler.backend=vlm"], "sampler.backend is 'vlm': choose from hf"),
        (["embedder.backend=none"], "embedder.backend is 'none': choose from hf"),
        (["+sampler.speed=3"], "sampler has no key speed"),
    ],
)
def test_what_cannot_be_composed_is_a_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
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
    ("overrides", "room"),
    [([], 192 - 10), (["sampler=vllm"], 192 - 10), (["sampler=vllm", "sampler.engine.max_model_len=100"], 100 - 10)],
)
def test_shots_have_the_room_that_the_engine_reads(tiny_model: ModelSpec, overrides: list[str], room: int) -> None:
    words = [f"model.name={tiny_model.name}", "sampler.max_new_tokens=10", *overrides]
    config = composition.composed("run", words)
    assert composition._room(config, composition.back_ends(config)) == room


def test_a_card_without_a_sampler_is_a_sentence() -> None:
    with pytest.raises(
        ValueError, match="The probe's card does not say embedder, model, prompts, sampler: it was not made by"
    ):
        composition.policy(QProbe())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.speed=1", "sampler.speed is nothing that an answer is made with.*: choose from .*sampler.n,"),
        ("sampler=hf", "sampler is nothing that"),
        ("n=3", r"n is nothing that .* \(did you mean sampler.n\?\)"),
        ("sampler.n.more=3", "is nothing that an answer is made with"),
        ("sampler.n=many", "sampler.n is 'many'"),
        ("sampler.stop=[", r"sampler.stop=\[ cannot be read"),
        ("prompts=socratic", "The style of the prompts is 'socratic'"),
        ("sampler.n=0", "n=0"),
    ],
)
def test_an_override_of_a_card_that_cannot_be_is_a_sentence(override: str, message: str) -> None:
    probe = QProbe()
    probe.use, probe.beta_ = USE, 0.1
    with pytest.raises(ValueError, match=message):
        composition.policy(probe, [override]).choose("x")


def test_a_card_is_not_changed_by_overrides() -> None:
    changed = composition._overridden(USE, ["sampler.n=5", "sampler.stop=[x]", "prompts=text", "model.device=null"])
    assert (changed["sampler"]["n"], changed["sampler"]["stop"], changed["prompts"]) == (5, ["x"], "text")
    assert changed["model"]["device"] is None
    assert USE["sampler"]["n"] == 3


def test_import_qprobe_costs_torch_and_nothing_more() -> None:
    """Neither a back end nor what run folders and reports are made of."""
    heavy = ("pyarrow", "transformers", "matplotlib", "openai", "hydra", "datasets", "ray", "scipy", "pandas")
    code = f"import sys, qprobe; print([name for name in {heavy!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
