"""What users say of a server's answers: kept once a request, and learnt from where held-out feedback shows no loss."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from served import Served, get, policy_of, post, save_probe, serving

from qprobe.cli.main import main
from qprobe.models.language_model import ModelSpec
from qprobe.probe import selection
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.serving import feedback as feedback_module
from qprobe.serving import learning
from qprobe.serving import service as service_module
from qprobe.serving.feedback import FeedbackBody, FeedbackLog
from qprobe.serving.learning import FEWEST_MIXED, Request, update
from qprobe.serving.policy import Policy, Read
from qprobe.serving.protocol import Refused
from qprobe.serving.running import application
from qprobe.serving.settings import ServeSettings
from qprobe.store.table import StoreError, Table

WIDTHS, K = (6, 2), 4
SOURCE = EmbeddingSource({"name": "numbers"}, 1)
MESSAGES = [{"role": "user", "content": "the number"}]


def used_probe(seed: int = 0) -> QProbe:
    """A linear probe that likes its first feature."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(400, sum(WIDTHS))).astype("float32")
    probe = QProbe(loss="reward_mse", k=K).fit(features, features[:, 0], np.arange(400) // K)
    probe.beta_, probe.source = 0.3, SOURCE
    return probe


Said = Callable[[np.ndarray, int, np.random.Generator], dict[str, Any]]


def liked(features: np.ndarray) -> np.ndarray:
    """The users' known rule: the second feature, in [0, 1]; the old probe's first one is worth nothing to them."""
    return np.asarray(1 / (1 + np.exp(-2 * features[:, 1])))


def preferences(features: np.ndarray, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"preferred": int(np.argmax(2 * features[:, 1] + rng.gumbel(size=len(features))))}


def rewards(features: np.ndarray, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"reward": float(rng.random() < liked(features)[chosen])}


def by_chance(features: np.ndarray, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
    return {"preferred": int(rng.integers(len(features)))}


def served_users(
    folder: Path, says: Said, users: int = 200, prompts: int = 200, explore: float = 0.2, seed: int = 0
) -> None:
    """Requests of users to the old probe, and what they say, into a folder as the server writes it."""
    rng, probe = np.random.default_rng(seed), used_probe()
    probe.save_pretrained(folder / "probe")
    policy = SimpleNamespace(probe=probe, beta=probe.beta_)

    async def serve() -> None:
        log = FeedbackLog(folder)
        log.open(SOURCE, WIDTHS, folder / "probe")
        for number in range(users):
            features = torch.from_numpy(rng.normal(size=(K, sum(WIDTHS))).astype("float32"))
            read = Read(features, torch.from_numpy(probe.score(features)))
            drawn: Any = [SimpleNamespace(text=f"answer {place}") for place in range(K)]
            choice = Policy.choice(policy, drawn, read, number, None, explore)  # type: ignore[arg-type]
            log.record(f"r-{number}", f"prompt {number % prompts}", "p", probe.beta_, choice, read)
            log.take(FeedbackBody(id=f"r-{number}", **says(features.numpy(), choice.chosen, rng)))
            if number % 50 == 49 or number == users - 1:
                await log.flush()

    asyncio.run(serve())


def earned(probe: QProbe, seed: int = 7) -> np.ndarray:
    """The users' reward of a probe's answers to 2000 new requests."""
    features = np.random.default_rng(seed).normal(size=(2000, K, sum(WIDTHS))).astype("float32")
    scores = torch.from_numpy(probe.score(features.reshape(-1, sum(WIDTHS)))).reshape(-1, K)
    law = selection.selection_weights(scores, probe.beta_).numpy()
    return np.asarray((law * liked(features.reshape(-1, sum(WIDTHS))).reshape(-1, K)).sum(axis=1))


@pytest.mark.parametrize(
    ("says", "users", "prompts", "least"), [(preferences, 200, 200, 0.15), (rewards, 1600, 60, 0.1)]
)
def test_answers_earn_more_after_an_update_by_a_known_rule(
    says: Said, users: int, prompts: int, least: float, tmp_path: Path
) -> None:
    served_users(tmp_path, says, users, prompts)
    before = QProbe.from_pretrained(tmp_path / "probe")
    said = update(tmp_path)
    after = QProbe.from_pretrained(tmp_path / "probe")
    difference = earned(after) - earned(before)
    assert difference.mean() > least, said
    assert "is the new probe" in said
    # What held-out feedback told beforehand is what the users get.
    low, high = (float(end) for end in re.findall(r"\[([+-][\d.]+), ([+-][\d.]+)\]", said)[0])
    if says is rewards:  # preferences are no rewards
        assert low - 0.05 < difference.mean() < high + 0.05
    assert "Since the last update feedback on 0 requests" in update(tmp_path)
    assert update(tmp_path, back=True).startswith(str(tmp_path / "probe"))
    again = QProbe.from_pretrained(tmp_path / "probe")
    assert torch.equal(again.network_.weights[0], before.network_.weights[0])
    with pytest.raises(ValueError, match="no probe that was replaced"):
        update(tmp_path, back=True)


@pytest.mark.parametrize("seed", range(2))
def test_random_feedback_leaves_the_old_probe(seed: int, tmp_path: Path) -> None:
    served_users(tmp_path, by_chance, seed=seed)
    before = (tmp_path / "probe" / "probe.json").read_bytes()
    said = update(tmp_path)
    assert "stays as it is" in said
    assert (tmp_path / "probe" / "probe.json").read_bytes() == before


def test_one_rewarded_answer_a_prompt_teaches_nothing_and_it_is_said(tmp_path: Path) -> None:
    served_users(tmp_path / "a", rewards)
    said = update(tmp_path / "a")
    assert "Nothing can be learnt" in said
    assert "which of several" in said
    served_users(tmp_path / "b", rewards, users=40, explore=0)
    assert update(tmp_path / "b").count("certainty") == 0  # at beta 0.3 others had their chance
    served_users(tmp_path / "c", preferences, users=FEWEST_MIXED - 1)
    assert "the fewest" in update(tmp_path / "c")


def test_an_estimate_by_inverse_probabilities_has_the_mean_of_the_truth() -> None:
    """Of every choice that could have been logged, weighted by its probability: the sum over them is the exact difference."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(K, 3)).astype("float32")
    logged, new, old = (rng.dirichlet(np.ones(K) * 3) for _ in range(3))
    truth = rng.random(K)
    single = [Request("r", "p", "reward", features, logged, {place: float(truth[place])}) for place in range(K)]
    expected = sum(p * request.worth(new, old, 0.4) for p, request in zip(logged, single, strict=True))
    assert expected == pytest.approx((new - old) @ truth)
    all_of_them = Request("r", "p", "rewards", features, logged, dict(enumerate(truth)))
    assert all_of_them.worth(new, old, 0.4) == pytest.approx((new - old) @ truth)


def test_feedback_is_taken_once_of_known_requests(tmp_path: Path) -> None:
    served_users(tmp_path, preferences, users=3)

    async def take(**body: Any) -> int:
        log = FeedbackLog(tmp_path)
        log.open(SOURCE, WIDTHS, None)
        return log.take(FeedbackBody(**body))

    wrong: list[tuple[dict[str, Any], int]] = [
        ({"id": "r-1", "preferred": 0}, 409),  # known from the tables
        ({"id": "r-9", "reward": 1}, 404),
        ({"id": "r-1"}, 400),
        ({"id": "r-1", "reward": 1, "preferred": 0}, 400),
        ({"id": "r-1", "preferred": K}, 400),
        ({"id": "r-1", "rewards": {K: 1.0}}, 400),
    ]
    for body, status in wrong:
        with pytest.raises(Refused) as refused:
            asyncio.run(take(**body))
        assert refused.value.status == status, body
    with pytest.raises(StoreError, match="other inputs"):
        FeedbackLog(tmp_path).open(EmbeddingSource({"name": "others"}, 1), WIDTHS, None)


@pytest.mark.parametrize("texts", [False, True])
def test_a_server_keeps_feedback_and_takes_a_new_probe_without_a_stop(
    texts: bool,
    tiny_model: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(feedback_module, "FLUSH", 0.05)
    monkeypatch.setattr(service_module, "LOOK", 0.05)
    monkeypatch.setattr(learning, "FEWEST_MIXED", 4)
    monkeypatch.setattr(learning.Updated, "replaces", property(lambda found: found.better is not None))
    probe, folder = save_probe(tmp_path / "probe", tiny_model), tmp_path / "feedback"
    settings = ServeSettings(explore=0.5)
    made = application(policy_of(probe), settings, feedback=folder, texts=texts, probe=probe)
    with serving(made) as served:
        model = served.client().models.list().data[0].id
        asked = {"model": model, "messages": MESSAGES, "max_tokens": 3, "qprobe": {"return_candidates": True}}
        for number in range(8):
            asked["messages"] = [{"role": "user", "content": f"a secret word {number}"}]
            _, _, said = post(f"{served.url}/chat/completions", asked)
            probabilities = [candidate["probability"] for candidate in said["qprobe"]["candidates"]]
            assert min(probabilities) >= 0.5 / 4 - 1e-9  # every candidate has its chance
            assert said["usage"]["qprobe"]["probability"] == probabilities[said["usage"]["qprobe"]["index"]]
            lengths = [len(candidate["text"]) for candidate in said["qprobe"]["candidates"]]
            told = {"id": said["id"], "preferred": int(np.argmax(lengths))}
            assert post(f"{served.url}/feedback", told)[0] == 200
            assert post(f"{served.url}/feedback", told)[0] == 409
        assert post(f"{served.url}/feedback", {"id": "none", "reward": 1})[0] == 404
        before = json.loads(get(f"{served.root}/ready")[1])["probe"]
        waited = time.monotonic() + 20
        while len(learning.read(folder)[0]) < 8:
            assert time.monotonic() < waited
            time.sleep(0.05)
        assert main(["update", str(folder)]) == 0
        assert "8 of preferred" in capsys.readouterr().out
        waited = time.monotonic() + 20
        while (now := json.loads(get(f"{served.root}/ready")[1])["probe"]) == before:
            assert time.monotonic() < waited
            time.sleep(0.05)
        assert post(f"{served.url}/chat/completions", asked)[2]["usage"]["qprobe"]["probe"] == now
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    replies = learning.Tables(folder, *_inputs(folder)).replies.read().to_pylist()
    assert {row["completion"] is not None for row in replies} == {texts}
    assert texts or b"secret" not in content


def _inputs(folder: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    _, widths, source = learning.read(folder)
    return source, widths


def test_a_server_without_feedback_says_so(tiny_model: ModelSpec, tmp_path: Path) -> None:
    def check(served: Served) -> None:
        status, _, said = post(f"{served.url}/feedback", {"id": "x", "reward": 1})
        assert (status, "--feedback" in said["error"]["message"]) == (404, True)

    with serving(application(policy_of(save_probe(tmp_path / "probe", tiny_model)), ServeSettings())) as served:
        check(served)
    assert main(["serve", "--probe", str(tmp_path / "probe"), "--explore", "0.2"]) == 2
    assert main(["update", str(tmp_path)]) == 1


def recorded(log: FeedbackLog, number: int, says: bool = True) -> None:
    """A reply of the old probe, and feedback on it."""
    probe, rng = used_probe(), np.random.default_rng(number)
    features = torch.from_numpy(rng.normal(size=(K, sum(WIDTHS))).astype("float32"))
    read = Read(features, torch.from_numpy(probe.score(features)))
    drawn: Any = [SimpleNamespace(text="answer")] * K
    choice = Policy.choice(SimpleNamespace(probe=probe, beta=0.3), drawn, read, number)  # type: ignore[arg-type]
    log.record(f"r-{number}", "prompt", "p", 0.3, choice, read)
    if says:
        log.take(FeedbackBody(id=f"r-{number}", preferred=0))


def test_a_disk_that_is_full_for_a_while_doubles_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Table.write

    def full(table: Table, keys: Any, rows: Any) -> None:
        if table.folder.name == "feedback":
            raise OSError("full")
        write(table, keys, rows)

    async def serve() -> None:
        log = FeedbackLog(tmp_path)
        log.open(SOURCE, WIDTHS, None)
        recorded(log, 0)
        monkeypatch.setattr(Table, "write", full)
        await log.flush()
        monkeypatch.setattr(Table, "write", write)
        recorded(log, 1)
        await log.flush()

    asyncio.run(serve())
    found = {request.id: request for request in learning.read(tmp_path)[0]}
    assert {id: len(request.probabilities) for id, request in found.items()} == {"r-0": K, "r-1": K}
    assert found["r-0"].probabilities.sum() == pytest.approx(1)


def test_a_stop_while_a_part_is_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_module, "FLUSH", 0.01)
    write, free, begun = Table.write, threading.Event(), threading.Event()

    def slow(table: Table, keys: Any, rows: Any) -> None:
        begun.set()
        free.wait(10)
        write(table, keys, rows)

    async def serve() -> None:
        log = FeedbackLog(tmp_path)
        log.open(SOURCE, WIDTHS, None)
        monkeypatch.setattr(Table, "write", slow)
        recorded(log, 0)
        keeping = asyncio.create_task(log.keep_flushing())
        await asyncio.to_thread(begun.wait, 10)
        recorded(log, 1)
        keeping.cancel()
        asyncio.get_running_loop().call_later(0.1, free.set)
        await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(serve())
    assert [request.id for request in learning.read(tmp_path)[0]] == ["r-0", "r-1"]


def test_a_server_that_starts_again_knows_the_latest_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served_users(tmp_path, preferences, users=140)
    monkeypatch.setattr(feedback_module, "_MOST_KNOWN", 5)
    log = FeedbackLog(tmp_path)
    log.open(SOURCE, WIDTHS, None)
    assert [number for number in range(140) if log.knows(f"r-{number}")] == [135, 136, 137, 138, 139]
    with pytest.raises(Refused, match="has had its feedback"):
        log.take(FeedbackBody(id="r-136", preferred=K - 1))


def test_preferences_do_not_say_how_likely_an_answer_is_right(tmp_path: Path) -> None:
    """Whoever says which answer is the best says nothing of whether it is any good: here none ever is."""

    def says(features: np.ndarray, chosen: int, rng: np.random.Generator) -> dict[str, Any]:
        said = preferences(features, chosen, rng)
        return said if rng.random() < 0.8 else {"rewards": dict.fromkeys(range(K), 0.0)}

    served_users(tmp_path, says, users=300)
    assert "is the new probe" in update(tmp_path)
    assert QProbe.from_pretrained(tmp_path / "probe").calibration_ is None


def test_a_probe_that_came_while_the_model_was_loaded_is_taken(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LOOK", 0.05)
    probe = save_probe(tmp_path / "probe", tiny_model)
    made = application(policy_of(probe), ServeSettings(), probe=probe)
    save_probe(probe, tiny_model, seed=1)
    new = service_module.probe_fingerprint(QProbe.from_pretrained(probe))
    with serving(made) as served:
        waited = time.monotonic() + 10
        while json.loads(get(f"{served.root}/ready")[1])["probe"] != new:
            assert time.monotonic() < waited
            time.sleep(0.05)


def test_replies_without_feedback_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve() -> None:
        log = FeedbackLog(tmp_path)
        log.open(SOURCE, WIDTHS, None)
        for number in range(40):
            recorded(log, number, says=number in (3, 4, 39))
            if number % 10 == 9:
                await log.flush()

    asyncio.run(serve())
    embeddings_of, held = learning.embeddings_of, []
    monkeypatch.setattr(learning, "embeddings_of", lambda table: held.append(len(table)) or embeddings_of(table))
    requests = {request.id: request for request in learning.read(tmp_path)[0]}
    assert set(requests) == {"r-3", "r-4", "r-39"}
    assert sum(held) == 3 * K
    for number in (3, 39):
        drawn = np.random.default_rng(number).normal(size=(K, sum(WIDTHS))).astype("float32")
        assert np.array_equal(requests[f"r-{number}"].features, drawn)
