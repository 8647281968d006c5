"""What `qprobe answer` does: one answer on the standard output, or a JSON line for every prompt of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qprobe.cli import composition, uses
from qprobe.probe.estimator import QProbe
from qprobe.serving.many import Answering
from qprobe.store import jsonl


def one(
    probe: str, prompt: str, overrides: Sequence[str], beta: float | None, seed: int | None, show_candidates: bool
) -> None:
    """Print the answer to a prompt.

    Args:
        probe: a folder, or a name on the hub.
        prompt: "-" reads it from the standard input.
        overrides: KEY=VALUE each, of the probe's card.
        beta, seed: as of `Policy` and `Policy.choose`.
        show_candidates: whether all are shown on stderr.

    Raises:
        RuntimeError: the answer is empty.
    """
    prompt = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError("The prompt is empty: give a text, or - and a text on the standard input.")
    choice = composition.policy(QProbe.from_pretrained(probe), overrides, beta).choose(prompt, seed)
    if show_candidates:
        for place, candidate in enumerate(choice.candidates):
            mark = "chosen" if place == choice.chosen else "      "
            print(f"{mark}  Q {candidate.score:+.3f}  probability {candidate.probability:.3f}", file=sys.stderr)
            print("\n".join(f"    | {line}" for line in candidate.text.splitlines()), file=sys.stderr)
    if not choice.answer.strip():
        empty = sum(not candidate.text.strip() for candidate in choice.candidates)
        raise RuntimeError(
            f"The chosen answer is empty, as are {empty} of its {len(choice.candidates)} candidates: ask again, with more "
            "candidates (--n) or a longer sampler.max_new_tokens; --show-candidates prints all."
        )
    print(choice.answer)


def many(
    probe: str,
    prompts: Path,
    overrides: Sequence[str],
    beta: float | None,
    seed: int | None,
    output: Path | None,
    candidates: bool,
) -> int:
    """Answer a file of prompts; what is wrong with a line is said on stderr.

    Args:
        prompts: JSON lines of prompt or messages; "-" is the standard input.
        output: the file that lines are added to; None is the standard output.
        candidates: whether a line holds all of them.
        probe, overrides, beta, seed: as of `one`.

    Returns: the exit status, 1 where a prompt has no answer.
    """
    rows, wrong = jsonl.sound_prompts(prompts, "prompts")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not rows:
        raise ValueError('There is no prompt: give one JSON object a line, such as {"prompt": "..."}.')
    loaded = QProbe.from_pretrained(probe)
    sampler = uses.used(loaded, overrides)["sampler"]
    policy = composition.policy(loaded, overrides, beta)
    at_once = sampler["batch_rows"] // sampler["n"]
    answering = Answering(policy, seed=seed, at_once=at_once, candidates=candidates)
    done = answering.answer(rows, output)
    for sentence in done.wrong:
        print(sentence, file=sys.stderr)
    failed = len(wrong) + len(done.wrong)
    said = [f"{done.answered} of {len(rows) + len(wrong)} prompts are answered"]
    said += [f"{done.empty} of these answers are empty"] if done.empty else []
    said += [f"{failed} have none, as said above"] if failed else []
    print("; ".join(said) + ".", file=sys.stderr)
    return 1 if failed else 0
