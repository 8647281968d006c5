"""A judge's replies that are of no use: what the user sees, what is stored, what the same command does next.

Every row of the table is what a reply looks like. A twelfth of such replies is borne, a tenth is said, most end the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qprobe_preference.__main__ as command
from qprobe.models import openai_client
from qprobe.models.openai_client import ApiError
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool
from qprobe_preference.judges import AgainstReference, Comparison, configured
from qprobe_preference.judges.openai import OpenAIJudge

pytestmark = pytest.mark.usefixtures("plain_figures")

Json = dict[str, Any]
USER = "{fence}\n{conversation}\n{fence}\n{answer_a}\n{fence}\n{answer_b}\n{fence}"


def choice(content: Any, reason: Any = "stop", **more: Any) -> Json:
    return {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}


TOOL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
REPLIES: dict[str, Any] = {
    "an error and no text": choice("", "error"),
    "an error behind a verdict": choice("Verdict: A", "error"),
    "an error of the server": choice(None, "server_error"),
    "aborted": choice("Verdict: A", "abort"),
    "an error beside the message": choice("Verdict: A") | {"error": {"code": 502, "message": "bad gateway"}},
    "null content": choice(None),
    "no message": {"index": 0, "finish_reason": "stop"},
    "content that is no text": choice({"verdict": "A"}),
    "a tool's call": choice(None, "tool_calls", tool_calls=TOOL),
    "reasoning alone": choice("", "length", reasoning_content="A is better"),
    "a choice that is no object": 7,
    "cut": choice("A is better than B, for", "length"),
    "cut where a line looks like a verdict": choice("Let me see.\nA", "length"),
    "cut by another word": choice("Let me see.\nVerdict: A", "max_tokens"),
    "no verdict": choice("Both are fine."),
    "an unknown verdict": choice("Verdict: C"),
    "white space": choice(" \n"),
    "empty": choice(""),
}
BODIES: dict[str, Any] = {
    "no choices": {"choices": []},
    "an error in a good status": {"error": {"message": "upstream is away"}},
    "a list": [],
}


def judge(server: Any, folder: Path, **changes: Any) -> OpenAIJudge:
    values: Json = {
        "backend": "openai",
        "user": USER,
        "verdict": r"\W*(?:(?i:verdict)\W+)?([AB])\W*",
        "retries": 1,
        "api": {"model": "tiny", "base_url": server.url, "concurrency": 2, "retries": 1},
    }
    made = configured(values | changes, folder)
    assert isinstance(made, OpenAIJudge)
    return made


def shown(body: Json) -> tuple[str, str]:
    """The two answers of a request."""
    parts = body["messages"][-1]["content"].split("\n")
    return parts[3], parts[5]


def answers(server: Any, odd: Callable[[str, str], bool], reply: Any) -> None:
    """The longer answer is the better one; where `odd` says so, this comes in the place of a reply."""

    def answer(path: str, body: Json) -> Any:
        a, b = shown(body)
        if odd(a, b):
            return reply if isinstance(reply, list) or "index" not in reply else {"choices": [reply]}
        return {"choices": [choice(f"Verdict: {'A' if len(a) > len(b) else 'B'}")]}

    server.answer = answer


def body_of(name: str) -> Any:
    if name in BODIES:
        return BODIES[name]
    return REPLIES[name] if isinstance(REPLIES[name], dict) else {"choices": [REPLIES[name]]}


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    """12 prompts with one completion each."""
    made = Pool(tmp_path, fakes.split(count=12), "sample", fakes.Sampler(n=1), 0, batch_rows=4)
    stages.sample(made, progress=False)
    return made


def stage(fakes: ModuleType, server: Any, pool: Pool) -> AgainstReference:
    """A new process's: nothing is in memory."""
    openai_client.close_clients()
    references = {prompt.task_id: f"r {prompt.task_id}" for prompt in pool.split.prompts}
    return AgainstReference(judge(server, pool.run / "judge"), pool.split.prompts, references)


def kept(folder: Path) -> list[Json]:
    lines = [line for path in folder.glob("replies-*.jsonl") for line in path.read_text().split("\n") if line]
    return [json.loads(line)[1] for line in lines]


@pytest.mark.parametrize("name", [*REPLIES, *BODIES])
def test_a_reply_of_no_use_is_not_kept_and_the_same_command_asks_again(
    name: str, server: Any, fakes: ModuleType, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """All replies on 2 of 12 prompts are of no use: 4 of 24."""
    bad = {f"r {prompt.task_id}" for prompt in pool.split.prompts[:2]}
    answers(server, lambda a, b: a in bad or b in bad, body_of(name))
    first = stage(fakes, server, pool)
    rewarding.reward(pool, first, progress=False)
    assert "4 of 24 replies of judge-tiny on" in capsys.readouterr().err
    assert list(join(pool, first).verdicts).count("unparsed") == 2
    assert len(kept(pool.run / "judge")) == 20
    assert all(reply["letter"] for reply in kept(pool.run / "judge"))
    state = pool.rewards(first).state
    # The same command, nothing repaired: only these four are asked for, and nothing that was made of the rewards is outdated.
    server.requests.clear()
    rewarding.reward(pool, stage(fakes, server, pool), progress=False)
    assert len(server.requests) == 8  # each twice, by judge.retries or api.retries
    assert pool.rewards(first).state == state
    # The same command against the repaired server.
    answers(server, lambda *_: False, None)
    server.requests.clear()
    rewarding.reward(pool, again := stage(fakes, server, pool), progress=False)
    assert len(server.requests) == 4
    assert set(join(pool, again).verdicts) <= {"win", "loss", "tie"}
    assert len(kept(pool.run / "judge")) == 24
    assert pool.rewards(again).state != state
    capsys.readouterr()
    # And once more: nothing is left.
    server.requests.clear()
    rewarding.reward(pool, stage(fakes, server, pool), progress=False)
    assert not server.requests
    assert "replies" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["an error and no text", "null content", "no verdict", "cut"])
def test_a_run_whose_replies_mostly_fail_ends_and_goes_on_when_repaired(
    name: str, server: Any, fakes: ModuleType, pool: Pool
) -> None:
    """9 of 12, as a new user saw it."""
    bad = {f"r {prompt.task_id}" for prompt in pool.split.prompts[:9]}
    answers(server, lambda a, b: a in bad or b in bad, body_of(name))
    with pytest.raises(RuntimeError, match=r"18 of 24 replies|10 replies in a row"):
        rewarding.reward(pool, stage(fakes, server, pool), progress=False)
    answers(server, lambda *_: False, None)
    rewarding.reward(pool, again := stage(fakes, server, pool), progress=False)
    assert set(join(pool, again).verdicts) <= {"win", "loss", "tie"}


def test_a_broken_server_ends_a_run_early(server: Any, tmp_path: Path) -> None:
    answers(server, lambda *_: True, choice(None))
    pairs = [Comparison(f"t-{n}", "Hi", f"one {n}", f"two {n}") for n in range(500)]
    with pytest.raises(ApiError, match="10 replies in a row"):
        judge(server, tmp_path).compare(pairs)
    assert len(server.requests) < 40
    assert not kept(tmp_path)


def test_few_replies_without_a_verdict_are_borne_in_silence(
    server: Any, fakes: ModuleType, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of 24 are less than a tenth: the verdict counts half, and nobody is disturbed; but they are counted."""
    bad = {f"r {pool.split.prompts[0].task_id}"}
    answers(server, lambda a, b: a in bad or b in bad, choice("hm"))
    rewarding.reward(pool, own := stage(fakes, server, pool), progress=False)
    said = capsys.readouterr().err
    assert "could not be read" not in said
    assert "Of 12 judgements by judge-tiny: 1 unparsed." in said
    assert rewarding.unread_words(pool, own) is None


def test_failures_that_an_older_version_kept_are_asked_for_again(
    server: Any, fakes: ModuleType, pool: Pool, tmp_path: Path
) -> None:
    answers(server, lambda *_: False, None)
    rewarding.reward(pool, stage(fakes, server, pool), progress=False)
    for path in (pool.run / "judge").glob("replies-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().split("\n") if line]
        lost = [[key, {"letter": None, "share": None, "asked": 3, "text": "", "why": "unparsed"}] for key, _ in lines]
        path.write_text("\n".join(map(json.dumps, lost)) + "\n")
    for part in pool.rewards(stage(fakes, server, pool)).parts():
        part.unlink()
    server.requests.clear()
    rewarding.reward(pool, stage(fakes, server, pool), progress=False)
    assert len(server.requests) == 24


def test_a_reply_of_one_line_is_whole_though_it_reached_its_length(server: Any, tmp_path: Path) -> None:
    """What judges do that may say one token."""
    answers(server, lambda *_: True, choice("A", "length"))
    (judgement,) = judge(server, tmp_path, max_tokens=1).compare([Comparison("t", "Hi", "one", "two")])
    assert judgement.verdict == "tie"
    assert len(server.requests) == 2


def test_a_policy_run_says_it_before_its_tables_and_is_whole_when_repaired(
    server: Any,
    composed: Callable[..., Json],
    policy_words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = composed(
        *("experiment=hh_policy", *policy_words, "policy.label_pairs=0", "compare.hidden=[]", "dataset.test_share=0.5"),
        *("judge=openai", "judge.api.model=tiny", f"judge.api.base_url={server.url}", "judge.api.concurrency=1"),
        "judge.api.retries=0",
    )
    calls = {"made": 0}

    def every_fifth(path: str, body: Json) -> Json:
        calls["made"] += 1
        return {"choices": [choice(None if calls["made"] % 5 == 0 else "Verdict: A")]}

    server.answer = every_fifth
    command.run(config)
    out = capsys.readouterr().out
    lost = calls["made"] // 5
    assert f"{lost} of {calls['made']} replies of judge-tiny on" in out
    assert out.index("could not be read") < out.index("base ")
    (first,) = (tmp_path / "hh_policy" / "tables").glob("win_rates.csv")
    before = first.read_text()
    server.answer = lambda *_: {"choices": [choice("Verdict: A")]}
    openai_client.close_clients()
    command.run(config)
    assert len(server.requests) == calls["made"] + lost
    assert "could not be read" not in capsys.readouterr().out
    assert first.read_text() != before
