"""What is no pair is dropped and counted; pairs of one prompt stand together, clusters that share a prompt are one."""

from typing import Any

import pytest

from qprobe.prompts import Prompt
from qprobe_preference.pairs.base import Found, collect, prompt_key

ASK = ({"role": "user", "content": "Why?"},)
TALK = ({"role": "system", "content": "Be kind."}, *ASK)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Found(ASK, "a", "  "), "empty"),
        (Found(" \n", "a", "b"), "empty"),
        (Found(({"role": "user", "content": ""},), "a", "b"), "empty"),
        (Found((), "a", "b"), "empty"),
        (Found(ASK, "same", " same\n"), "identical"),
        (Found(ASK, "a", None), "not_text"),
        (Found(3, "a", "b"), "not_text"),
        (Found(ASK, "a", "half of a character: \ud83d"), "not_text"),
        (Found(({"role": "user", "content": [{"type": "image"}]},), "a", "b"), "not_text"),
        (Found(({"role": "user", "text": "no content"},), "a", "b"), "not_text"),
        (Found(ASK, "good", "bad"), "duplicate"),
        ("prompts_differ", "prompts_differ"),
    ],
)
def test_what_is_of_no_use_is_counted_by_its_reason(found: Any, reason: str) -> None:
    pairs = collect("set", [Found(ASK, "good", "bad"), found], {})
    assert [(p.chosen, p.rejected) for p in pairs.pairs] == [("good", "bad")]
    assert pairs.dropped == {reason: 1}
    assert pairs.summary().endswith(f" Dropped: {reason} 1.")


def test_a_set_without_a_pair_is_a_sentence_with_the_counts() -> None:
    with pytest.raises(ValueError, match="low_ratio 2"):
        collect("set", ["low_ratio", "low_ratio"], {})


def test_pairs_of_one_prompt_stand_next_to_each_other_in_the_order_of_their_ids() -> None:
    found = [Found(f"prompt {number}", "yes", f"no {answer}") for answer in range(3) for number in range(12)]
    pairs = collect("set", found, {}).pairs
    assert len({p.pair_id for p in pairs}) == 36
    assert pairs == sorted(pairs, key=lambda p: p.pair_id)
    assert [p.prompt for p in pairs] == [f"prompt {number}" for number in range(12) for _ in range(3)]


def test_clusters_are_prompts_but_for_case_and_space_and_join_where_they_share_one() -> None:
    found = [
        Found("Why  is\nit?", "a", "b"),
        Found("why is it?", "c", "d"),
        Found("How?", "a", "b"),
        Found("p", "a", "b", cluster="post 1"),
        Found("q", "a", "b", cluster="post 1"),
        Found("q", "c", "d", cluster="post 2"),
        Found("r", "a", "b", cluster="post 2"),
        Found("s", "a", "b", cluster="post 3"),
    ]
    by_prompt = {str(p.prompt): p.cluster for p in collect("set", found, {}).pairs}
    assert by_prompt["Why  is\nit?"] == by_prompt["why is it?"] != by_prompt["How?"]
    assert by_prompt["p"] == by_prompt["q"] == by_prompt["r"] != by_prompt["s"]


def test_who_speaks_belongs_to_a_prompt() -> None:
    assert prompt_key(ASK) != prompt_key(({"role": "assistant", "content": "Why?"},))
    assert prompt_key(ASK) != prompt_key(ASK, "Because")


def test_a_conversation_is_put_as_messages_or_as_a_transcript_and_plain_text_stays() -> None:
    pair = collect("set", [Found(TALK, "Good.", "Bad.")], {}).pairs[0]
    assert pair.as_prompt("chat") == Prompt("000000.000", messages=TALK)
    assert pair.answers("chat") == ["Good.", "Bad."]
    assert pair.as_prompt("text").text == "\n\nSystem: Be kind.\n\nHuman: Why?\n\nAssistant:"
    assert pair.answers("text") == [" Good.", " Bad."]
    plain = collect("set", [Found("The sky is", " blue", " green")], {}).pairs[0]
    assert plain.as_prompt("chat").text == plain.as_prompt("text").text == "The sky is"
    assert plain.answers("text") == [" blue", " green"]


def test_an_opening_stands_between_prompt_and_answer_in_both_styles() -> None:
    pair = collect("set", [Found(ASK, " x", " y", opening="def f():")], {}).pairs[0]
    assert pair.as_prompt("chat") == Prompt("000000.000", messages=ASK, opening="def f():")
    assert pair.as_prompt("text").text == "\n\nHuman: Why?\n\nAssistant: def f():"
    assert pair.answers("text") == [" x", " y"]


def test_the_identity_knows_every_answer_and_what_was_dropped() -> None:
    one = collect("set", [Found(ASK, "a", "b")], {"format": "hh"})
    assert one.identity() == collect("set", [Found(ASK, "a", "b")], {"format": "hh"}).identity()
    others = [
        collect("set", [Found(ASK, "b", "a")], {"format": "hh"}),
        collect("set", [Found(ASK, "a", "b"), "empty"], {"format": "hh"}),
        collect("set", [Found(ASK, "a", "b")], {"format": "trl"}),
    ]
    assert all(other.identity() != one.identity() for other in others)
