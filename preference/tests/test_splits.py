"""Pairs in the core's store: with two candidates and argmax the core's reward is the pair accuracy."""

import numpy as np

from qprobe.probe.metrics import best_of_k
from qprobe.run.pools import RewardBatch
from qprobe_preference.pairs import Found, PairSet
from qprobe_preference.pairs.base import collect
from qprobe_preference.splits import PairLabel, pairs_split, prompts_split

TALK = ({"role": "user", "content": "Why?"},)


def pairs() -> PairSet:
    return collect("set", [Found(TALK, "a", "b"), Found("plain", "c", "d"), Found(TALK, "a", "e")], {"format": "trl"})


def test_every_pair_is_a_prompt_with_two_recorded_answers() -> None:
    split = pairs_split(pairs(), "chat")
    assert split.name == "set"
    assert [p.task_id for p in split.prompts] == ["000000.000", "000000.001", "000001.000"]
    assert split.recorded == {"000000.000": ["a", "b"], "000000.001": ["a", "e"], "000001.000": ["c", "d"]}
    assert split.clusters is not None
    assert split.clusters["000000.000"] == split.clusters["000000.001"] != split.clusters["000001.000"]
    assert split.source["pairs"]["pairs"] == 3


def test_the_style_is_part_of_the_source_and_of_the_answers() -> None:
    chat, text = pairs_split(pairs(), "chat"), pairs_split(pairs(), "text")
    assert chat.source != text.source
    assert text.recorded is not None
    assert (text.recorded["000000.000"], text.recorded["000001.000"]) == ([" a", " b"], ["c", "d"])


def test_the_label_is_the_place_and_argmax_earns_the_pair_accuracy() -> None:
    keys = ("x", "y", "z")
    batch = RewardBatch(keys, [(key, sample, "") for key in keys for sample in range(2)])
    ((same, rows),) = PairLabel()([batch])
    assert same is batch
    assert [row.verdict for row in rows] == ["chosen", "rejected"] * 3
    scores = np.array([[2.0, 1.0], [0.5, 0.5], [0.0, 3.0]])  # right, a tie, wrong
    rewards = np.array([row.reward for row in rows]).reshape(3, 2)
    earned = [float(best_of_k(s, r, [2])[0]) for s, r in zip(scores, rewards, strict=True)]
    assert earned == [1.0, 0.5, 0.0]


def test_a_policy_is_asked_every_prompt_once() -> None:
    split = prompts_split(pairs(), "chat")
    assert [p.task_id for p in split.prompts] == ["000000.000", "000001.000"]
    assert split.recorded is None
    assert split.reward is None
