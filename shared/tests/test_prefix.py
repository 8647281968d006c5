"""Continuing shared prompts is exact: states and scores are those of the joined sequence, one model family after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.models import attention, growing, prefix
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.prefix import PrefixRun

States = Callable[[ModelSpec, Sequence[int]], tuple[Tensor, ...]]
Logprobs = Callable[[ModelSpec, Sequence[int]], Tensor]
Ids = Callable[..., list[list[int]]]
Error = Callable[[Tensor, Tensor], float]

TOLERANCE = 1e-4
PROMPT_LENGTHS = (9, 2, 14, 1, 5)
OWNER = (0, 0, 1, 2, 2, 2, 4)  # the prompt of length 1 has no row


@pytest.fixture
def run(any_tiny_model: ModelSpec) -> PrefixRun:
    return PrefixRun(models.load(any_tiny_model))


@pytest.fixture
def prompts(random_ids: Ids) -> list[list[int]]:
    return random_ids(PROMPT_LENGTHS)


Hold = Callable[..., None]


@pytest.fixture
def hold(run: PrefixRun, stock_states: States, stock_logprobs: Logprobs, relative_error: Error) -> Hold:
    """Compares states, and scores where there are any, of the last tokens of sequences with those of the stock model."""

    def compare(found: prefix.Prefix | prefix.Extension, sequences: list[list[int]], widths: Sequence[int]) -> None:
        spec = run.language_model.spec
        assert found.states or found.logits is not None
        for layer, values in found.states.items():
            of_layer = [stock_states(spec, ids)[layer][-width:] for ids, width in zip(sequences, widths, strict=True)]
            wanted = torch.cat(of_layer)
            assert relative_error(values.reshape(wanted.shape), wanted) <= TOLERANCE
        if found.logits is not None:
            scores = torch.stack([stock_logprobs(spec, ids)[-1] for ids in sequences])
            torch.testing.assert_close(found.logits.double().log_softmax(dim=-1), scores, rtol=0, atol=1e-4)

    return compare


def hook_count(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("per_pass", [2048, 16, 1])
def test_prefill_returns_states_and_scores_of_the_last_prompt_token(
    run: PrefixRun, prompts: list[list[int]], hold: Hold, monkeypatch: pytest.MonkeyPatch, per_pass: int
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", per_pass)
    found = run.prefill(prompts, (0, 2, 4), logits=True)
    assert found.lengths.tolist() == list(PROMPT_LENGTHS)
    assert found.mask.sum(dim=1).tolist() == list(PROMPT_LENGTHS)
    assert sorted(found.states) == [0, 2, 4]
    assert found.logits is not None
    hold(found, prompts, [1] * len(prompts))


@pytest.mark.parametrize("per_pass", [2048, 16])
def test_rows_grown_in_steps_and_dropped_on_the_way_stay_exact(
    run: PrefixRun,
    prompts: list[list[int]],
    random_ids: Ids,
    hold: Hold,
    monkeypatch: pytest.MonkeyPatch,
    per_pass: int,
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", per_pass)
    continuation = run.continuation(run.prefill(prompts), torch.tensor(OWNER))
    sequences = [list(prompts[p]) for p in OWNER]
    alive = list(range(len(OWNER)))
    # Widths of the steps, and which of the living rows go on after each: whole prompts leave, then half of all.
    steps: list[tuple[int, list[int]]] = [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (3, [0, 2, 3, 5, 6]),
        (1, [0, 2, 3]),
        (8, [1, 2]),
        (1, [1]),
        (2, [0]),
    ]
    for step, (width, kept) in enumerate(steps):
        ids = random_ids([width] * len(alive), seed=step)
        for row, tokens in zip(alive, ids, strict=True):
            sequences[row] += tokens
        found = continuation.extend(torch.tensor(ids), (0, 3, 4), logits=True)
        assert sorted(found.states) == [0, 3, 4]
        assert found.logits is not None
        hold(found, [sequences[row] for row in alive], [width] * len(alive))
        continuation.keep(torch.tensor(kept))
        alive = [alive[place] for place in kept]


def test_rows_may_be_dropped_before_the_first_step(run: PrefixRun, prompts: list[list[int]], hold: Hold) -> None:
    continuation = run.continuation(run.prefill(prompts), torch.tensor(OWNER))
    continuation.keep(torch.tensor([2, 6]))
    found = continuation.extend(torch.tensor([[7, 8], [9, 10]]), (3,))
    hold(found, [[*prompts[1], 7, 8], [*prompts[4], 9, 10]], [2, 2])


def test_threads_that_share_a_model_keep_to_their_own_passes(run: PrefixRun, random_ids: Ids, hold: Hold) -> None:
    """One model, as `load` gives it; one thread copies keys and stops at the first layer, the others share what they may."""
    ways = [(False, (2, 4), True, 3), (True, (1,), False, 1), (False, (3,), True, 2)]

    def passes(copied: bool, layers: tuple[int, ...], logits: bool, count: int) -> list[prefix.Prefix]:
        own = PrefixRun(run.language_model, copied)
        return [own.prefill(random_ids([7] * count, seed), layers, logits) for seed in range(20)]

    with ThreadPoolExecutor(len(ways)) as pool:
        for found, (_, layers, logits, count) in zip(pool.map(passes, *zip(*ways, strict=True)), ways, strict=True):
            for seed, one in enumerate(found):
                assert sorted(one.states) == list(layers)
                assert (one.logits is not None) == logits
                hold(one, random_ids([7] * count, seed), [1] * count)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_rows_that_join_later_and_those_that_were_there_stay_exact(
    tiny_model: ModelSpec,
    prompts: list[list[int]],
    random_ids: Ids,
    stock_states: States,
    relative_error: Error,
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
) -> None:
    monkeypatch.setitem(growing.GROUPS, "cpu", groups)
    run = PrefixRun(models.load(tiny_model))
    sequences: list[list[int]] = []
    alive: list[int] = []
    continuation = None
    # Prompts whose rows join (two each), the width of the step, and the living rows that go on after it: the oldest leave, so
    # that padding is cut off, whole groups leave, and one is joined by two prompts at once.
    for step, (joining, width, kept) in enumerate(
        [
            ([0, 2], 18, [0, 1, 3]),
            ([1], 1, [0, 1, 2, 3, 4]),
            ([], 2, [0, 3, 4]),
            ([3, 4], 1, [1, 2, 3, 6]),
            ([2], 3, [2, 3, 4, 5]),
            ([], 1, [0, 1, 2, 3]),
        ]
    ):
        if joining:
            found, owner = run.prefill([prompts[p] for p in joining]), torch.arange(len(joining)).repeat_interleave(2)
            if continuation is None:
                continuation = run.continuation(found, owner)
            else:
                continuation.join(found, owner)
            alive += range(len(sequences), len(sequences) + 2 * len(joining))
            sequences += [list(prompts[p]) for p in joining for _ in range(2)]
        assert continuation is not None
        ids = random_ids([width] * len(alive), seed=step)
        for row, tokens in zip(alive, ids, strict=True):
            sequences[row] += tokens
        states = continuation.extend(torch.tensor(ids), (0, 3, 4)).states
        for layer in (0, 3, 4):
            wanted = torch.stack([stock_states(tiny_model, sequences[row])[layer][-width:] for row in alive])
            assert relative_error(states[layer], wanted) <= TOLERANCE
        continuation.keep(torch.tensor(kept))
        alive = [alive[place] for place in kept]


def test_one_prompt_of_several_is_itself(
    tiny_model: ModelSpec, prompts: list[list[int]], stock_states: States, relative_error: Error
) -> None:
    run = PrefixRun(models.load(tiny_model))
    found = run.prefill(prompts, (3,), logits=True).only(1)
    assert found.mask.tolist() == [[True] * PROMPT_LENGTHS[1]]
    states = run.continuation(found, torch.tensor([0])).extend(torch.tensor([[7, 8]]), (3,)).states[3]
    wanted = stock_states(tiny_model, [*prompts[1], 7, 8])[3]
    assert relative_error(torch.cat([found.states[3], states[0]]), wanted[-3:]) <= TOLERANCE


def test_two_continuations_of_one_prefix_are_apart(run: PrefixRun, prompts: list[list[int]], hold: Hold) -> None:
    shared = run.prefill(prompts)
    first, second = (run.continuation(shared, torch.tensor(OWNER)) for _ in range(2))
    first.extend(torch.full((7, 3), 9))
    hold(second.extend(torch.full((7, 2), 11), (4,)), [[*prompts[p], 11, 11] for p in OWNER], [2] * 7)


@pytest.mark.parametrize("per_call", [1, 9, 128])
def test_whole_completions_read_at_once_have_the_states_of_the_joined_sequences(
    run: PrefixRun,
    prompts: list[list[int]],
    random_ids: Ids,
    hold: Hold,
    monkeypatch: pytest.MonkeyPatch,
    per_call: int,
) -> None:
    monkeypatch.setattr(attention, "TOKENS_PER_CALL", per_call)
    rows = random_ids([3, 1, 7, 2, 5, 4, 6])
    found = run.read(run.prefill(prompts, (0, 3, 4)), rows, OWNER, (0, 3, 4))
    assert sorted(found.states) == [0, 3, 4]
    hold(found, [[*prompts[p], *row] for p, row in zip(OWNER, rows, strict=True)], [len(row) for row in rows])


def test_padding_on_the_right_reaches_nothing_before_it(run: PrefixRun, prompts: list[list[int]]) -> None:
    ids = torch.full((7, 6), 20)
    other = ids.clone()
    other[:, 4:] = 99
    shared = run.prefill(prompts)
    states = [run.continuation(shared, torch.tensor(OWNER)).extend(x, (4,)).states[4] for x in (ids, other)]
    assert torch.equal(states[0][:, :4], states[1][:, :4])
    assert not torch.allclose(states[0][:, 4:], states[1][:, 4:], atol=0.1)


def test_prompts_without_rows_are_let_go(tiny_model: ModelSpec, prompts: list[list[int]]) -> None:
    run = PrefixRun(models.load(tiny_model))
    continuation = run.continuation(run.prefill(prompts), torch.tensor(OWNER))
    held = []
    for kept in ([0, 2, 3, 5, 6], [0, 1], [1]):
        continuation.keep(torch.tensor(kept))
        held.append(continuation.prompts)
    assert held == [5, 2, 1]  # of 5 prompts: 4 in use, then 2, then 1


def test_passes_over_the_prompts_are_small_and_score_the_last_token_only(
    tiny_model: ModelSpec, random_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", 16)
    run = PrefixRun(models.load(tiny_model))
    shapes: list[tuple[int, ...]] = []
    head = run.model.lm_head.register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape)))
    body = run.model.model.embed_tokens.register_forward_hook(
        lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape))
    )
    run.prefill(random_ids((9, 2, 14, 1, 5, 20)), logits=True)
    head.remove()
    body.remove()
    # Lengths 1 2 5, 9, 14, 20: rows times the longest stay within 16 where more than one row goes together.
    assert shapes == [(3, 5), (3, 1, 32), (1, 9), (1, 1, 32), (1, 14), (1, 1, 32), (1, 20), (1, 1, 32)]


def test_scoring_the_last_token_of_longer_passes_copies_no_weights(run: PrefixRun, prompts: list[list[int]]) -> None:
    # A slice of (2, 3, D) is not dense, and torch's linear then copies the weights once for every row.
    contiguous: list[bool] = []
    head = run.model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: contiguous.append(inputs[0].is_contiguous())
    )
    run.prefill(prompts, logits=True)
    continuation = run.continuation(run.prefill(prompts), torch.arange(len(prompts)))
    continuation.extend(torch.ones(len(prompts), 3, dtype=torch.int64), logits=True)
    head.remove()
    assert contiguous
    assert all(contiguous)


def test_no_hook_stays_on_the_model(run: PrefixRun, prompts: list[list[int]]) -> None:
    before = hook_count(run.model)
    shared = run.prefill(prompts, (2,))
    run.prefill(prompts, (0,))
    run.prefill(prompts, (4,), logits=True)
    with pytest.raises(IndexError):
        run.continuation(shared, torch.tensor(OWNER)).extend(torch.full((7, 1), 10**6), (1,))
    assert hook_count(run.model) == before


@pytest.mark.parametrize(("prompts", "word"), [([], "No prompts"), ([[5], []], "no tokens")])
def test_nothing_to_run_on_is_a_sentence(run: PrefixRun, prompts: list[list[int]], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        run.prefill(prompts)


def test_the_two_ways_are_both_taken(
    tiny_model: ModelSpec, tiny_sliding_model: ModelSpec, tiny_gpt2_model: ModelSpec
) -> None:
    ways = [PrefixRun(models.load(spec)).shared for spec in (tiny_model, tiny_sliding_model, tiny_gpt2_model)]
    assert ways == [True, False, False]


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What makes each family's own traits show at this size.
TRAITS: dict[str, dict[str, Any]] = {
    "granite": {"attention_multiplier": 0.7, "residual_multiplier": 0.6, "embedding_multiplier": 3.0},
    "mistral": {"sliding_window": None},
    "olmo": {"clip_qkv": 0.8},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": None},
}


def language_model(family: str, **changes: Any) -> tuple[LanguageModel, Any]:
    """(a model of the family with random weights, its copy with stock attention)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SMALL | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        copied = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    copied.load_state_dict(model.state_dict())
    return LanguageModel(model, None, ModelSpec(family, dtype="float32", device="cpu")), copied


def test_a_model_made_in_code_needs_no_specification() -> None:
    ours, _ = language_model("llama")
    bare: Any = SimpleNamespace(model=ours.model, device=ours.device, layer_count=ours.layer_count)
    assert PrefixRun(bare).shared
    assert not PrefixRun(bare, copied=True).shared


@pytest.mark.parametrize("family", sorted(attention.PLAIN_ATTENTION))
def test_every_family_called_plain_is_plain(family: str, relative_error: Error) -> None:
    ours, stock = language_model(family, **TRAITS.get(family, {}))
    run = PrefixRun(ours)
    assert run.shared
    prompts, owner = [[5, 6, 7, 8, 9, 10], [11, 12]], [0, 0, 1]
    tokens = [[20, 21, 22], [23, 24, 25], [26, 27, 28]]
    found = run.continuation(run.prefill(prompts), torch.tensor(owner)).extend(torch.tensor(tokens), (1, 2, 3), True)
    with torch.inference_mode():
        joined = [
            stock(torch.tensor([prompts[p] + ids]), output_hidden_states=True)
            for p, ids in zip(owner, tokens, strict=True)
        ]
    for layer in (1, 2, 3):
        wanted = torch.cat([output.hidden_states[layer][0, -3:] for output in joined])
        assert relative_error(found.states[layer].reshape(wanted.shape), wanted) <= TOLERANCE
    assert found.logits is not None
    assert relative_error(found.logits, torch.cat([output.logits[:, -1] for output in joined])) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "changes", "shared"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, False),
        ("mistral", {"sliding_window": 4}, False),
        ("gemma", {"head_dim": 8}, False),
    ],
)
def test_attention_with_a_window_or_unknown_is_left_to_the_model(
    family: str, changes: dict[str, Any], shared: bool, relative_error: Error
) -> None:
    ours, stock = language_model(family, **changes)
    run = PrefixRun(ours)
    assert run.shared is shared
    found = run.continuation(run.prefill([[5, 6, 7, 8, 9, 10], [11]]), torch.tensor([0, 1])).extend(
        torch.tensor([[20, 21, 22], [23, 24, 25]]), (2, 3)
    )
    with torch.inference_mode():
        for row, ids in enumerate(([5, 6, 7, 8, 9, 10, 20, 21, 22], [11, 23, 24, 25])):
            wanted = stock(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in (2, 3):
                assert relative_error(found.states[layer][row], wanted[layer][0, -3:]) <= TOLERANCE


def test_a_model_without_a_list_of_layers_is_a_sentence() -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=4))
    model = SimpleNamespace(config=config, base_model=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="module list"):
        prefix.decoder_layers(model)
