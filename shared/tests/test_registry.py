"""Back ends by entry points: the package of docs/BACK_ENDS.md, installed; clashes and broken packages are sentences."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import install

from qprobe.cli import composition, configuration, main
from qprobe.registry import Registry

REWARD = "def reward(prompt, completion, letter):\n    return completion.count(letter) / len(completion)\n"


def test_back_ends_of_another_package_run_and_answer(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    lines = [json.dumps({"prompt": f"Prompt {number}", "letter": "b"}) for number in range(40)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    words = (
        "run prompts.jsonl --reward reward.py:reward --run run sampler=letters sampler.alphabet=abcd embedder=letters "
    )
    words += "evaluation.losses=[reward_mse] evaluation.controls=[] evaluation.beta=0 evaluation.curve_shares=[] "
    words += "probe.steps=80 probe.learning_rate=0.05 baselines.names=[one_letter] +baselines.one_letter.letter=b"
    assert main.main(words.split()) == 0, capsys.readouterr().err
    lines = Path("run/tables/prompts.csv").read_text().splitlines()
    table = {row["method"]: float(row["value"]) for row in csv.DictReader(lines)}
    # The reward is linear in the counts, so the probe finds the best of eight, as does the baseline that counts the same letter.
    assert (
        table["Q-probe L_Q"]
        == pytest.approx(table["skyline pass@8"], abs=0.01)
        == pytest.approx(table["most of one letter"])
    )
    assert table["pass@1"] == pytest.approx(0.25, abs=0.05)  # one letter of four
    assert main.main(["answer", "--probe", "run/probes/prompts/reward_mse", "--beta", "0", "A word, please"]) == 0
    answer = capsys.readouterr().out.splitlines()[-1]
    assert len(answer) == 8
    assert set(answer) <= set("abcd")


def test_their_names_are_choices_with_keys_of_their_own(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "letters" not in Registry("qprobe.samplers").names()
    monkeypatch.syspath_prepend(str(installed))
    (choice,) = [choice for choice in configuration.groups("qprobe.conf")["sampler"] if choice.name == "letters"]
    assert choice.about == "Of letters 1.0."
    config = composition.composed("run", ["sampler=letters", "sampler.alphabet=xy", "sampler.n=3", "embedder=letters"])
    ends = composition.back_ends(config)
    assert (ends.sampler.alphabet, ends.sampler.settings.n, ends.sampler.settings.top_p) == ("xy", 3, 0.95)  # type: ignore[attr-defined]
    assert config["embedder"] == {"backend": "letters", "alphabet": "abcd"}
    with pytest.raises(ValueError, match=r"did you mean sampler\.alphabet"):
        composition.composed("run", ["sampler=letters", "sampler.alphabt=xy"])
    with pytest.raises(ValueError, match=r"sampler\.alphabet is 3"):
        composition.back_ends(composition.composed("run", ["sampler=letters", "sampler.alphabet=3"]))


def test_a_clash_and_a_package_that_cannot_be_imported_name_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = Registry("qprobe.samplers")
    names = ["twice = nothing:Sampler", "broken = broken_module:Sampler", "lacking = empty_module:Sampler"]
    modules = {"broken_module": "import no_such_package", "empty_module": ""}
    install(tmp_path / "site", "first", modules, "\n".join(["[qprobe.samplers]", *names]))
    install(tmp_path / "site", "second", {}, "[qprobe.samplers]\ntwice = other:Sampler\n", version="2.5")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ValueError, match=r"first 1\.0 and second 2\.5 both register \(qprobe\.samplers\)"):
        composition.back_ends(composition.composed("run", ["sampler.backend=twice"]))
    with pytest.raises(ValueError, match=r"first 1\.0 registers .* No module named 'no_such_package'"):
        composition.composed("run", ["sampler=broken"])
    with pytest.raises(ValueError, match=r"first 1\.0.*AttributeError"):
        samplers.find("lacking", "sampler.backend")
    with pytest.raises(ValueError, match=r"did you mean broken.*choose from broken, hf, lacking"):
        samplers.find("brokn", "sampler.backend")
    assert samplers.find("hf", "sampler.backend").__name__ == "HFSampler"  # what nobody asks for disturbs nobody
    with pytest.raises(ValueError, match="install it again"):
        Registry("qprobe.nothing").find("hf", "x")
