"""Embeddings are transformers' hidden states of the joined sequence, at the last token of each completion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding import LIKELIHOOD
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import prefix
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.models.likelihood_columns import COLUMNS

States = Callable[[ModelSpec, Sequence[int]], tuple[Tensor, ...]]
Ids = Callable[..., list[list[int]]]
Error = Callable[[Tensor, Tensor], float]

PROMPT_LENGTHS = (5, 19, 1, 12)
COMPLETION_LENGTHS = ((3, 0, 11), (1, 8), (7, 7, 2, 30), (0,))


@pytest.fixture(scope="module")
def batch(random_ids: Ids) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Ragged prompts with ragged completions, some of them empty, unequal numbers a prompt."""
    completions = [random_ids(lengths, seed=p + 1) for p, lengths in enumerate(COMPLETION_LENGTHS)]
    return random_ids(PROMPT_LENGTHS), completions


Hold = Callable[..., None]


@pytest.fixture
def hold(stock_states: States, relative_error: Error) -> Hold:
    """Compares embeddings with every sequence joined and run by itself on the stock model: the state of its last token."""

    def compare(spec: ModelSpec, batch: Any, found: dict[int, Tensor], tolerance: float = 1e-4) -> None:
        joined = [[*prompt, *ids] for prompt, of_prompt in zip(*batch, strict=True) for ids in of_prompt]
        for layer, values in found.items():
            assert values.dtype == torch.float32
            assert (
                relative_error(values, torch.stack([stock_states(spec, ids)[layer][-1] for ids in joined])) <= tolerance
            )

    return compare


@pytest.mark.parametrize("tokens_per_pass", [8192, 20, 1])
def test_states_equal_those_of_the_joined_sequence(
    any_tiny_model: ModelSpec, batch: Any, hold: Hold, monkeypatch: pytest.MonkeyPatch, tokens_per_pass: int
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", tokens_per_pass)
    found = HFEmbedder(any_tiny_model, (0, 1, 2, 4)).embed(*batch)
    assert sorted(found) == [0, 1, 2, 4]
    hold(any_tiny_model, batch, found)


@pytest.mark.parametrize("layer", [0, 1, 3, 4, -1, -3])
def test_a_single_layer_is_read_as_well_as_several(
    any_tiny_model: ModelSpec, batch: Any, hold: Hold, layer: int
) -> None:
    found = HFEmbedder(any_tiny_model, (layer,)).embed(*batch)
    assert list(found) == [layer % 5]
    hold(any_tiny_model, batch, found)


def test_a_prompt_without_completions_adds_no_rows(tiny_model: ModelSpec, random_ids: Ids, hold: Hold) -> None:
    batch = (random_ids((4, 8, 3)), [[], random_ids((5,), seed=9), []])
    hold(tiny_model, batch, HFEmbedder(tiny_model, (2,)).embed(*batch))


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
    assert HFEmbedder(ModelSpec("nobody/nothing"), (26, 3, 26)).layers == (26, 3)  # no model is loaded for these
    with pytest.raises(ValueError, match="no layers"):
        HFEmbedder(ModelSpec(dtype="float32"), ())


def test_states_of_bfloat16_models_are_returned_in_float32(tiny_model: ModelSpec, batch: Any, hold: Hold) -> None:
    spec = ModelSpec(tiny_model.name, dtype="bfloat16", device="cpu")
    hold(tiny_model, batch, HFEmbedder(spec, (2,)).embed(*batch), tolerance=0.05)


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


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_is_not_there_is_a_sentence(tiny_model: ModelSpec, layer: int) -> None:
    with pytest.raises(ValueError, match=f"Layer {layer}"):
        HFEmbedder(tiny_model, (layer,)).embed([[7]], [[[8]]])


def test_a_sequence_may_fill_the_context(tiny_model: ModelSpec, hold: Hold) -> None:
    batch = ([[7] * 100], [[[8] * 92]])
    hold(tiny_model, batch, HFEmbedder(tiny_model, (4,)).embed(*batch))


def test_likelihood_columns_come_with_the_same_states(any_tiny_model: ModelSpec, batch: Any, hold: Hold) -> None:
    found = HFEmbedder(any_tiny_model, (1, 3), likelihood=True, ending="the end").embed(*batch)
    columns = found.pop(LIKELIHOOD)
    assert sorted(found) == [1, 3]
    hold(any_tiny_model, batch, found)
    prompts, completions = batch
    assert columns.shape == (sum(map(len, completions)), len(COLUMNS))
    lengths = [len(ids) for of_prompt in completions for ids in of_prompt]
    assert columns[:, COLUMNS.index("tokens")].tolist() == lengths
    # Another way to the sum of a completion and its ending. Of an empty one the ending is the sum.
    ending = HFEmbedder(any_tiny_model).encode_completion("the end")
    assert len(ending) > 1
    whole = [[[*ids, *ending] for ids in of_prompt] for of_prompt in completions]
    read = itertools.chain.from_iterable(Likelihood(any_tiny_model).log_likelihood(prompts, whole))
    for row, length, wanted in zip(columns, lengths, read, strict=True):
        said, ended = (float(row[COLUMNS.index(name)]) for name in ("logprob_sum", "logprob_of_ending"))
        assert said + ended * (length > 0) == pytest.approx(wanted, abs=1e-3)


def test_an_ending_beyond_the_context_is_a_sentence(tiny_model: ModelSpec) -> None:
    whole = ([[7] * 100], [[[8] * 92]])
    assert HFEmbedder(tiny_model, (4,), likelihood=True).embed(*whole)[LIKELIHOOD].shape == (1, len(COLUMNS))
    with pytest.raises(ValueError, match="context"):
        HFEmbedder(tiny_model, (4,), likelihood=True, ending="the end").embed(*whole)
