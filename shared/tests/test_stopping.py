"""A completion is cut before the first stop text that counts, and keeps the tokens of what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.models import prefix
from qprobe.models.language_model import ModelSpec
from qprobe.sampling import SamplingSettings
from qprobe.sampling.base import stop_position
from qprobe.sampling.hf import HFSampler


class ScriptedRun:
    """Stands in for PrefixRun: row r is certain of the tokens of script r, one after another."""

    shared = True
    tokens_per_pass = 512

    def __init__(self, language_model: models.LanguageModel, scripts: Sequence[Sequence[int]]) -> None:
        self.language_model = language_model
        self.scripts = scripts
        self.rows = list(range(len(scripts)))
        self.step = 0

    def scores(self) -> Tensor:
        logits = torch.zeros(len(self.rows), 300)
        for place, row in enumerate(self.rows):
            assert self.step < len(self.scripts[row]), f"row {row} did not stop at the end of its script"
            logits[place, self.scripts[row][self.step]] = 5.0
        return logits

    def prefill(self, _prompts: Any, _layers: Any, logits: bool) -> prefix.Prefix:
        assert logits
        return prefix.Prefix(None, torch.empty(0), torch.empty(0), self.scores(), {})

    def continuation(self, _prefix: Any, _owner: Any) -> ScriptedRun:
        return self

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[place] for place in rows.tolist()]

    def extend(self, ids: Tensor, _layers: Any, logits: bool) -> prefix.Extension:
        assert logits
        assert ids[:, 0].tolist() == [self.scripts[row][self.step] for row in self.rows]
        self.step += 1
        return prefix.Extension(self.scores(), {})


# A script's token has logit 5, the other 299 have 0.
SCRIPTED_LOGPROB = 5 - math.log(math.exp(5) + 299)


@pytest.fixture
def complete(tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int, str]]]:
    """Let a sampler write scripts, each a list of texts: tokens, or characters that are written byte by byte.

    A script has to hold all that is asked of it: a row that stops too late runs out of it.
    Returns for every script the text, the number of tokens kept and the finish reason; the tokens themselves and the
    log-probability are checked on the way.
    """
    tokenizer = models.load_tokenizer(tiny_model)

    def token_ids(parts: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            whole = tokenizer.encode_completion(part)
            assert len(whole) == 1 or len(part) == 1, f"{part!r} is no single token"
            ids += whole
        return ids

    def run(
        *scripts: Sequence[str], stop: tuple[str, ...] = (), max_new_tokens: int = 30, prompt: str = "def f"
    ) -> list[tuple[str, int, str]]:
        ids = [token_ids(script) for script in scripts]
        monkeypatch.setattr(
            "qprobe.models.memory.PrefixRun", lambda language_model, copied: ScriptedRun(language_model, ids)
        )
        sampler = HFSampler(
            tiny_model, SamplingSettings(n=1, temperature=0.0, stop=stop, max_new_tokens=max_new_tokens)
        )
        prompts = [tokenizer.encode_prompt(prompt, templated=False)] * len(scripts)
        found: list[tuple[str, int, str]] = []
        sampled = sampler.sample(prompts, [[0]] * len(scripts))
        for script, (completion,), (drawn,) in zip(ids, sampled, sampler.drawn(), strict=True):
            kept = completion.token_ids
            assert kept is not None
            assert kept == script[: len(kept)]
            # All that was drawn counts: the kept tokens, and those of the end (a stop text, or the end of sequence).
            assert [*script, 1][: len(drawn.tokens)] == list(drawn.tokens)
            assert len(drawn.tokens) >= len(kept)
            assert completion.logprob == pytest.approx(len(drawn.tokens) * SCRIPTED_LOGPROB)
            found.append((completion.text, len(kept), completion.finish_reason))
        return found

    return run


END = "<|eos|>"
Complete = Callable[..., list[tuple[str, int, str]]]


# What is written, with which stop texts or other changes, and what is kept of it.
CASES: dict[str, tuple[list[list[str]], dict[str, Any], list[tuple[str, int, str]]]] = {
    "the end token": ([["a", "b", END], ["c", END]], {}, [("ab", 2, "stop"), ("c", 1, "stop")]),
    "the longest length": ([[*"abc"], ["c", END]], {"max_new_tokens": 3}, [("abc", 3, "length"), ("c", 1, "stop")]),
    "a stop text over several tokens": ([[*"abSTOP"]], {"stop": ("STOP",)}, [("ab", 2, "stop")]),
    "the first of two that one token completes": ([["a", "end"]], {"stop": ("nd", "e")}, [("a", 1, "stop")]),
    "that counts": ([["a", "end"]], {"stop": ("en", "aend")}, [("a", 1, "stop")]),
    "a token that straddles the cut": ([["a", "er", "!"]], {"stop": ("r!",)}, [("ae", 2, "stop")]),
    "within one token": ([["a", "end"]], {"stop": ("nd",)}, [("ae", 2, "stop")]),
    "where a token begins": ([["a", "end"]], {"stop": ("en",)}, [("a", 1, "stop")]),
    "each row at its own time": (
        [[*"abcdef"], [*"a!"], [*"abc", END], [*"abcd!"]],
        {"stop": ("!",), "max_new_tokens": 6},
        [("abcdef", 6, "length"), ("a", 1, "stop"), ("abc", 3, "stop"), ("abcd", 4, "stop")],
    ),
    # A stop text behind white space alone does not count.
    "behind white space": ([[*"\n\n#a#"]], {"stop": ("#",)}, [("\n\n#a", 4, "stop")]),
    "at the beginning": ([[*"#a#"]], {"stop": ("#",)}, [("#a", 2, "stop")]),
    "between white space": ([[*"\n#\n#"]], {"stop": ("#",)}, [("\n#\n", 3, "stop")]),
    "twice": ([[*" ##"]], {"stop": ("#",)}, [(" #", 2, "stop")]),
    "in leading white space": ([[*"\n\nab\n\n"]], {"stop": ("\n\n",)}, [("\n\nab", 4, "stop")]),
    "partly in the prompt": ([[*"fab", END]], {"stop": ("ff", "def"), "prompt": "def f"}, [("fab", 3, "stop")]),
    # Each byte is a token: é has 2, € has 3, 😀 has 4.
    "characters of several tokens": ([[*"é€😀", END]], {}, [("é€😀", 9, "stop")]),
    "half a character": ([[*"a😀", END]], {"max_new_tokens": 3}, [("a\N{REPLACEMENT CHARACTER}", 3, "length")]),
    # It is looked for in the last tokens only, and must be found far behind the prompt and any character.
    "far behind": (
        [[*"x😀" * 4, *"ab€!?"]],
        {"stop": ("€!?",), "max_new_tokens": 60},
        [("x😀" * 4 + "ab", 22, "stop")],
    ),
    "leading white space": ([[" ", " the", "\n", END]], {"prompt": "def"}, [("  the\n", 3, "stop")]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_completion_ends_and_is_cut_where_it_should(complete: Complete, name: str) -> None:
    scripts, changes, kept = CASES[name]
    assert complete(*scripts, **changes) == kept


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_before_the_cut_keeps_all_its_tokens(complete: Complete, character: str) -> None:
    size = len(character.encode())
    assert complete([*"a", character, *"STOP"], stop=("STOP",)) == [("a" + character, 1 + size, "stop")]
    assert complete(["a", "b", character], stop=(character,)) == [("ab", 2, "stop")]
    assert complete([*"a", character, character], stop=(character * 2,)) == [("a", 1, "stop")]


@pytest.mark.parametrize(
    ("text", "stop", "position"),
    [
        ("abc", (), 3),
        ("abc", ("c", "b"), 1),
        ("abab", ("ab",), 2),
        ("  ab", ("a",), 4),
        ("  ab", ("b",), 3),
        ("   ", (" ",), 3),
        ("", ("a",), 0),
    ],
)
def test_the_position_of_the_first_stop_text(text: str, stop: tuple[str, ...], position: int) -> None:
    assert stop_position(text, stop) == position
