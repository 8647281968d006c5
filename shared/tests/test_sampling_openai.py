"""The API sampler gives what the local samplers give where seeds are honoured, and asks a server only what it takes."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiError
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, SamplingSettings
from qprobe.sampling.base import stop_position
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler, sent_stop_texts

TEXTS = [Prompt(f"t{i}", text=text) for i, text in enumerate(("def add(", "The answer is", "naïve 🙂 ", "x"))]
CHATS = [
    Prompt("c0", messages=({"role": "user", "content": "What is the sum?"},)),
    Prompt("c1", messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})),
]
SEEDS = [[100 * p + i for i in range(4)] for p in range(6)]  # consecutive, as sample_seeds gives them
# Single letters of a tiny model's babble: every completion meets several of them.
STOP = ("q\n", "e", "\n", "t", "(", "a", " ")


def sampler(there: Any, settings: SamplingSettings, **changes: Any) -> OpenAISampler:
    api, own = there.divided(changes)
    return OpenAISampler(None, settings, api, **own)


def draw(one: Any, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
    drawn: list[list[Completion]] = one.sample([one.render(prompt)[1] for prompt in prompts], seeds)
    return drawn


def bodies(server: Any) -> list[dict[str, Any]]:
    return [body for _, _, body in server.requests]


def change(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault: the first choice of an answer with other values."""

    def changed(answer: dict[str, Any]) -> dict[str, Any]:
        first, *rest = answer["choices"]
        return answer | {"choices": [first | values, *rest]}

    return changed


# ------------------------------------------------------------------------------------------- equal to the reference


@pytest.mark.parametrize("choices_per_call", [None, 1, 3])
@pytest.mark.parametrize("prompts", [TEXTS, CHATS])
def test_completions_equal_the_local_sampler_for_equal_seeds(
    server: Any, tiny_model: ModelSpec, prompts: list[Prompt], choices_per_call: int | None
) -> None:
    settings = SamplingSettings(n=4, temperature=1.0, top_p=0.9, max_new_tokens=12, stop=STOP)
    seeds = SEEDS[: len(prompts)]
    found = draw(sampler(server, settings, choices_per_call=choices_per_call), prompts, seeds)
    wanted = draw(HFSampler(tiny_model, settings), prompts, seeds)
    assert [[(c.text, c.seed) for c in row] for row in found] == [[(c.text, c.seed) for c in row] for row in wanted]
    assert [[c.finish_reason for c in row] for row in found] == [[c.finish_reason for c in row] for row in wanted]
    assert all(c.token_ids is None for row in found for c in row)
    paths = {path for path, _, _ in server.requests}
    assert paths == {"/v1/completions" if prompts is TEXTS else "/v1/chat/completions"}
    assert all(len(body.get("stop", [])) <= 4 for body in bodies(server))


def test_log_probabilities_are_those_of_all_that_was_drawn_the_end_included(server: Any, tiny_model: ModelSpec) -> None:
    settings = SamplingSettings(n=80, temperature=1.0, top_p=1.0, max_new_tokens=3, stop=("e", "\n"))
    for prompts in (TEXTS[:1], CHATS[:1]):
        seeds = [list(range(80))]
        found = draw(sampler(server, settings), prompts, seeds)
        wanted = draw(HFSampler(tiny_model, settings), prompts, seeds)
        pairs = [(f, w) for a, b in zip(found, wanted, strict=True) for f, w in zip(a, b, strict=True)]
        # A special token behind the text has no letters: nobody who reads text knows of it.
        known = [(f, w) for f, w in pairs if not math.isnan(f.logprob) and min(w.token_ids or [9]) > 4]
        # Unknown only where a character is spelled by several tokens, which a server writes as no letters.
        assert all(not f.text.isascii() for f, _ in pairs if math.isnan(f.logprob))
        assert len(known) > 8
        assert {f.finish_reason for f, _ in known} == {"stop", "length"}
        for f, w in known:
            assert f.logprob == pytest.approx(w.logprob, abs=1e-3)


def test_log_probabilities_that_are_not_given_are_nan(server: Any) -> None:
    settings = SamplingSettings(n=1, max_new_tokens=5)
    for given in (None, {}, {"content": None}, {"content": [{"token": "x", "logprob": None}]}, [], {"tokens": []}):
        server.faults.append(change(logprobs=given))
        ((completion,),) = draw(sampler(server, settings), TEXTS[:1], [[1]])
        assert math.isnan(completion.logprob)
    assert "logprobs" in bodies(server)[0]
    server.requests.clear()
    ((completion,),) = draw(sampler(server, settings, logprobs=False), TEXTS[:1], [[1]])
    assert math.isnan(completion.logprob)
    assert "logprobs" not in bodies(server)[0]


# ------------------------------------------------------------------------------------------------- what is asked for


def test_the_request_holds_the_law_and_no_more(server: Any) -> None:
    law = SamplingSettings(n=3, temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=5, stop=("ab", "cd"))
    draw(sampler(server, law, extra_body={"min_p": 0.1}), TEXTS[:1], [[2**40 + 5, 2**40 + 6, 2**40 + 7]])
    assert bodies(server)[0] == {
        **{"model": "tiny", "prompt": "def add(", "temperature": 0.7, "top_p": 0.9, "top_k": 20, "n": 3},
        **{"max_tokens": 5, "stop": ["ab", "cd"], "seed": 5, "logprobs": 1, "min_p": 0.1},
    }
    server.requests.clear()
    draw(sampler(server, SamplingSettings(n=1, temperature=0.0, top_p=1.0, max_new_tokens=5)), CHATS[:1], [[3]])
    assert bodies(server)[0] == {
        **{"model": "tiny", "messages": list(CHATS[0].messages), "temperature": 0.0, "max_tokens": 5, "seed": 3},
        "logprobs": True,
    }


@pytest.mark.parametrize(
    ("parameter", "said"),
    [("n", "'n' must be 1"), (None, "n must be 1"), (None, "Parameter `n` is not supported (got n=4)")],
)
def test_a_server_that_refuses_n_is_asked_one_by_one(
    server: Any, tiny_model: ModelSpec, refusal: Any, parameter: str | None, said: str, capsys: Any
) -> None:
    settings = SamplingSettings(n=4, max_new_tokens=6)
    server.faults.append(refusal(400, said, param=parameter))
    found = draw(sampler(server, settings, concurrency=1), TEXTS[:2], SEEDS[:2])
    assert found == relabelled(draw(HFSampler(tiny_model, settings), TEXTS[:2], SEEDS[:2]), found)
    assert [body.get("n", 1) for body in bodies(server)] == [4] + [1] * 8
    assert "refuses n" in capsys.readouterr().err


def relabelled(wanted: list[list[Completion]], found: list[list[Completion]]) -> list[list[Completion]]:
    """What was wanted, with what an API cannot know taken from what was found."""
    return [
        [Completion(w.text, None, w.finish_reason, f.logprob, w.seed) for w, f in zip(a, b, strict=True)]
        for a, b in zip(wanted, found, strict=True)
    ]


@pytest.mark.parametrize("given", [1, 3, 8])
def test_other_numbers_of_choices_than_asked_for_are_made_good(server: Any, tiny_model: ModelSpec, given: int) -> None:
    settings = SamplingSettings(n=4, max_new_tokens=6)
    server.always = lambda answer: answer | {"choices": (answer["choices"] * 2)[:given]}
    found = draw(sampler(server, settings), TEXTS[:2], SEEDS[:2])
    assert found == relabelled(draw(HFSampler(tiny_model, settings), TEXTS[:2], SEEDS[:2]), found)
    # A server that does not look at n is not asked for several again.
    asked = sorted((body.get("n", 1) for body in bodies(server)), reverse=True)
    assert asked == {1: [4, 4] + [1] * 6, 3: [4, 4, 1, 1], 8: [4, 4]}[given]


@pytest.mark.parametrize("name", ["seed", "logprobs", "stop"])
def test_what_does_not_change_the_law_is_left_away_where_it_is_refused(
    server: Any, tiny_model: ModelSpec, refusal: Any, name: str, capsys: Any
) -> None:
    settings = SamplingSettings(n=2, max_new_tokens=8, stop=("e", "t"))
    server.faults.append(refusal(400, f"Unrecognized request argument supplied: {name}"))
    one = sampler(server, settings)
    found = draw(one, TEXTS[:1], [[7, 8]])
    draw(one, TEXTS[:1], [[7, 8]])
    assert [name in body for body in bodies(server)] == [True] + [False] * (len(bodies(server)) - 1)
    assert capsys.readouterr().err.count(f"refuses {name}") == 1
    if name != "seed":
        wanted = draw(HFSampler(tiny_model, settings), TEXTS[:1], [[7, 8]])
        assert [c.text for c in found[0]] == [c.text for c in wanted[0]]


def test_the_newer_name_of_the_longest_length_is_sent_where_it_is_asked_for(server: Any, refusal: Any) -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.always = refusal(400, said, param="max_tokens")
    with pytest.raises(ApiError, match="max_completion_tokens"):
        draw(sampler(server, SamplingSettings(n=1, max_new_tokens=6)), CHATS[:1], [[7]])
    sent = [[name for name in body if name.startswith("max")] for body in bodies(server)]
    assert sent == [["max_tokens"], ["max_completion_tokens"]]


def test_top_k_is_never_left_away(server: Any, refusal: Any) -> None:
    server.always = refusal(400, "Unrecognized request argument supplied: top_k")
    with pytest.raises(ApiError, match="top_k"):
        draw(sampler(server, SamplingSettings(n=1, top_k=5)), TEXTS[:1], [[7]])
    assert len(server.requests) == 1


# -------------------------------------------------------------------------------------------------------- stop texts


def test_the_first_stop_texts_that_leave_the_cut_in_place_are_sent() -> None:
    code = ("\n```", '\n"""', "\nprint", "\nassert ", "\nif __name__", "\n\ndef ", "\n\nif ")
    assert sent_stop_texts(code, 4) == code[:4]
    # "\n\nif " may hold the beginning of "\nif __name__": one is not told without the other.
    assert sent_stop_texts(("\nif __name__", "\n\nif "), 1) == ("\n\nif ",)
    assert sent_stop_texts(("\nif __name__", "\n\nif "), 2) == ("\nif __name__", "\n\nif ")
    assert sent_stop_texts(("def", "\n\ndef"), 1) == ("\n\ndef",)
    assert sent_stop_texts(("a", "ab", "abc"), 1) == ("a",)
    assert sent_stop_texts(("a", "b"), 0) == ()
    assert sent_stop_texts(("a", "a", "b"), 4) == ("a", "b")


def test_cut_by_the_server_and_then_here_is_cut_where_all_stop_texts_would() -> None:
    draws = random.Random(0)
    words = ["".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab\n", repeat=n)]
    compared = 0
    for _ in range(5000):
        stop = tuple(draws.sample(words, draws.randint(1, 5)))
        if any(inner in outer[1:-1] for inner in stop for outer in stop):
            continue
        compared += 1
        text = "".join(draws.choice("ab\n") for _ in range(draws.randint(0, 14)))
        told = sent_stop_texts(stop, draws.randint(0, 4))
        assert set(told) <= set(stop)
        # A server stops as soon as one of its texts is complete, and cuts before that.
        server_text = text
        for end in range(1, len(text) + 1):
            if done := [word for word in told if text[:end].endswith(word)]:
                server_text = text[: end - max(map(len, done))]
                break
        if not server_text.strip():
            continue  # asked for again
        # A local sampler stops as soon as one of all texts that counts is complete.
        wanted = text
        for end in range(1, len(text) + 1):
            if (at := stop_position(text[:end], stop)) < end:
                wanted = text[:at]
                break
        assert server_text[: stop_position(server_text, stop)] == wanted, (stop, told, text)
    assert compared > 2000


@pytest.mark.parametrize("says_stop_reason", [False, True])
def test_a_stop_inside_the_white_space_that_begins_a_completion_does_not_empty_it(
    server: Any, tiny_model: ModelSpec, says_stop_reason: bool
) -> None:
    server.says_stop_reason = says_stop_reason
    free = HFSampler(tiny_model, SamplingSettings(n=1, temperature=1.0, top_p=1.0, max_new_tokens=9))
    seed = next(s for s in range(5000) if (t := draw(free, TEXTS[:1], [[s]])[0][0].text)[:1].isspace() and t.strip())
    word = draw(free, TEXTS[:1], [[seed]])[0][0].text[0]
    settings = SamplingSettings(n=1, temperature=1.0, top_p=1.0, max_new_tokens=9, stop=(word,))
    found = draw(sampler(server, settings), TEXTS[:1], [[seed]])
    assert found[0][0].text == draw(HFSampler(tiny_model, settings), TEXTS[:1], [[seed]])[0][0].text != ""
    assert ["stop" in body for body in bodies(server)] == [True, False]


@pytest.mark.parametrize("says_stop_reason", [False, True])
def test_a_completion_that_ends_at_once_is_empty_and_stays_so(
    make_server: Any, make_model: Any, tiny_model: ModelSpec, stock_logprobs: Any, says_stop_reason: bool
) -> None:
    settings = SamplingSettings(n=1, temperature=0.0, top_p=1.0, max_new_tokens=4, stop=("zzz",))
    first = draw(HFSampler(tiny_model, settings), TEXTS[:1], [[0]])[0][0].token_ids
    assert first
    server = make_server(make_model(eos_token_id=[1, first[0]]))
    server.says_stop_reason = says_stop_reason
    ((completion,),) = draw(sampler(server, settings), TEXTS[:1], [[0]])
    assert (completion.text, completion.finish_reason) == ("", "stop")
    likeliest = stock_logprobs(tiny_model, models.load_tokenizer(tiny_model).render_prompt(TEXTS[0])[1])[-1].max()
    assert completion.logprob == pytest.approx(float(likeliest), abs=1e-3)
    assert len(server.requests) == (1 if says_stop_reason else 2)


# ----------------------------------------------------------------------------------------- odd answers, odd prompts


OPENED = Prompt("c9", messages=({"role": "user", "content": "Add."},), opening="```python\ndef add(")


def test_an_opened_answer_is_refused_with_what_to_do(server: Any) -> None:
    with pytest.raises(ValueError, match=r"sampler\.opening"):
        sampler(server, SamplingSettings()).render(OPENED)


def test_an_opened_answer_is_continued_where_the_server_can(server: Any, tiny_model: ModelSpec) -> None:
    settings = SamplingSettings(n=2, max_new_tokens=9)
    found = draw(sampler(server, settings, opening="continue_final_message"), [OPENED], [[4, 5]])
    wanted = draw(HFSampler(tiny_model, settings), [OPENED], [[4, 5]])
    assert [c.text for c in found[0]] == [c.text for c in wanted[0]]


@pytest.mark.parametrize("repeats", [False, True])
def test_an_opened_answer_is_sent_as_a_prefix(server: Any, repeats: bool) -> None:
    said = (OPENED.opening if repeats else "") + "a, b)"
    server.always = change(message={"content": said}, finish_reason="stop")
    one = sampler(server, SamplingSettings(n=1, max_new_tokens=9), opening="prefix")
    assert draw(one, [OPENED], [[4]])[0][0].text == "a, b)"
    last = {"role": "assistant", "content": OPENED.opening, "prefix": True}
    assert bodies(server)[0]["messages"] == [*OPENED.messages, last]


def test_a_prompt_is_rendered_as_text_for_whoever_embeds_it(server: Any) -> None:
    one = sampler(server, SamplingSettings(), opening="prefix")
    assert one.render(TEXTS[2])[0] == "naïve 🙂 "
    assert one.render(CHATS[0])[0] == "What is the sum?\n\n"
    assert one.render(CHATS[1])[0] == "system: Be brief.\n\nuser: Why?\n\n"
    assert one.render(OPENED)[0] == "Add.\n\n```python\ndef add("
    assert json.loads(bytes(one.render(OPENED)[1])) == {"messages": list(OPENED.messages), "opening": OPENED.opening}
    assert one.tokenizer_fingerprint() is None


def test_token_ids_of_another_sampler_are_refused(server: Any) -> None:
    with pytest.raises(ValueError, match="render"):
        sampler(server, SamplingSettings(n=1)).sample([[5, 299, 7]], [[1]])


@pytest.mark.parametrize("changes", [{"choices_per_call": 0}, {"stop_limit": -1}, {"opening": "please"}])
def test_options_out_of_range_are_refused_by_name(server: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        sampler(server, SamplingSettings(), **changes)


def test_an_unknown_key_of_the_api_is_refused() -> None:
    with pytest.raises(ValueError, match="api_key"):
        OpenAISampler(None, SamplingSettings(), {"model": "m", "api_key": "sk"})


def test_identity_holds_what_decides_completions_and_no_key(server: Any, key: str) -> None:
    def identity(**changes: Any) -> str:
        return json.dumps(sampler(server, SamplingSettings(), **changes).identity())

    base = identity()
    decisive = {"model": "m", "opening": "prefix", "extra_body": {"a": 1}, "server": "s", "logprobs": False}
    for changes in ({name: value} for name, value in decisive.items()):
        assert identity(**changes) != base
    for changes in ({"concurrency": 99}, {"max_calls": 3}, {"choices_per_call": 1}, {"timeout": 1.0}):
        assert identity(**changes) == base
    assert key not in base
