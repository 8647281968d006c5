"""Answers to a file of prompts: those of one call a prompt, whatever stood between, and a sentence for every line without."""

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from saved import probe_of

from qprobe.cli import composition, main
from qprobe.models.language_model import ModelSpec
from qprobe.probe.calibration import Calibration
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.serving.many import Answering
from qprobe.serving.policy import Policy
from qprobe.store.jsonl import PromptRow

PROMPTS: list[Any] = [
    *(f"Say {'very ' * (number % 5)}{number}." for number in range(9)),
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\u2028"}],
]


@pytest.fixture
def numbers(fakes: ModuleType) -> Callable[..., tuple[Answering, Any]]:
    """Makes an answering policy on fakes, and its sampler, which says what was drawn."""
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 1, (80, fakes.WIDTH)).astype("float32")
    probe = QProbe(loss="reward_mse").fit(features, features[:, 0], np.arange(80) // 8)
    embedder = fakes.Embedder()
    probe.source = EmbeddingSource.of(embedder.identity(), 1, embedder.tokenizer_fingerprint())

    def make(seed: int = 3, beta: float = 0.2, seconds: float = 0.0) -> tuple[Answering, Any]:
        sampler = fakes.Sampler(4, seconds=seconds)
        policy = Policy(sampler, fakes.Embedder(), probe, style="text", beta=beta)
        return Answering(policy, seed=seed, at_once=3), sampler

    return make


def rows(count: int = 10, start: int = 0) -> list[PromptRow]:
    return [PromptRow(f"p-{n}", n + 1, f"task {n:03d}: ", {}) for n in range(start, count)]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_the_answers_are_those_of_one_call_a_prompt_in_float32(
    tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = probe_of(tiny_model, 3)
    probe.save_pretrained(tmp_path / "probe")
    keys = ["messages" if isinstance(prompt, list) else "prompt" for prompt in PROMPTS]
    prompts = write(tmp_path / "in.jsonl", *({key: prompt} for key, prompt in zip(keys, PROMPTS, strict=True)))
    words = ["--prompts", str(prompts), "--seed", "5", "--beta", "0.5", "--candidates"]
    assert main.main(["answer", "--probe", str(tmp_path / "probe"), *words, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "prompts/s" in said.err
    assert "10 of 10 prompts are answered." in said.err.splitlines()[-1]
    policy = composition.policy(probe, beta=0.5)
    for number, (line, prompt) in enumerate(zip(read(tmp_path / "out"), PROMPTS, strict=True), start=1):
        choice = policy.choose(prompt, 5)
        assert (line["task_id"], line["line"], line["seed"]) == (f"prompts-{number:05d}", number, 5)
        assert line["answer"] == choice.answer
        assert [candidate["text"] for candidate in line["candidates"]] == [c.text for c in choice.candidates]
        for key in ("score", "probability"):
            wanted = [getattr(candidate, key) for candidate in choice.candidates]
            assert [candidate[key] for candidate in line["candidates"]] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            assert line[key] == line["candidates"][choice.chosen][key]


def test_a_file_that_ends_anywhere_is_gone_on_with_and_nothing_is_answered_twice(
    numbers: Callable[..., tuple[Answering, Any]], tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    made = numbers()[0].answer(rows(), whole, progress=False)
    assert (made.answered, made.empty, made.wrong) == (10, 0, [])
    content = whole.read_bytes()
    cuts = random.Random(0).sample(range(len(content)), 40)
    for cut in (0, len(content) - 1, len(content), content.index(b"\n"), content.index(b"\n") + 1, *cuts):
        output.write_bytes(content[:cut])
        answering, sampler = numbers()
        assert answering.answer(rows(), output, progress=False).answered == 10
        assert output.read_bytes() == content
        assert sum(sampler.calls) == 10 - content[:cut].count(b"\n")
    # Prompts that were added are answered alone, and a second call answers nothing.
    answering, sampler = numbers()
    answering.answer(rows(12), output, progress=False)
    assert output.read_bytes().startswith(content)
    assert (len(read(output)), sum(sampler.calls)) == (12, 2)


@pytest.mark.filterwarnings("ignore:.*fork")  # of a process with threads, which only writes lines here
def test_a_process_that_was_killed_loses_a_batch_at_most(
    numbers: Callable[..., tuple[Answering, Any]], tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    numbers()[0].answer(rows(), whole, progress=False)
    drawn = 0
    for patience in (0.1, 0.25, 10.0):
        answering, _ = numbers(seconds=0.08)
        if (child := os.fork()) == 0:
            answering.answer(rows(), output, progress=False)
            os._exit(0)
        end = time.monotonic() + patience
        while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        else:
            if time.monotonic() >= end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        lines = output.read_bytes().count(b"\n") if output.exists() else 0
        assert lines >= drawn
        drawn = lines
    assert output.read_bytes() == whole.read_bytes()


def test_lines_that_are_wrong_are_named_and_cost_the_others_nothing(
    tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_of(tiny_model, 3).save_pretrained(tmp_path / "probe")
    lines = [
        '{"prompt": "one"',
        {"prompt": "Say 1."},
        {"prompt": 3},
        {"prompt": "long " * 300},
        "",
        {"prompt": "Say 1."},
    ]
    lines += [{"prompt": "a", "task_id": "x"}, {"prompt": "b", "task_id": "x"}, {"messages": [{"role": "cook"}]}]
    content = write(tmp_path / "in.jsonl", *lines).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main.main(["answer", "--probe", str(tmp_path / "probe"), "--prompts", "-", "--seed", "5"]) == 1
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [(line["task_id"], line["line"]) for line in found] == [("prompts-00002", 2), ("prompts-00006", 6), ("x", 7)]
    assert found[0]["answer"] == found[1]["answer"]  # the same prompt and seed
    named = [line for line in said.err.splitlines() if "ine " in line and "answered in" not in line]
    for number, word in ((1, "JSON"), (3, "text"), (4, "context"), (8, "x"), (9, "messages")):
        assert any(f"ine {number}" in line and word in line for line in named), (number, said.err)
    assert "3 of 8 prompts are answered; 5 have none" in said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "prompts"),
    [({"seed": 4}, rows()), ({"beta": 0.3}, rows()), ({}, [PromptRow("p-2", 3, "task 077: ", {})])],
)
def test_answers_of_another_seed_temperature_or_prompt_are_not_gone_on_with(
    numbers: Callable[..., tuple[Answering, Any]], tmp_path: Path, changes: dict[str, Any], prompts: list[PromptRow]
) -> None:
    numbers()[0].answer(rows(), tmp_path / "out", progress=False)
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(ValueError, match="another --output"):
        numbers(**changes)[0].answer(prompts, tmp_path / "out", progress=False)
    (tmp_path / "other").write_text("notes of mine\n")
    with pytest.raises(ValueError, match="line 1"):
        numbers()[0].answer(rows(), tmp_path / "other", progress=False)
    assert (tmp_path / "out").read_bytes() == before


def test_a_prompt_that_a_server_refuses_costs_the_others_nothing_and_a_server_that_refuses_all_ends_it(
    tiny_model: ModelSpec, server: Any, tmp_path: Path
) -> None:
    probe = probe_of(tiny_model, 3)
    law = {name: probe.use["sampler"][name] for name in ("greedy", "batch_rows", "n", "max_new_tokens", "stop")}
    probe.use["sampler"] = {"backend": "openai", "api": {"model": "tiny", "base_url": server.url, "retries": 1}, **law}
    prompts = [PromptRow(f"p-{n}", n, "b " * 1000 if n == 1 else f"Say {n}.", {}) for n in range(1, 12)]
    for at_once in (4, 1):
        answering = Answering(composition.policy(probe), seed=1, at_once=at_once)
        made = answering.answer(prompts, tmp_path / f"out-{at_once}", progress=False)
        assert made.answered == 10
        assert [("Line 1 " in said, "context" in said) for said in made.wrong] == [(True, True)]
    server.requests.clear()
    other = composition.policy(probe, ["sampler.api.model=unknown"])
    with pytest.raises(RuntimeError, match="unknown"):
        Answering(other, seed=1, at_once=1).answer(prompts, tmp_path / "other", progress=False)
    assert len(server.requests) < len(prompts)
    assert (tmp_path / "other").read_bytes() == b""


def test_where_an_answer_is_not_likely_to_be_right_there_is_none(
    tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe, folder = probe_of(tiny_model, 3), str(tmp_path / "probe")
    command = ["answer", "--probe", folder, "--seed", "5"]
    many = [*command, "--prompts", str(write(tmp_path / "in.jsonl", *({"prompt": f"Say {n}."} for n in range(6))))]
    probe.save_pretrained(folder)
    assert main.main([*command, "Say 1.", "--at-least", "0.5"]) == 1
    assert "loss auto" in capsys.readouterr().err
    # Likely where the first number of the candidates' states is high: so one prompt is not as another.
    probe.calibration_ = Calibration(np.eye(probe.dimension)[0], 0.0, 0.0, 0.0, 30.0)
    probe.save_pretrained(folder)
    assert main.main(many) == 0
    every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    likely = sorted(line["right"] for line in every)
    assert likely[0] < likely[-1]
    least = (likely[2] + likely[3]) / 2
    assert main.main([*many, "--at-least", str(least)]) == 0
    said = capsys.readouterr()
    kept = [json.loads(line) for line in said.out.splitlines()]
    assert [line["answer"] for line in kept] == [w["answer"] if w["right"] >= least else None for w in every]
    assert [line["right"] for line in kept] == [line["right"] for line in every]
    assert "3 of these say null" in said.err
    assert main.main([*command, "Say 1.", "--at-least", "1", "--show-candidates"]) == 1
    said = capsys.readouterr()
    assert "None of these" in said.err
    assert "right 0." in said.err
    assert not said.out
    assert main.main([*command, "Say 1.", "--at-least", "2"]) == 1
    assert "[0, 1]" in capsys.readouterr().err


def test_answers_by_another_calibration_are_not_gone_on_with(
    numbers: Callable[..., tuple[Answering, Any]], tmp_path: Path
) -> None:
    """Which answers are null hangs on it."""
    policy = numbers()[0].policy
    width = policy.probe.dimension
    for intercept, word in ((-9.0, None), (9.0, "another --output")):
        policy.probe.calibration_ = Calibration(np.zeros(width), 0.0, intercept, 0.0, 0.0)
        answering = Answering(policy, seed=3, at_once=3, at_least=0.5)
        if word is None:
            answering.answer(rows(2), tmp_path / "out.jsonl", progress=False)
        else:
            with pytest.raises(ValueError, match=word):
                answering.answer(rows(2), tmp_path / "out.jsonl", progress=False)
