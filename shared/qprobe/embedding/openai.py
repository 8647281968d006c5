"""Embeddings from the endpoint of an OpenAI-compatible API: prompt + completion as one text, one embedding a row.

An API takes text, so "token ids" are here UTF-8 bytes, joined before they are sent; the server tokenises the joined text as
it likes. There is one layer, numbered 0: what the server calls the embedding.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qprobe.embedding.base import path_name
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiBackEnd, ApiError, ApiRefused, ApiSettings
from qprobe.models.prefix import check_rows
from qprobe.settings import build

_LAYER = 0
_LARGEST = float(torch.finfo(torch.float32).max)


class OpenAIEmbedder(ApiBackEnd):
    """Embeddings by an OpenAI-compatible API.

    Args:
        model: not used, an API names its own model; here so that all embedders are made alike.
        api: which model of which server, and how it is called.
        layers: not used, an API has one; here because experiments name those of local models.
        dimensions: length of the embeddings, for models that can shorten them; None is the model's own.
        inputs_per_call: texts in one request.
        extra_body: further keys of every request; they decide the embeddings.
    """

    def __init__(
        self,
        model: ModelSpec | None,
        api: ApiSettings | Mapping[str, Any],
        layers: Sequence[int] | None = None,
        dimensions: int | None = None,
        inputs_per_call: int = 64,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if inputs_per_call < 1 or (dimensions is not None and dimensions < 1):
            raise ValueError(f"inputs_per_call={inputs_per_call} and dimensions={dimensions} must be at least 1.")
        self.api = api if isinstance(api, ApiSettings) else build(ApiSettings, api, "embedder.api")
        self.dimensions = dimensions
        self.inputs_per_call = inputs_per_call
        self.extra_body = dict(extra_body or {})
        self.api.check_no_key({"embedder.extra_body": self.extra_body})
        self._width: int | None = None

    def identity(self) -> dict[str, Any]:
        model = {**self.api.identity(), "dimensions": self.dimensions, "extra_body": self.extra_body}
        return {"embedder": "openai", "model": model, "token": "whole text"}

    @property
    def layers(self) -> tuple[int, ...]:
        return (_LAYER,)

    def folder_name(self) -> str:
        return path_name("openai", self.api.model)

    def tokenizer_fingerprint(self) -> str:
        return "utf-8"

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return list(text.encode())

    def encode_completion(self, text: str) -> list[int]:
        return list(text.encode())

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        check_rows(prompts, completions)
        texts = [
            bytes([*prompt, *ids]).decode(errors="replace")
            for prompt, of_prompt in zip(prompts, completions, strict=True)
            for ids in of_prompt
        ]
        parts = [texts[start : start + self.inputs_per_call] for start in range(0, len(texts), self.inputs_per_call)]
        rows = [row for part in self.client.each([functools.partial(self._call, p) for p in parts]) for row in part]
        for row in rows:
            self._check_width(len(row))
        return {_LAYER: torch.tensor(rows, dtype=torch.float32).reshape(len(rows), self._width or 0)}

    def _call(self, texts: Sequence[str], halt: threading.Event) -> list[list[float]]:
        body: dict[str, Any] = {"model": self.api.model, "input": list(texts), "encoding_format": "float"}
        if self.dimensions is not None:
            body["dimensions"] = self.dimensions

        def wrong(answer: dict[str, Any]) -> str | None:
            usable = _rows(answer)
            if sorted(usable) == list(range(len(texts))):
                return None
            return (
                f"{len(usable)} usable embeddings for {len(texts)} texts: check that {self.api.model!r} is an embedding model, "
                "or lower inputs_per_call"
            )

        try:
            rows = _rows(self.client.post("/embeddings", body | self.extra_body, "data", halt, wrong))
        except ApiRefused as error:
            if error.too_long:
                raise ValueError(
                    f"A prompt with its completion has more tokens than the context of {self.api.model} ({error.said}): embed "
                    "with a model of longer context or shorten the prompt."
                ) from None
            raise ApiError(f"{str(error).rstrip('.')}: is {self.api.model!r} an embedding model?") from None
        return [rows[place] for place in range(len(texts))]

    def _check_width(self, width: int) -> None:
        if self._width is None:
            self._width = width
        if width != self._width:
            raise ApiError(
                f"{self.client.where} gave embeddings of {self._width} values and then of {width}: the model "
                f"{self.api.model!r} was changed there. Delete the features of this embedder and embed with one model."
            )


def _rows(answer: Mapping[str, Any]) -> dict[int, list[float]]:
    """The embeddings that are finite numbers, by the place of their text."""
    rows: dict[int, list[float]] = {}
    for place, item in enumerate(answer["data"]):
        values, index = (item.get("embedding"), item.get("index", place)) if isinstance(item, dict) else (None, None)
        if isinstance(index, int) and isinstance(values, list) and values and all(map(_is_number, values)):
            rows[index] = values
    return rows


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
