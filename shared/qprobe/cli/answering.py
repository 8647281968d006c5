"""What `qprobe answer` does: one answer on the standard output, or a JSON line for every prompt of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qprobe.cli import composition, uses
from qprobe.models.loading import collector_at_rest
from qprobe.probe.estimator import QProbe
from qprobe.serving.many import Answering
from qprobe.store import jsonl


@dataclass(frozen=True)
class Asked:
    """How answers are asked for.

    Args:
        probe: a folder, or a name on the hub.
        overrides: KEY=VALUE each, of the probe's card.
        beta, seed: as of `Policy` and `Policy.choose`.
        at_least: probability of being right, in [0, 1], below which there is no answer; None takes every one.
    """

    probe: str
    overrides: Sequence[str]
    beta: float | None = None
    seed: int | None = None
    at_least: float | None = None

    def loaded(self) -> QProbe:
        """The probe.

        Raises:
            ValueError: `at_least` is no probability, or the probe knows of none.
        """
        probe = QProbe.from_pretrained(self.probe)
        if self.at_least is not None and not 0 <= self.at_least <= 1:
            raise ValueError(f"--at-least is {self.at_least:g}: a probability in [0, 1].")
        if self.at_least is not None and probe.calibration_ is None:
            raise ValueError(
                "--at-least asks how likely an answer is right, which this probe does not say: probes of the loss auto do, where "
                "rewards lie in [0, 1] and ten choices at least were right and ten wrong."
            )
        return probe


def one(asked: Asked, prompt: str, show_candidates: bool) -> None:
    """Print the answer to a prompt.

    Args:
        prompt: "-" reads it from the standard input.
        show_candidates: whether all are shown on stderr.

    Raises:
        RuntimeError: the answer is empty, or less likely to be right than was asked for.
    """
    prompt = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError("The prompt is empty: give a text, or - and a text on the standard input.")
    with collector_at_rest():  # most of the time it is imports that are waited for
        choice = composition.policy(asked.loaded(), asked.overrides, asked.beta).choose(prompt, asked.seed)
    if show_candidates:
        for place, candidate in enumerate(choice.candidates):
            mark = "chosen" if place == choice.chosen else "      "
            right = "" if candidate.right is None else f"  right {candidate.right:.3f}"
            print(f"{mark}  Q {candidate.score:+.3f}  probability {candidate.probability:.3f}{right}", file=sys.stderr)
            print("\n".join(f"    | {line}" for line in candidate.text.splitlines()), file=sys.stderr)
    if not choice.answer.strip():
        empty = sum(not candidate.text.strip() for candidate in choice.candidates)
        raise RuntimeError(
            f"The chosen answer is empty, as are {empty} of its {len(choice.candidates)} candidates: ask again, with more "
            "candidates (--n) or a longer sampler.max_new_tokens; --show-candidates prints all."
        )
    if asked.at_least is not None and choice.right is not None and choice.right < asked.at_least:
        raise RuntimeError(
            f"None of these: the chosen answer is right with probability {choice.right:.3f}, less than --at-least "
            f"{asked.at_least:g}; --show-candidates prints all."
        )
    print(choice.answer)


def many(asked: Asked, prompts: Path, output: Path | None, candidates: bool) -> int:
    """Answer a file of prompts; what is wrong with a line is said on stderr.

    Args:
        prompts: JSON lines of prompt or messages; "-" is the standard input.
        output: the file that lines are added to; None is the standard output.
        candidates: whether a line holds all of them.

    Returns: the exit status, 1 where a prompt has no answer.
    """
    rows, wrong = jsonl.sound_prompts(prompts, "prompts")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not rows:
        raise ValueError('There is no prompt: give one JSON object a line, such as {"prompt": "..."}.')
    loaded = asked.loaded()
    sampler = uses.used(loaded, asked.overrides)["sampler"]
    policy = composition.policy(loaded, asked.overrides, asked.beta)
    at_once = sampler["batch_rows"] // sampler["n"]
    answering = Answering(policy, seed=asked.seed, at_once=at_once, candidates=candidates, at_least=asked.at_least)
    done = answering.answer(rows, output)
    for sentence in done.wrong:
        print(sentence, file=sys.stderr)
    failed = len(wrong) + len(done.wrong)
    said = [f"{done.answered} of {len(rows) + len(wrong)} prompts are answered"]
    said += [f"{done.unsure} of these say null: their answer is right with less than --at-least"] if done.unsure else []
    said += [f"{done.empty} of these answers are empty"] if done.empty else []
    said += [f"{failed} have none, as said above"] if failed else []
    print("; ".join(said) + ".", file=sys.stderr)
    return 1 if failed else 0
