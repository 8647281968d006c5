"""A user's own work with completions from an API: `qprobe run` and `qprobe answer`, the same words and a server's address."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qprobe.cli import main
from qprobe.models.language_model import ModelSpec


def test_run_and_answer_with_completions_from_an_api(
    server: Any, tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(6)))
    Path("lengths.py").write_text("def reward(prompt, completion):\n    return len(completion) % 3 / 2\n")
    words = ["sampler=openai", "sampler.api.model=tiny", f"sampler.api.base_url={server.url}", "sampler.n=3"]
    words += ["model=hub", f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu"]
    words += ["sampler.max_new_tokens=6", "embedder.layers=[2]", "probe.steps=5", "evaluation.seeds=2"]
    words += ["evaluation.folds=2", "evaluation.bootstrap=100", "evaluation.draws=5"]
    words += ["stages=[sample,reward,embed,train,evaluate]"]
    assert main.main(["run", "prompts.jsonl", "--reward", "lengths.py:reward", "--run", "own", *words]) == 0
    # A plain prompt is a message to an API, whatever the local model was made for.
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    said = [message for _, _, body in server.requests for message in body["messages"]]
    assert {(m["role"], m["content"]) for m in said} == {("user", f"Say {n}.") for n in range(6)}
    server.requests.clear()
    capsys.readouterr()
    probe = next(path.parent for path in Path("own/probes").rglob("policy_gradient/probe.json"))
    assert main.main(["answer", "Say 7.", "--probe", str(probe), "--seed", "3"]) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    (body,) = [body for _, _, body in server.requests]
    assert body["messages"] == [{"role": "user", "content": "Say 7."}]
    assert body["n"] == 3
    drawn = [choice["message"]["content"] for choice in server.answer("/v1/chat/completions", body)["choices"]]
    assert answer in [text.rstrip("\n") for text in drawn]
    assert not [path for path in Path("own").rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_a_server_that_is_away_is_a_sentence_and_no_traceback(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(6)))
    Path("lengths.py").write_text("def reward(prompt, completion):\n    return 1\n")
    words = ["sampler=openai", "sampler.api.model=tiny", "sampler.api.base_url=http://127.0.0.1:9/v1"]
    words += ["sampler.api.retries=1", "stages=[sample]", "evaluation.folds=2"]
    assert main.main(["run", "prompts.jsonl", "--reward", "lengths.py:reward", "--run", "own", *words]) == 1
    assert "qprobe: The API at http://127.0.0.1:9/v1 could not be reached" in capsys.readouterr().err
