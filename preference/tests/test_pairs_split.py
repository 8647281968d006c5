"""No prompt and no post falls on both sides; shares are nested; shared prompts leave the training pairs and are counted."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe_preference.pairs import Found, PairSet, hh, oasst, split
from qprobe_preference.pairs.base import collect, prompt_key
from qprobe_preference.pairs.rows import Row


def pairs_of(prompts: list[tuple[int, int]]) -> PairSet:
    """A pair for every (prompt, post)."""
    found = [Found(f"prompt {p}", "yes", f"no {n}", cluster=f"post {post}") for n, (p, post) in enumerate(prompts)]
    return collect("set", found, {})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30), st.integers(0, 5))
def test_no_prompt_and_no_post_falls_on_both_sides(prompts: list[tuple[int, int]], seed: int) -> None:
    pairs = pairs_of(prompts)
    clusters = {p.cluster for p in pairs.pairs}
    if len(clusters) < 3:
        return
    train, test = split.train_and_test(pairs, 0.4, seed)
    assert sorted(p.pair_id for p in [*train.pairs, *test.pairs]) == [p.pair_id for p in pairs.pairs]
    for side in (lambda p: p.cluster, lambda p: p.prompt, lambda p: prompts[int(p.rejected[3:])][1]):
        assert not {side(p) for p in train.pairs} & {side(p) for p in test.pairs}
    assert len({p.cluster for p in test.pairs}) == max(1, round(0.4 * len(clusters)))
    assert (train.name, test.name) == ("set-train", "set-test")


def test_the_cut_is_by_lot_and_the_same_seed_cuts_alike() -> None:
    pairs = pairs_of([(n, n) for n in range(40)])
    cuts = [{p.pair_id for p in split.train_and_test(pairs, 0.5, seed)[1].pairs} for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_a_share_is_of_prompts_and_smaller_shares_are_part_of_larger_ones() -> None:
    pairs = pairs_of([(n % 20, n % 20) for n in range(60)])
    parts = [{p.pair_id for p in split.share_of(pairs, share).pairs} for share in (0.05, 0.5, 1.0)]
    assert [len(part) for part in parts] == [3, 30, 60]
    assert parts[0] < parts[1] < parts[2]


def test_shared_prompts_leave_the_training_pairs_with_their_clusters_and_are_counted() -> None:
    training = pairs_of([(0, 0), (1, 0), (2, 2), (3, 3), (3, 3)])
    test = collect("test", [Found("PROMPT 1", "a", "b"), Found("x", "a", "b", cluster="post 2")], {})
    kept = split.without_shared(training, test)
    assert [p.prompt for p in kept.pairs] == ["prompt 3", "prompt 3"]
    assert kept.dropped == {"shared_with_test": 3}
    assert not {prompt_key(p.prompt) for p in kept.pairs} & {prompt_key(p.prompt) for p in test.pairs}


def test_sides_without_a_pair_are_sentences() -> None:
    with pytest.raises(ValueError, match="test_share"):
        split.train_and_test(pairs_of([(0, 0), (0, 0)]), 0.5)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split.without_shared(pairs_of([(0, 0)]), pairs_of([(0, 0)]))
    with pytest.raises(ValueError, match="train_share"):
        split.share_of(pairs_of([(0, 0)]), 1.5)


def tree(number: int) -> list[dict[str, Any]]:
    """A conversation of OpenAssistant: two ranked answers to its first message, and two to what was said after each."""

    def message(own: str, parent: str | None, role: str, rank: int | None = None) -> dict[str, Any]:
        key, above = f"{number}.{own}", parent and f"{number}.{parent}"
        text = {"message_id": key, "parent_id": above, "text": f"text of {key}", "role": role, "rank": rank}
        return text | {"lang": "en", "deleted": False}

    found = [message("q", None, "prompter")]
    for rank, answer in enumerate("ab"):
        found += [message(answer, "q", "assistant", rank), message(f"{answer}?", answer, "prompter")]
        found += [message(f"{answer}{rank}", f"{answer}?", "assistant", rank) for rank in range(2)]
    return found


def test_a_conversation_tree_never_lies_on_both_sides() -> None:
    rows = [Row(f"row {at}", values) for at, values in enumerate(m for n in range(40) for m in tree(n))]
    pairs = collect("oasst", oasst.pairs(rows), {})
    assert len(pairs.pairs) == 3 * 40  # at the first message, and on each of its branches
    train, test = split.train_and_test(pairs, 0.3, seed=0)
    sides = [{re.search(r"(\d+)\.", pair.chosen)[1] for pair in side.pairs} for side in (train, test)]  # type: ignore[index]
    assert [len(side) for side in sides] == [28, 12]
    assert not sides[0] & sides[1]


def test_a_dialogue_never_lies_on_both_sides_with_its_later_turns() -> None:
    """HH-RLHF has a row for every turn of a dialogue."""
    rows = []
    for number in range(30):
        start = f"\n\nHuman: Question {number}?\n\nAssistant:"
        longer = f"{start} Well.\n\nHuman: And then?\n\nAssistant:"
        rows += [Row("", {"chosen": f"{text} yes", "rejected": f"{text} no"}) for text in (start, longer)]
    pairs = collect("hh", hh.pairs(rows), {})
    assert pairs.summary() == "60 pairs of 60 prompts, which make 30 clusters. None was dropped."
    train, test = split.train_and_test(pairs, 0.5, seed=0)
    sides = [{pair.prompt[0]["content"] for pair in side.pairs} for side in (train, test)]  # type: ignore[index]
    assert [len(side) for side in sides] == [15, 15]
    assert not sides[0] & sides[1]


def test_a_limit_ends_reading_and_what_comes_after_is_not_counted() -> None:
    read: list[int] = []

    def found() -> Iterator[Found | str]:
        for number in range(100):
            read.append(number)
            yield "empty" if number % 2 else Found(f"prompt {number}", "a", "b")

    pairs = collect("set", found(), {}, limit=5)
    assert len(pairs.pairs) == 5
    assert pairs.dropped == {"empty": 4}  # of numbers 0 to 8
    assert read == list(range(9))
