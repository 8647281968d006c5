"""Prompts to text and text to tokens, by the rules of the run folder: see ARCHITECTURE.md, contracts."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qprobe.prompts import Prompt

# A few tokens of context are enough to make every tokenizer keep the white space that begins a completion.
_DECODING_CONTEXT = 4


class Tokenizer:
    """Rendering prompts to text and text to tokens, with the rules of the run folder (see ARCHITECTURE.md, contracts)."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render_prompt(self, prompt: Prompt) -> tuple[str, list[int]]:
        """A prompt as the model reads it, text and token ids: a conversation in the model's own chat template.

        Raises:
            ValueError: a conversation for a model without a chat template.
        """
        if prompt.text is not None:
            return prompt.text, self.encode_prompt(prompt.text, templated=False)
        if not self.has_chat_template:
            raise ValueError(
                f"Model {self.name!r} has no chat template: use a prompt style of plain text (prompts=text; for "
                "code zero_shot or few_shot), or an instruct model."
            )
        text: str = self.tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=True
        )
        text += prompt.opening
        return text, self.encode_prompt(text, templated=True)

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        """Token ids of a rendered prompt; a templated prompt already holds its special tokens, BOS included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion by itself: never is the joined text tokenised, which would move boundaries."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode_completion(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
        """The text that the completion adds to the prompt, its leading white space included."""
        context = list(prompt_ids[-_DECODING_CONTEXT:])
        before: str = self.tokenizer.decode(context, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        both: str = self.tokenizer.decode(
            [*context, *completion_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return both[len(before) :]

    def fingerprint(self) -> str:
        """Equal for tokenizers that cut text alike: vocabulary, merges, normalisation and template decide it."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # Writing out all rules takes longer than tokenising a prompt, and every prompt that is embedded asks.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = self._files() if backend is None else backend.to_str()
        written = rules + json.dumps(self.tokenizer.chat_template)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def _files(self) -> str:
        """What decides a tokenizer in Python ("slow"): its class, vocabulary and the vocabulary files that it writes."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_vocabulary(folder)
            files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}
        return json.dumps([type(self.tokenizer).__name__, self.tokenizer.get_vocab(), files], sort_keys=True)
