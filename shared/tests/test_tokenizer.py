"""Text to tokens and back, and how a tokenizer is recognised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.tokenizer import Tokenizer
from qprobe.prompts import Prompt

MakeModel = Callable[..., ModelSpec]


@pytest.fixture
def tokenizer(tiny_model: ModelSpec) -> Tokenizer:
    return models.load_tokenizer(tiny_model)


def test_plain_text_gets_special_tokens_and_a_template_has_its_own(tokenizer: Tokenizer) -> None:
    text, ids = tokenizer.render_prompt(Prompt("t", text="the end"))
    assert (text, ids) == ("the end", [0, *tokenizer.encode_completion("the end")])
    messages = ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"})
    text, ids = tokenizer.render_prompt(Prompt("t", messages=messages, opening="def"))
    assert text == "<|bos|><|user|>What?<|end|>\n<|assistant|>It<|end|>\n<|assistant|>\ndef"
    assert ids.count(0) == 1
    assert ids[:2] == [0, 2]
    assert [token for token in ids if token < 5] == [0, 2, 4, 3, 4, 3]


def test_prompt_and_completion_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    prompt, completion = tokenizer.encode_prompt("th", templated=True), tokenizer.encode_completion("e end")
    assert prompt + completion != tokenizer.encode_completion("the end")
    assert tokenizer.decode_completion(prompt, completion) == "e end"


@pytest.mark.parametrize("text", ["", " the end", "  the end", "\n\tx", "é€😀", "a  b , c ."])
@pytest.mark.parametrize("prompt", ["def f(x):", "The ", "\n", "é"])
def test_a_completion_decodes_to_what_it_adds(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tokenizer.encode_prompt(prompt, templated=False)
    assert tokenizer.decode_completion(ids, tokenizer.encode_completion(text)) == text


def test_white_space_that_opens_a_completion_survives_a_word_piece_tokenizer() -> None:
    # SentencePiece tokenizers drop the space before the first word of what they decode.
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["▁def", "▁return", "▁x", "▁"])}
    backend = Backend(BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), "metaspace")
    assert tokenizer.tokenizer.decode([1, 2]) == "return x"
    assert tokenizer.decode_completion([0], [1, 2]) == " return x"


def test_fingerprints_are_equal_for_equal_tokenizers_only(
    tiny_model: ModelSpec, tiny_gpt2_model: ModelSpec, make_model: MakeModel, tmp_path: Path
) -> None:
    plain = models.load_tokenizer(tiny_model).fingerprint()
    assert models.load_tokenizer(tiny_gpt2_model).fingerprint() == plain
    assert models.load_tokenizer(make_model(chat_template=None)).fingerprint() != plain
    folder = Path(shutil.copytree(tiny_model.name, tmp_path / "model"))
    written = folder / "tokenizer.json"
    content = json.loads(written.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["um"], vocabulary["rst"] = vocabulary["rst"], vocabulary["um"]
    written.write_text(json.dumps(content))
    assert models.load_tokenizer(ModelSpec(str(folder), dtype="float32", device="cpu")).fingerprint() != plain


def test_a_tokenizer_in_python_has_a_fingerprint_too() -> None:
    from transformers import ByT5Tokenizer

    def fingerprint(extra: int) -> str:
        return Tokenizer(ByT5Tokenizer(extra_ids=extra), "byt5").fingerprint()

    assert fingerprint(3) == fingerprint(3)
    assert fingerprint(3) != fingerprint(4)


def test_a_conversation_without_a_chat_template_is_a_sentence(make_model: MakeModel) -> None:
    tokenizer = models.load_tokenizer(make_model(chat_template=None))
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.render_prompt(Prompt("t", messages=({"role": "user", "content": "What?"},)))
    assert tokenizer.render_prompt(Prompt("t", text="plain"))[0] == "plain"
