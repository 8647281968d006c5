"""Texts beyond a model's context: found before any work by line and id; stopped, left out and counted, or cut from the left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qprobe import models
from qprobe.cli import main
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.run import lengths
from qprobe.run.lengths import Room
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.store import jsonl
from qprobe.store.jsonl import PromptRow

CONTEXT = 192  # of the tiny model, whose tokens are bytes, and BOS before a text
SHORT, LONG = "b" * 20, "c" * 300


def room(model: ModelSpec, drawn: bool = False, longest: int = 20) -> Room:
    sampler = HFSampler(model, SamplingSettings(n=1, max_new_tokens=longest))
    return Room.of(sampler, HFEmbedder(model, (1,)), drawn)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def candidates(folder: Path, *rows: tuple[str, str]) -> Path:
    """Two short candidates of six prompts, with further ones from line 13 on."""
    every = [(f"Say {p}.", f"{c} {SHORT}") for p in range(6) for c in "ab"] + list(rows)
    found = [{"prompt": p, "completion": c, "reward": float(i % 2)} for i, (p, c) in enumerate(every)]
    return written(folder / "own.jsonl", found)


def words(model: ModelSpec, *more: str) -> list[str]:
    return [
        *("model=hub", f"model.name={model.name}", "model.dtype=float32", "model.device=cpu", "embedder.layers=[2]"),
        *("probe.steps=5", "evaluation.seeds=2", "evaluation.folds=2", "evaluation.bootstrap=100", "prompts=text"),
        *("evaluation.draws=5", "stages=[sample,reward,embed,train,evaluate]", *more),
    ]


def test_one_over_long_candidate_stops_an_import_before_any_work(
    tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = candidates(tmp_path, ("Say 2.", LONG), ("Say 4.", LONG + "d"))
    assert main.main(["import", str(path), "--run", "own", *words(tiny_model)]) == 1
    said = capsys.readouterr().err
    # "Say 2." are 6 bytes and BOS.
    assert "2 of 14 candidates exceed, with their prompt, the context of 192 tokens" in said
    assert "line 13, prompts-00005 (7 + 300 tokens); line 14, prompts-00009 (7 + 301 tokens)" in said
    assert "too_long=leave_out" in said
    assert "shorten the prompt" not in said
    assert not Path("own").exists()
    # The same command with a choice goes on.
    assert main.main(["import", str(path), "--run", "own", *words(tiny_model, "too_long=leave_out")]) == 0
    said = capsys.readouterr().err
    assert "6 prompts with 2 candidates each, 12 in all" in said
    assert "2 of 14 candidates exceed" in said
    assert "They are left out." in said


def test_what_fits_to_the_token_fits_and_one_more_does_not(tiny_model: ModelSpec, tmp_path: Path) -> None:
    for length, stopped in ((CONTEXT - 7, False), (CONTEXT - 6, True)):
        path = candidates(tmp_path, ("Say 2.", "c" * length))
        found = jsonl.read_candidates(path, "prompts")
        if stopped:
            with pytest.raises(ValueError, match="line 13, prompts-00005"):
                lengths.fit_candidates(path, found, "text", room(tiny_model), "stop")
        else:
            assert lengths.fit_candidates(path, found, "text", room(tiny_model), "stop") is found


def test_prompts_with_one_candidate_left_are_left_out_and_counted(tiny_model: ModelSpec, tmp_path: Path) -> None:
    path = candidates(tmp_path, ("Other", LONG), ("Other", SHORT))
    found = lengths.fit_candidates(path, jsonl.read_candidates(path, "prompts"), "text", room(tiny_model), "leave_out")
    assert len(found.prompts) == len(found.completions) == len(found.rewards) == 6
    assert "with them 1 prompts that have fewer than two candidates" in found.notes[-1]
    # The rewards stay those of their completions.
    path = candidates(tmp_path, ("Say 0.", LONG), ("Say 0.", "last"))
    found = lengths.fit_candidates(path, jsonl.read_candidates(path, "prompts"), "text", room(tiny_model), "leave_out")
    key = found.prompts[0].task_id
    assert list(zip(found.completions[key], found.rewards[key], found.lines[key], strict=True)) == [
        (f"a {SHORT}", 0.0, 1),
        (f"b {SHORT}", 1.0, 2),
        ("last", 1.0, 14),
    ]


def test_a_prompt_is_cut_from_the_left_so_that_its_longest_candidate_just_fits(
    tiny_model: ModelSpec, tmp_path: Path
) -> None:
    prompt = "".join(chr(97 + i % 26) for i in range(230))
    path = candidates(tmp_path, (prompt, SHORT), (prompt, SHORT * 2))
    found = lengths.fit_candidates(path, jsonl.read_candidates(path, "prompts"), "text", room(tiny_model), "cut_prompt")
    cut = found.prompts[-1].prompt
    assert isinstance(cut, str)
    assert prompt.endswith(cut)
    tokenizer = models.load_tokenizer(tiny_model).tokenizer
    longest = len(tokenizer(SHORT * 2, add_special_tokens=False)["input_ids"])
    assert len(tokenizer(cut)["input_ids"]) + longest == CONTEXT
    assert len(tokenizer(prompt[-len(cut) - 1 :])["input_ids"]) + longest > CONTEXT
    assert "1 prompts are cut from the left" in found.notes[-1]
    assert [row.prompt for row in found.prompts[:6]] == [f"Say {p}." for p in range(6)]


def test_what_no_cut_can_help_is_said_under_every_choice(tiny_model: ModelSpec, tmp_path: Path) -> None:
    path = candidates(tmp_path, ("Say 2.", LONG))
    found = jsonl.read_candidates(path, "prompts")
    with pytest.raises(ValueError, match="line 13"):
        lengths.fit_candidates(path, found, "text", room(tiny_model), "cut_prompt")
    path = written(tmp_path / "all.jsonl", [{"prompt": "x", "completion": c + LONG, "reward": 1} for c in "abc"])
    with pytest.raises(ValueError, match="nothing"):
        lengths.fit_candidates(path, jsonl.read_candidates(path, "prompts"), "text", room(tiny_model), "leave_out")


def test_conversations_lose_whole_messages_first_and_keep_the_systems(tiny_model: ModelSpec) -> None:
    def said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    whole = [said("system", "S"), said("user", "a" * 90), said("assistant", "b" * 60), said("user", "c" * 50)]
    rows = [PromptRow("p", 3, whole, {"field": 1}), PromptRow("q", 4, [said("user", "d" * 400)], {})]
    measured = room(tiny_model, drawn=True)
    first, second = lengths.fit_prompts(Path("own"), rows, "chat", measured, "cut_prompt").rows
    assert first.prompt == [whole[0], whole[3]]
    assert first.fields == {"field": 1}
    assert set(second.prompt[0]["content"]) == {"d"}  # type: ignore[index]
    assert measured.prompt(second.as_prompt("chat")) + 20 == CONTEXT


def test_over_long_prompts_stop_a_run_before_any_completion(
    tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    prompts = [{"prompt": f"Say {n}."} for n in range(6)]
    written(Path("prompts.jsonl"), [*prompts, {"prompt": "x" * 200, "task_id": "mine"}])
    Path("lengths_reward.py").write_text("def reward(prompt, completion):\n    return len(completion) % 3 / 2\n")
    run = ["run", "prompts.jsonl", "--reward", "lengths_reward.py:reward", "--run", "own"]
    run += words(tiny_model, "sampler.max_new_tokens=6", "sampler.n=3")
    assert main.main(run) == 1
    said = capsys.readouterr().err
    assert "1 of 7 prompts exceeds, with a completion of sampler.max_new_tokens=6, the context of 192 tokens" in said
    assert "line 7, mine (201 + 6 tokens)" in said
    assert not Path("own").exists()
    assert main.main([*run, "too_long=cut_prompt"]) == 0
    assert "They are cut from the left." in capsys.readouterr().err
    assert main.main([*run, "too_long=shorten"]) == 1
    assert "too_long is 'shorten': choose from stop, leave_out, cut_prompt." in capsys.readouterr().err


def test_pipelines_of_other_makers_say_it_before_they_begin(tiny_model: ModelSpec, tmp_path: Path) -> None:
    """Those of the halves bring splits, not files."""
    rows = [PromptRow("p", 1, "x" * 200, {}), PromptRow("q", 2, "y", {})]
    prompts = [row.as_prompt("text") for row in rows]
    assert lengths.fault("train", prompts[1:], None, room(tiny_model, drawn=True)) is None
    said = lengths.fault("train", prompts, None, room(tiny_model, drawn=True))
    assert said is not None
    assert said.startswith("train: 1 of 2 prompts exceeds, with sampler.max_new_tokens=20, the context of 192")
    assert "p (201 + 20 tokens)" in said
    recorded = {"p": ["a"], "q": ["b", LONG]}
    said = lengths.fault("train", prompts, recorded, room(tiny_model))
    assert said is not None
    assert "2 of 2 prompts exceed, with their longest completion" in said
    assert "p (201 + 1 tokens); q (2 + 300 tokens)" in said
