"""Embeddings are transformers' hidden states of the joined sequence, at the last token of each completion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import prefix
from qprobe.models.language_model import ModelSpec

States = Callable[[ModelSpec, Sequence[int]], tuple[Tensor, ...]]
Ids = Callable[..., list[list[int]]]
Error = Callable[[Tensor, Tensor], float]

PROMPT_LENGTHS = (5, 19, 1, 12)
COMPLETION_LENGTHS = ((3, 0, 11), (1, 8), (7, 7, 2, 30), (0,))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def batch(random_ids: Ids) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Ragged prompts with ragged completions, some of them empty, unequal numbers a prompt."""
    completions = [random_ids(lengths, seed=p + 1) for p, lengths in enumerate(COMPLETION_LENGTHS)]
    return random_ids(PROMPT_LENGTHS), completions


def last_states(states: States, spec: ModelSpec, batch: Any, layer: int) -> Tensor:
    """(N, D): every sequence joined and run by itself on the stock model; the state of its last token."""
    prompts, completions = batch
    return torch.stack(
        [
            states(spec, [*prompt, *ids])[layer][-1]
            for prompt, of_prompt in zip(prompts, completions, strict=True)
            for ids in of_prompt
        ]
    )


@pytest.mark.parametrize("tokens_per_pass", [8192, 20, 1])
def test_states_equal_those_of_the_joined_sequence(
    any_tiny_model: ModelSpec,
    batch: Any,
    stock_states: States,
    relative_error: Error,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_pass: int,
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", tokens_per_pass)
    found = HFEmbedder(any_tiny_model, (0, 1, 2, 4)).embed(*batch)
    assert sorted(found) == [0, 1, 2, 4]
    for layer, values in found.items():
        assert values.dtype == torch.float32
        assert relative_error(values, last_states(stock_states, any_tiny_model, batch, layer)) <= TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, 3, 4, -1, -3])
def test_a_single_layer_is_read_as_well_as_several(
    any_tiny_model: ModelSpec, batch: Any, stock_states: States, relative_error: Error, layer: int
) -> None:
    found = HFEmbedder(any_tiny_model, (layer,)).embed(*batch)
    resolved = layer % 5
    assert list(found) == [resolved]
    assert relative_error(found[resolved], last_states(stock_states, any_tiny_model, batch, resolved)) <= TOLERANCE


def test_prompts_prefilled_in_several_passes_keep_their_places(
    any_tiny_model: ModelSpec, batch: Any, stock_states: States, relative_error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", 12)
    found = HFEmbedder(any_tiny_model, (2, 4)).embed(*batch)
    for layer, values in found.items():
        assert relative_error(values, last_states(stock_states, any_tiny_model, batch, layer)) <= TOLERANCE


def test_an_empty_completion_reads_the_last_prompt_token(
    any_tiny_model: ModelSpec, random_ids: Ids, stock_states: States, relative_error: Error
) -> None:
    prompts = random_ids((6, 9))
    found = HFEmbedder(any_tiny_model, (3,)).embed(prompts, [[[], []], [[]]])[3]
    wanted = torch.stack([stock_states(any_tiny_model, prompts[p])[3][-1] for p in (0, 0, 1)])
    assert relative_error(found, wanted) <= TOLERANCE


def test_a_prompt_without_completions_adds_no_rows(
    tiny_model: ModelSpec, random_ids: Ids, stock_states: States, relative_error: Error
) -> None:
    prompts, ids = random_ids((4, 8, 3)), random_ids((5,), seed=9)[0]
    found = HFEmbedder(tiny_model, (2,)).embed(prompts, [[], [ids], []])[2]
    assert relative_error(found, stock_states(tiny_model, [*prompts[1], *ids])[2][-1:]) <= TOLERANCE


def test_no_completions_at_all_are_no_rows(tiny_model: ModelSpec, random_ids: Ids) -> None:
    assert HFEmbedder(tiny_model, (0, 3)).embed(random_ids((4,)), [[]])[3].shape == (0, 32)


def test_completions_do_not_see_each_other(any_tiny_model: ModelSpec, batch: Any, random_ids: Ids) -> None:
    prompts, completions = batch
    embedder = HFEmbedder(any_tiny_model, (4,))
    before = embedder.embed(prompts, completions)[4]
    changed_prompts = [prompts[0], *random_ids(PROMPT_LENGTHS[1:], seed=77)]
    changed = [
        [completions[0][0], *random_ids(COMPLETION_LENGTHS[0][1:], seed=78)],
        *[random_ids(lengths, seed=79 + p) for p, lengths in enumerate(COMPLETION_LENGTHS[1:])],
    ]
    after = embedder.embed(changed_prompts, changed)[4]
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-6)
    others = [row for row in range(len(before)) if row != 0 and row != 1]  # row 1 is empty and of the same prompt
    assert all((after[row] - before[row]).norm() > 0.1 for row in others)


@pytest.mark.parametrize(("layer", "calls"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_layers_above_the_highest_asked_for_are_not_run(
    any_tiny_model: ModelSpec, random_ids: Ids, layer: int, calls: int
) -> None:
    model = models.load(any_tiny_model).model
    ran: list[str] = []
    watched = {f"layer {i}": module.mlp for i, module in enumerate(prefix.decoder_layers(model))}
    watched["head"] = model.get_output_embeddings()
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    HFEmbedder(any_tiny_model, (0, layer)).embed(random_ids((5, 3)), [random_ids((4, 2)), random_ids((3,))])
    for handle in handles:
        handle.remove()
    # Once for the prompts, once for the completions.
    assert ran == [f"layer {i}" for i in range(calls)] * 2


def test_a_pass_holds_no_more_tokens_than_asked(
    tiny_model: ModelSpec, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[list[int]] = []
    read = prefix.PrefixRun.read

    def watched(self: prefix.PrefixRun, shared: prefix.Prefix, rows: list[list[int]], *rest: Any) -> dict[int, Tensor]:
        passed.append([len(row) for row in rows])
        return read(self, shared, rows, *rest)

    monkeypatch.setattr(prefix.PrefixRun, "read", watched)
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", 16)
    HFEmbedder(tiny_model, (1,)).embed(*batch)
    # Empty rows are in none.
    assert sorted(length for part in passed for length in part) == [1, 2, 3, 7, 7, 8, 11, 30]
    assert all(sum(part) <= 16 or len(part) == 1 for part in passed)
    assert all(sum(a) + b[0] > 16 for a, b in itertools.pairwise(passed))


def test_layers_are_counted_from_zero_in_the_order_given(tiny_model: ModelSpec) -> None:
    assert HFEmbedder(tiny_model, (-1, 2, 4, 0, -3)).layers == (4, 2, 0)


def test_positive_layers_are_known_without_loading_the_model() -> None:
    assert HFEmbedder(ModelSpec("nobody/nothing"), (26, 3, 26)).layers == (26, 3)


def test_states_of_bfloat16_models_are_returned_in_float32(
    tiny_model: ModelSpec, batch: Any, stock_states: States, relative_error: Error
) -> None:
    spec = ModelSpec(tiny_model.name, dtype="bfloat16", device="cpu")
    found = HFEmbedder(spec, (0, 2)).embed(*batch)
    assert found[2].dtype == torch.float32
    assert relative_error(found[2], last_states(stock_states, tiny_model, batch, 2)) < 0.05


def test_the_identity_names_what_decides_the_embeddings(tiny_model: ModelSpec) -> None:
    plain, others = HFEmbedder(tiny_model, (1,)), HFEmbedder(tiny_model, (1, 2))
    bfloat16 = HFEmbedder(ModelSpec(tiny_model.name, dtype="bfloat16", device="cpu"))
    assert plain.identity() == others.identity()
    assert plain.identity() != bfloat16.identity()


@pytest.mark.parametrize(
    ("name", "folder"),
    [("Qwen/Qwen2.5-Coder-1.5B", "hf-Qwen-Qwen2.5-Coder-1.5B"), ("a b/c:d", "hf-a-b-c-d")],
)
def test_the_folder_name_is_fit_for_a_path(name: str, folder: str) -> None:
    assert HFEmbedder(ModelSpec(name, dtype="float32")).folder_name() == folder


def test_text_is_tokenised_by_the_rules_of_the_run_folder(tiny_model: ModelSpec) -> None:
    embedder = HFEmbedder(tiny_model)
    ids = embedder.encode_completion("the end")
    assert embedder.encode_prompt("the end", templated=True) == ids
    assert embedder.encode_prompt("the end", templated=False) == [0, *ids]
    assert embedder.tokenizer_fingerprint() == models.load_tokenizer(tiny_model).fingerprint()


def test_an_embedder_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        HFEmbedder(ModelSpec(dtype="float32"), ())


@pytest.mark.parametrize(
    ("layers", "prompts", "completions", "message"),
    [
        ((5,), [[7]], [[[8]]], r"Layer 5 does not exist: .* layers 0 \(token embeddings\) to 4"),
        ((-6,), [[7]], [[[8]]], "Layer -6 does not exist"),
        ((1,), [[7], [8]], [[[8]]], "2 prompts but completions of 1"),
        ((1,), [[7], []], [[[8]], [[8]]], "A prompt has no tokens"),
        ((1,), [], [], "No prompts were given"),
        ((1,), [[7] * 100], [[[8] * 93]], "has 193 tokens, more than the context of 192 tokens"),
    ],
)
def test_input_that_cannot_be_embedded_is_a_sentence(
    tiny_model: ModelSpec, layers: tuple[int, ...], prompts: Any, completions: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HFEmbedder(tiny_model, layers).embed(prompts, completions)


def test_a_sequence_may_fill_the_context(tiny_model: ModelSpec, stock_states: States, relative_error: Error) -> None:
    found = HFEmbedder(tiny_model, (4,)).embed([[7] * 100], [[[8] * 92]])[4]
    assert relative_error(found, stock_states(tiny_model, [7] * 100 + [8] * 92)[4][-1:]) <= TOLERANCE
