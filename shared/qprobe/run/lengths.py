"""Prompts and completions that are longer than a model's context: found before any work, named by line and task id.

What is done about them is the user's choice (`too_long`): stop, leave them out and count them, or cut prompts from the left,
whole messages first. Texts that are short by any count are not tokenised, so a check of ordinary files costs next to nothing.

Where it stops: an API keeps its tokenizer and its context to itself, so texts for an API are only refused by the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.embedding import Embedder
from qprobe.embedding.local import LocalEmbedder
from qprobe.prompts import Prompt
from qprobe.sampling import Sampler
from qprobe.sampling.local import LocalSampler
from qprobe.store.jsonl import Candidates, PromptRow

STOP, LEAVE_OUT, CUT_PROMPT = "stop", "leave_out", "cut_prompt"
TOO_LONG = (STOP, LEAVE_OUT, CUT_PROMPT)
SHOWN = 5  # of those that are too long, in a sentence
# Tokens of a chat template beside the texts, at most: of the whole, and of a message.
OF_TEMPLATE, OF_MESSAGE = 512, 32

Text = str | list[dict[str, str]]


@dataclass(frozen=True)
class Room:
    """How much a model reads at once, and how long texts are to it.

    Args:
        name: of the model.
        limit: tokens of a prompt with its completion; None where it is not known here.
        prompt: tokens of a prompt.
        completion: tokens of a completion that is there already.
        longest: tokens of the longest completion that is drawn, 0 where they are there already.
    """

    name: str
    limit: int | None
    prompt: Callable[[Prompt], int]
    completion: Callable[[str], int]
    longest: int = 0

    @classmethod
    def of(cls, sampler: Sampler, embedder: Embedder, drawn: bool) -> Room:
        """Of what draws, or where completions are there already of what embeds.

        Raises:
            OSError: the model's configuration cannot be had.
        """
        if drawn and isinstance(sampler, LocalSampler):
            longest = sampler.settings.max_new_tokens
            name = sampler.model.name
            return cls(name, context_of(sampler), lambda prompt: len(sampler.render(prompt)[1]), len, longest)

        def prompt_tokens(prompt: Prompt) -> int:
            templated = prompt.text is None and sampler.tokenizer_fingerprint() is not None
            return len(embedder.encode_prompt(sampler.render(prompt)[0], templated))

        def completion_tokens(text: str) -> int:
            return len(embedder.encode_completion(text))

        name = str(getattr(getattr(embedder, "model", None), "name", embedder.folder_name()))
        longest = sampler.settings.max_new_tokens if drawn else 0
        return cls(name, context_of(embedder), prompt_tokens, completion_tokens, longest)

    def over(self, prompt: Prompt, completions: Sequence[str]) -> list[tuple[int, int, int]]:
        """The completions that do not fit behind their prompt: place, tokens of the prompt, tokens of the completion. Where
        completions are still to be drawn, the longest one stands for all."""
        if self.limit is None:
            return []
        texts = [prompt.text or "", prompt.opening, *(message["content"] for message in prompt.messages)]
        most = sum(len(text.encode()) for text in texts) + OF_TEMPLATE + OF_MESSAGE * len(prompt.messages)
        # A token is a byte at least.
        if most + max([self.longest, *(len(text.encode()) for text in completions)]) <= self.limit:
            return []
        own = self.prompt(prompt)
        lengths = [self.longest] if self.longest else [self.completion(text) for text in completions]
        return [(place, own, length) for place, length in enumerate(lengths) if own + length > self.limit]


def context_of(back_end: object) -> int | None:
    """Tokens that a back end's model reads at once; None where that is not known here."""
    if not isinstance(back_end, LocalSampler | LocalEmbedder):
        return None
    engine: Any = getattr(back_end, "engine", None)
    if engine is not None:
        return None if (limit := engine.context_length(back_end.model)) is None else int(limit)
    config = models.skeleton(back_end.model).config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


@dataclass(frozen=True)
class Fitted:
    """What is left of a user's file, and what a user should know of it."""

    rows: list[PromptRow]
    notes: list[str]


def fit_prompts(path: Path, rows: Sequence[PromptRow], style: str, room: Room, too_long: str) -> Fitted:
    """The prompts whose longest completion has room.

    Args:
        too_long: one of TOO_LONG.

    Raises:
        ValueError: prompts that are too long, under `stop` or beyond all cutting; or none is left.
    """
    over = {row.task_id: found[0] for row in rows if (found := room.over(row.as_prompt(style), []))}
    if not over:
        return Fitted(list(rows), [])
    named = [_named(row.line, row.task_id, over[row.task_id]) for row in rows if row.task_id in over]
    longest = f"with a completion of sampler.max_new_tokens={room.longest}"
    said = f"{path}: {_listed(named, len(rows), 'prompts', longest, room)}"
    if too_long == LEAVE_OUT and len(over) < len(rows):
        return Fitted([row for row in rows if row.task_id not in over], [f"{said}. They are left out."])
    if too_long == CUT_PROMPT:
        cut = [_cut(row, style, room, []) if row.task_id in over else row for row in rows]
        if None not in cut:
            return Fitted([row for row in cut if row], [f"{said}. They are cut from the left."])
    raise ValueError(f"{said}. {_advice(too_long, 'shorten them, or lower sampler.max_new_tokens')}")


def fit_candidates(path: Path, found: Candidates, style: str, room: Room, too_long: str) -> Candidates:
    """The candidates that have room behind their prompt.

    Raises:
        ValueError: as of `fit_prompts`.
    """
    over = {row.task_id: room.over(row.as_prompt(style), found.completions[row.task_id]) for row in found.prompts}
    named = [
        _named(found.lines[key][place], key, (place, own, length))
        for key, of_prompt in over.items()
        for place, own, length in of_prompt
    ]
    if not named:
        return found
    count = sum(map(len, found.completions.values()))
    said = f"{path}: {_listed(named, count, 'candidates', 'with their prompt', room)}"
    if too_long == LEAVE_OUT:
        gone = {key: {place for place, _, _ in of_prompt} for key, of_prompt in over.items()}

        def rest(of: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
            left = {key: [v for place, v in enumerate(values) if place not in gone[key]] for key, values in of.items()}
            return {key: values for key, values in left.items() if len(values) > 1}

        completions = rest(found.completions)
        alone = len(found.prompts) - len(completions)
        if completions:
            note = f"{said}. They are left out" + (
                f", and with them {alone} prompts that have fewer than two candidates then." if alone else "."
            )
            return Candidates(
                [row for row in found.prompts if row.task_id in completions],
                completions,
                rest(found.rewards),
                [*found.notes, note],
                rest(found.lines),
                found.places,
            )
    if too_long == CUT_PROMPT:
        rows = [
            _cut(row, style, room, found.completions[row.task_id]) if over[row.task_id] else row
            for row in found.prompts
        ]
        if None not in rows:
            note = f"{said}. {sum(map(bool, over.values()))} prompts are cut from the left."
            return dataclasses.replace(found, prompts=[row for row in rows if row], notes=[*found.notes, note])
    raise ValueError(f"{said}. {_advice(too_long, 'shorten or remove them')}")


def check_choice(too_long: str) -> None:
    """Raise ValueError where `too_long` is none of the choices."""
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long is {too_long!r}: choose from {', '.join(TOO_LONG)}.")


def fault(name: str, prompts: Sequence[Prompt], recorded: Mapping[str, Sequence[str]] | None, room: Room) -> str | None:
    """A sentence on the prompts of a split that do not fit; None where all do.

    Args:
        name: of the split.
        recorded: completions by task id; None: they are drawn.
    """
    over = [
        (prompt.task_id, longest)
        for prompt in prompts
        if (found := room.over(prompt, recorded[prompt.task_id] if recorded else []))
        for longest in [max(found, key=lambda one: one[2])]
    ]
    if not over:
        return None
    named = [_named(None, key, one) for key, one in over]
    with_ = f"with sampler.max_new_tokens={room.longest}" if room.longest else "with their longest completion"
    return (
        f"{name}: {_listed(named, len(prompts), 'prompts', with_, room)}. Nothing has been done yet: use a model of longer "
        "context, or shorter prompts and completions."
    )


def _named(line: int | None, task_id: str, found: tuple[int, int, int]) -> str:
    where = task_id if line is None else f"line {line}, {task_id}"
    return f"{where} ({found[1]:,} + {found[2]:,} tokens)"


def _listed(named: Sequence[str], count: int, what: str, with_: str, room: Room) -> str:
    more = "" if len(named) <= SHOWN else "; ..."
    return (
        f"{len(named)} of {count} {what} {'exceeds' if len(named) == 1 else 'exceed'}, {with_}, the context of "
        f"{room.limit:,} tokens of {room.name}: {'; '.join(named[:SHOWN])}{more}"
    )


def _advice(too_long: str, otherwise: str) -> str:
    if too_long == LEAVE_OUT:
        return f"Without them nothing is left: {otherwise}, or use a model of longer context."
    if too_long == CUT_PROMPT:
        return f"Some have no room even behind the end of their prompt: {otherwise}, or set too_long=leave_out."
    return (
        f"Nothing has been done yet: {otherwise}, use a model of longer context, or set too_long=leave_out (leaves them out and "
        "counts them) or too_long=cut_prompt (cuts the beginning of their prompts)."
    )


def _cut(row: PromptRow, style: str, room: Room, completions: Sequence[str]) -> PromptRow | None:
    """A prompt without its beginning, as long as it may be; None where no end of it fits."""

    def fits(prompt: Text) -> bool:
        return not room.over(dataclasses.replace(row, prompt=prompt).as_prompt(style), completions)

    shortest: Text = row.prompt
    for shortest in _shorter(row.prompt):
        if fits(shortest):
            return dataclasses.replace(row, prompt=shortest)
    text = shortest[-1]["content"] if isinstance(shortest, list) else shortest

    def ending(start: int) -> Text:
        if not isinstance(shortest, list):
            return text[start:]
        return [*shortest[:-1], {**shortest[-1], "content": text[start:]}]

    # Fewer characters are fewer tokens, but for a few where a word is cut: so the last step goes character by character.
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(ending(middle)) else (middle + 1, high)
    while low < len(text) and not (text[low:].strip() and fits(ending(low))):
        low += 1
    return dataclasses.replace(row, prompt=ending(low)) if low < len(text) else None


def _shorter(prompt: Text) -> Iterator[Text]:
    """A conversation with fewer and fewer messages, each time from a user on; a system message stays."""
    if isinstance(prompt, str):
        return
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    for start in range(len(system) + 1, len(prompt)):
        if prompt[start]["role"] == "user":
            yield [*system, *prompt[start:]]
