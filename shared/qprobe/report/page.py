"""A finished run as one HTML page: tables, notes, figures, and an explorer of its prompts.

One file without a network: style, script, figures and data are inside. Texts of models and data sets travel as JSON that
cannot end its own element, the script sets them as text and never as HTML, and the page's policy runs no script but that
one, which it knows by its hash.
"""

import base64
import hashlib
import html
import json
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from qprobe.probe.losses import find_loss
from qprobe.probe.ranking import Distinct, mixed_prompts
from qprobe.report import figures, highlighting, tables
from qprobe.report.explored import Explored, ScoredPrompt
from qprobe.report.results import Results

# What a page holds at most, so that a browser opens it at once: prompts of a split, characters of a completion and of a
# prompt, and bytes of all data, by estimate.
MOST_PROMPTS = 1000
MOST_CHARACTERS = 6000
MOST_BYTES = 8_000_000

_FIGURES = {
    "reward_against_k": "Expected reward against the number of candidates that a probe chooses from.",
    "reward_against_kl": "Expected reward against the distance from the base model (KL divergence), over temperatures.",
    "reward_against_prompts": "Expected reward against the number of training prompts.",
    "reward_against_layer": "Expected reward against the hidden layer that a probe reads.",
    "scores_per_prompt": "Each prompt's mean score against how often the base model solves it.",
    "certainty": "Is the chosen answer right as often as is said, and what do the surest choices earn?",
}


def to_html(run: str, splits: Sequence[Explored]) -> str:
    """A run as a whole document.

    Args:
        run: its name.
        splits: at least one.
    """
    style, script = _own("page.css"), _own("page.js")
    data, notes = _data(splits)
    titles = list(dict.fromkeys(split.results.title for split in splits))
    return string.Template(_own("page.html")).substitute(
        title=html.escape(f"{run}: {titles[0]}"),
        heading=html.escape(" / ".join(titles)),
        run=html.escape(run),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        results="\n".join(_section(split.results) for split in splits),
        left_out="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        # Nothing but "<" can end the element or begin a comment in it.
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    )


def _own(name: str) -> str:
    return resources.files("qprobe.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(results: Results) -> str:
    """Tables, notes and figures of a split."""
    drawn = "\n".join(
        f'<figure class="{name}"><img alt="{_FIGURES[name]}" src="data:{kind};base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{_FIGURES[name]}</figcaption></figure>"
        for name, kind, image in figures.images(results)
    )
    return (
        f'<section aria-label="{html.escape(results.pool)}">\n<h2>{html.escape(results.pool)}</h2>\n'
        f'{tables.to_html(results)}\n<div class="figures">{drawn}</div>\n</section>'
    )


def _data(splits: Sequence[Explored]) -> tuple[dict[str, Any], list[str]]:
    """What the script reads, and what was left out to keep the page small."""
    shown, notes = [_most_telling(split.prompts) for split in splits], []
    for split, kept in zip(splits, shown, strict=True):
        if len(kept) < len(split.prompts):
            counts = f"of {len(split.prompts):,} prompts {len(kept):,} are shown"
            notes.append(f"{split.results.pool}: {counts}, those with good and bad completions first.")
    ends = _ends_that_fit([prompt for prompts in shown for prompt in prompts])
    if ends is not None:
        notes.append(
            f"Of a prompt's candidates the page holds the {ends} with the highest and the {ends} with the lowest Q of every "
            "probe, and the best good one; the others are counted."
        )
    texts = _Texts()
    data = [_split(split.results.pool, prompts, ends, texts) for split, prompts in zip(splits, shown, strict=True)]
    if texts.cut:
        notes.append(f"Prompts and completions of more than {MOST_CHARACTERS:,} characters are cut.")
    return {"splits": data, "texts": texts.found}, notes


def _most_telling(prompts: list[ScoredPrompt]) -> list[ScoredPrompt]:
    """At most MOST_PROMPTS, those first where there is a choice, in their own order."""
    by_choice = sorted(range(len(prompts)), key=lambda number: (not np.ptp(prompts[number].rewards), number))
    return [prompts[number] for number in sorted(by_choice[:MOST_PROMPTS])]


def _ends_that_fit(prompts: list[ScoredPrompt]) -> int | None:
    """How many candidates from each end are shown; None: all."""
    for ends in (None, 50, 20, 10, 5, 3, 2):
        texts = {prompt.prompt for prompt in prompts}
        numbers = 0
        for prompt in prompts:
            kept = _kept(prompt, ends)
            texts |= {prompt.completions[row] for row in kept}
            numbers += len(kept) * (30 + 20 * len(prompt.q))
        # The colours of a text cost about as much as the text.
        if numbers + sum(2 * len(text[:MOST_CHARACTERS].encode()) for text in texts) <= MOST_BYTES:
            return ends
    return 1


def _kept(prompt: ScoredPrompt, ends: int | None) -> list[int]:
    """Rows of the candidates that are shown."""
    count = len(prompt.completions)
    if ends is None or count <= 2 * ends:
        return list(range(count))
    kept: set[int] = set()
    for q in prompt.q.values():
        order = np.argsort(-q, kind="stable")
        good = order[prompt.rewards[order] == prompt.rewards.max()]
        kept |= {*order[:ends].tolist(), *order[-ends:].tolist(), int(good[0])}
    return sorted(kept)


class _Texts:
    """Every text once: candidates are often alike."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self.cut = False
        self._places: dict[tuple[str, str], int] = {}

    def place(self, text: str, colours: str = "") -> int:
        if (text, colours) not in self._places:
            self._places[text, colours] = len(self.found)
            self.found.append([text, colours] if colours else [text])
        return self._places[text, colours]

    def shortened(self, text: str) -> str:
        if len(text) <= MOST_CHARACTERS:
            return text
        self.cut = True
        return f"{text[:MOST_CHARACTERS]}\n[{len(text) - MOST_CHARACTERS:,} more characters]"


def _split(name: str, prompts: list[ScoredPrompt], ends: int | None, texts: _Texts) -> dict[str, Any]:
    python = highlighting.look_like_python(text for prompt in prompts for text in prompt.completions)
    shown = [_prompt(prompt, _kept(prompt, ends), python, texts) for prompt in prompts]
    return {
        "name": name,
        "losses": [[loss, find_loss(loss).symbol] for loss in (prompts[0].q if prompts else ())],
        "binary": all(set(prompt.rewards.tolist()) <= {0.0, 1.0} for prompt in prompts),
        "prompts": [{**one, "mixed": mixed} for one, mixed in zip(shown, _mixed(prompts), strict=True)],
    }


def _mixed(prompts: list[ScoredPrompt]) -> list[bool]:
    """Which prompts have good and bad completions, as the evaluation counts them: over all, and copies once."""
    if not prompts:
        return []
    groups = np.repeat(np.arange(len(prompts)), [len(prompt.rewards) for prompt in prompts])
    distinct = Distinct.of([text for prompt in prompts for text in prompt.completions], groups)
    rewards = np.concatenate([prompt.rewards for prompt in prompts])
    return [bool(own) for own in mixed_prompts(distinct.mean(rewards), distinct.groups)]


def _prompt(prompt: ScoredPrompt, kept: Iterable[int], python: bool, texts: _Texts) -> dict[str, Any]:
    opened = highlighting.opens_fence(prompt.prompt)
    rows = list(kept)
    candidates = []
    for row in rows:
        text = texts.shortened(prompt.completions[row].strip("\n"))
        colours = highlighting.colours(text, python=python, opened=opened)
        verdict, detail = texts.place(prompt.verdicts[row]), texts.place(prompt.details[row])
        candidates.append([row, texts.place(text, colours), _short(prompt.rewards[row]), verdict, detail])
    return {
        "id": prompt.task_id,
        "prompt": texts.place(texts.shortened(prompt.prompt)),
        "count": len(prompt.completions),
        "base": _short(prompt.rewards.mean(dtype=float)),
        "candidates": candidates,
        "losses": [_scores(prompt, loss, rows) for loss in prompt.q],
    }


def _scores(prompt: ScoredPrompt, loss: str, kept: list[int]) -> dict[str, Any]:
    """A loss's view: of each candidate shown its score, probability and rank of all; what its pick and its policy earn."""
    q, probability = prompt.q[loss], prompt.probability[loss]
    order = np.argsort(-q, kind="stable")
    rank = np.argsort(order)
    return {
        "q": [_short(q[row]) for row in kept],
        "p": [_short(probability[row]) for row in kept],
        "rank": [int(rank[row]) for row in kept],
        "pick": _short(prompt.rewards[order[0]]),
        "earned": _short((probability * prompt.rewards).sum(dtype=float)),
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
