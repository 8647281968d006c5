"""A refilled batch draws the completions of single rows, token for token, and stays full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.models import growing, pace
from qprobe.models.attention import SharedPrompts
from qprobe.models.keeping import Keep
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import LikelihoodColumns
from qprobe.models.memory import PromptPasses
from qprobe.models.prefix import PrefixRun
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split
from qprobe.sampling import Completion, SamplingSettings, sample_seeds
from qprobe.sampling.base import Batch
from qprobe.sampling.hf import HFSampler, sample_tokens
from qprobe.sampling.refilled import RefilledBatch

Ids = Callable[..., list[list[int]]]
LENGTHS = (5, 17, 1, 9, 3, 30, 12, 7, 20)
SETTINGS = SamplingSettings(n=3, temperature=1.0, top_p=0.97, max_new_tokens=40, stop=("e", "\x12"))


@pytest.fixture(scope="module")
def leaving_model(make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """A tiny Llama with fifteen tokens that end a completion: rows leave the batch all the time."""
    return make_model(eos_token_id=[1, *range(20, 34)])


def batches_of(prompts: Sequence[list[int]], size: int) -> list[Batch]:
    seeds = [sample_seeds(0, f"task {p}", SETTINGS.n) for p in range(len(prompts))]
    return [(prompts[start : start + size], seeds[start : start + size]) for start in range(0, len(prompts), size)]


def drawn(sampler: HFSampler, batches: Sequence[Batch]) -> list[list[Completion]]:
    """Completions of every prompt, in the order of the batches."""
    found = dict(sampler.sample_batches(iter(batches)))
    assert sorted(found) == list(range(len(batches)))
    return [of_prompt for number in sorted(found) for of_prompt in found[number]]


def tokens_of(completions: Sequence[Sequence[Completion]]) -> list[Any]:
    return [[(c.token_ids, c.finish_reason, c.seed) for c in of_prompt] for of_prompt in completions]


@torch.inference_mode()
def one_row(model: Any, spec: ModelSpec, prompt: Sequence[int], seed: int) -> tuple[list[int], str, int]:
    """A completion by transformers' own whole forward passes over prompt and tokens so far, without a cache."""
    tokenizer, ends, tokens = models.load_tokenizer(spec), models.load(spec).eos_token_ids, list[int]()
    generator = torch.Generator().manual_seed(seed)
    for uniform in torch.rand(SETTINGS.max_new_tokens, generator=generator, dtype=torch.float64):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[:, -1]
        token = int(sample_tokens(logits, uniform[None], SETTINGS))
        if token in ends:
            return tokens, "stop", seed
        tokens.append(token)
        text = tokenizer.decode_completion(prompt, tokens)
        if (cut := SETTINGS.end("", text, last=False)) is not None:
            while tokens and tokenizer.decode_completion(prompt, tokens[:-1]).startswith(text[:cut]):
                tokens.pop()
            return tokens, "stop", seed
    return tokens, "length", seed


@contextmanager
def watched() -> Iterator[tuple[list[int], list[int]]]:
    """Rows of every step, and prompts of every pass over prompts."""
    rows: list[int] = []
    prompts: list[int] = []
    grow, prefill = RefilledBatch._grow, PrefixRun.prefill

    def counted(self: RefilledBatch) -> set[int]:
        rows.append(len(self._alive))
        return grow(self)

    def counted_prompts(self: PrefixRun, given: Any, *args: Any, **kwargs: Any) -> Any:
        prompts.append(len(given))
        return prefill(self, given, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefilledBatch, "_grow", counted)
        patch.setattr(PrefixRun, "prefill", counted_prompts)
        yield rows, prompts


@pytest.fixture(scope="module")
def by_single_rows(
    leaving_model: ModelSpec, stock: Callable[[ModelSpec], Any], random_ids: Ids
) -> tuple[list[list[int]], list[Any]]:
    """(prompts, what is drawn of them)."""
    prompts = random_ids(LENGTHS)
    model = stock(leaving_model)
    rows = [
        (p, s) for batch in batches_of(prompts, 4) for p, of_prompt in zip(*batch, strict=True) for s in [of_prompt]
    ]
    return prompts, [[one_row(model, leaving_model, prompt, seed) for seed in seeds] for prompt, seeds in rows]


@pytest.mark.parametrize("at_once", [7, 64])
def test_states_that_come_with_the_completions_are_those_of_whole_passes(
    leaving_model: ModelSpec, stock: Callable[[ModelSpec], Any], random_ids: Ids, at_once: int
) -> None:
    prompts, layers = random_ids(LENGTHS), (0, 2, 4)
    sampler = HFSampler(leaving_model, SETTINGS, rows_at_once=at_once, keep=Keep(layers, 5))
    found = drawn(sampler, batches_of(prompts, 4))
    assert tokens_of(found) == tokens_of(drawn(HFSampler(leaving_model, SETTINGS, at_once), batches_of(prompts, 4)))
    model, ends = stock(leaving_model), set()
    for prompt, completions in zip(prompts, found, strict=True):
        for completion in completions:
            tokens = completion.token_ids or []
            with torch.inference_mode():
                states = model(torch.tensor([[*prompt, *tokens]]), output_hidden_states=True).hidden_states
            assert completion.states is not None
            assert sorted(completion.states) == [-1, *layers]
            for layer in layers:
                torch.testing.assert_close(completion.states[layer], states[layer][0, -1], rtol=1e-4, atol=1e-5)
            ends.add((completion.finish_reason, bool(tokens)))
    assert ends == {("stop", True), ("stop", False), ("length", True)}
    read = LikelihoodColumns(leaving_model, [5]).read(prompts, [[c.token_ids or [] for c in own] for own in found])
    kept = torch.stack([completion.states[-1] for own in found for completion in own if completion.states])
    torch.testing.assert_close(kept, torch.from_numpy(read.columns).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [(), ("a",), ("\x12",)])
def test_states_of_copied_prompts_and_of_every_end(
    tiny_sliding_model: ModelSpec, stock: Callable[[ModelSpec], Any], random_ids: Ids, stop: tuple[str, ...]
) -> None:
    prompts = random_ids((5, 3, 12))
    settings = SamplingSettings(n=2, temperature=1.0, top_p=1.0, max_new_tokens=6, stop=stop)
    sampler = HFSampler(tiny_sliding_model, settings, keep=Keep((3,)))
    found = sampler.sample(prompts, [sample_seeds(0, str(p), 2) for p in range(3)])
    model = stock(tiny_sliding_model)
    for prompt, completions in zip(prompts, found, strict=True):
        for completion in completions:
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *(completion.token_ids or [])]])
                states = model(ids, output_hidden_states=True).hidden_states
            assert completion.states is not None
            torch.testing.assert_close(completion.states[3], states[3][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("at_once", "groups", "threads"), [(2, 8, 1), (7, 8, 1), (7, 1, 1), (10, 3, 1), (10, 2, 2), (64, 8, 1)]
)
def test_completions_are_those_of_single_rows_by_transformers_itself(
    leaving_model: ModelSpec,
    by_single_rows: tuple[list[list[int]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    groups: int,
    threads: int,
) -> None:
    monkeypatch.setitem(growing.GROUPS, "cpu", groups)
    prompts, wanted = by_single_rows
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = drawn(HFSampler(leaving_model, SETTINGS, rows_at_once=at_once), batches_of(prompts, 4))
    finally:
        torch.set_num_threads(before)
    assert tokens_of(found) == wanted
    reasons = {completion.finish_reason for of_prompt in found for completion in of_prompt}
    assert reasons == {"stop", "length"}


def test_prompts_that_join_together_are_padded_to_little_more_than_their_own_length(
    tiny_model: ModelSpec, random_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40, 8, 10, 11, 9, 12 tokens, in order of length within a batch: 8 to 10, 11 and 12, 40."""
    widths: list[list[int]] = []
    prefill = PrefixRun.prefill

    def watched_prefill(run: PrefixRun, prompts: Sequence[Sequence[int]], *others: Any, **more: Any) -> Any:
        widths.append([len(prompt) for prompt in prompts])
        return prefill(run, prompts, *others, **more)

    monkeypatch.setattr(PrefixRun, "prefill", watched_prefill)
    batches = batches_of(random_ids((40, 8, 10, 11, 9, 12)), 6)
    drawn(HFSampler(tiny_model, SETTINGS, rows_at_once=64), batches)
    assert widths == [[8, 9, 10], [11, 12], [40]]
    widths.clear()
    drawn(HFSampler(tiny_model, SETTINGS, rows_at_once=64), batches_of(random_ids((20, 8, 20, 8)), 2))
    assert widths == [[8, 8], [20, 20]]  # of two batches


@pytest.mark.parametrize(
    ("lengths", "widths", "rows", "waste"),
    [
        ((5, 5), (10, 10), (3, 4), 0),
        ((9, 5), (10, 10), (3, 4), 4 * 4),  # the younger are fewer columns, of four rows
        ((5, 5), (10, 30), (3, 4), 3 * 20),
        ((9, 5), (10, 30), (3, 4), 4 * 4 + 3 * 20),
    ],
)
def test_two_groups_become_one_at_the_price_of_empty_columns(
    lengths: tuple[int, int], widths: tuple[int, int], rows: tuple[int, int], waste: int
) -> None:
    def group(length: int, width: int, count: int) -> growing.Group:
        made = growing.Group(
            SharedPrompts([], torch.ones(1, width, dtype=torch.bool), torch.zeros(count, dtype=torch.int64))
        )
        made.length = length
        return made

    one, other = (group(*traits) for traits in zip(lengths, widths, rows, strict=True))
    assert growing._waste(one, other) == growing._waste(other, one) == pytest.approx(waste, abs=1e-3)


def test_models_with_copied_keys_complete_a_batch_after_the_other(tiny_gpt2_model: ModelSpec, random_ids: Ids) -> None:
    batches = batches_of(random_ids(LENGTHS), 4)
    sampler = HFSampler(tiny_gpt2_model, SETTINGS)
    together = [(number, tokens_of(found)) for number, found in sampler.sample_batches(iter(batches))]
    assert together == [(number, tokens_of(sampler.sample(*batch))) for number, batch in enumerate(batches)]


def test_the_batch_stays_full_and_a_prompt_is_run_once(leaving_model: ModelSpec, random_ids: Ids) -> None:
    batches = batches_of(random_ids(LENGTHS * 2), 2)
    with watched() as (rows, prompts):
        drawn(HFSampler(leaving_model, SETTINGS, rows_at_once=16), batches)
    assert max(rows) == 16
    full = rows[: max(place for place, count in enumerate(rows) if count == 16)]
    # Rows leave in a step and join at the beginning of the next, two or more at a time.
    assert min(full) >= 13
    assert sum(prompts) == 2 * len(LENGTHS)  # also those whose three rows did not begin together


def test_batches_are_asked_for_when_their_rows_can_begin(leaving_model: ModelSpec, random_ids: Ids) -> None:
    asked = 0

    def each() -> Iterator[Batch]:
        nonlocal asked
        for batch in batches_of(random_ids(LENGTHS), 1):
            asked += 1
            yield batch

    ahead = [asked - done for done, _ in enumerate(HFSampler(leaving_model, SETTINGS, 6).sample_batches(each()))]
    # Two prompts' rows have place; one more is known to wait; and one that has a long row may be in work all the while.
    assert max(ahead) <= 6
    assert ahead[0] < len(LENGTHS)


def test_memory_that_runs_out_in_the_middle_changes_no_completion(
    leaving_model: ModelSpec, by_single_rows: tuple[list[list[int]], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, wanted = by_single_rows
    steps = 0

    def fail(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise torch.OutOfMemoryError("out of memory")

    handle = models.load(leaving_model).model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with watched() as (rows, _):
            found = drawn(HFSampler(leaving_model, SETTINGS, rows_at_once=10), batches_of(prompts, 4))
    finally:
        handle.remove()
    assert tokens_of(found) == wanted
    assert "ran out of memory" in capsys.readouterr().out
    assert max(rows[12:]) < 10  # and fewer rows from then on


def test_memory_that_runs_out_at_whatever_step_loses_no_batch(
    make_model: Callable[..., ModelSpec], random_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the step that has seen the end of a batch's last row."""
    monkeypatch.setattr("qprobe.models.memory.Passes._release", lambda _: None)  # it takes longer than the rest
    spec, settings, keep = make_model(eos_token_id=[1, *range(20, 60)]), replace(SETTINGS, max_new_tokens=6), Keep((2,))
    batches = batches_of(random_ids((8, 9, 10, 11, 12, 9, 8, 7)), 1)
    wanted = tokens_of(drawn(HFSampler(spec, settings, 9, keep), batches))
    base, steps = models.load(spec).model.base_model, 0
    for failing in range(2, 12):
        steps = 0

        def fail(_module: Any, _arguments: Any, _keywords: dict[str, Any], failing: int = failing) -> None:
            nonlocal steps
            steps += 1
            if steps == failing:
                raise torch.OutOfMemoryError("out of memory")

        handle = base.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            found = drawn(HFSampler(spec, settings, 9, keep), batches)
        finally:
            handle.remove()
        assert tokens_of(found) == wanted
        assert all(completion.states for of_prompt in found for completion in of_prompt)


# --------------------------------------------------------------------------------------------------------- how many rows


def test_the_rows_taken_are_the_fewest_within_a_tenth_of_the_best_time() -> None:
    assert pace.chosen({32: 3.0, 64: 2.0, 128: 1.6, 256: 1.5}) == 128
    assert pace.chosen({32: 1.0, 64: 1.2}) == 32


def test_they_are_measured_once_for_a_model_and_kept(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QPROBE_CACHE", str(tmp_path))
    monkeypatch.setattr(pace, "_found", {})
    measured: list[PromptPasses] = []

    def planted(passes: PromptPasses) -> dict[int, float]:
        measured.append(passes)
        return {32: 2.0, 64: 1.0, 128: 1.0}

    passes = PromptPasses(models.load(tiny_model))
    real = pace.seconds_a_row(passes)
    assert list(real)[:3] == [64, 128, 256]
    assert min(real.values()) > 0
    monkeypatch.setattr(pace, "seconds_a_row", planted)
    assert pace.best_rows(passes) == 64
    assert "64 rows are decoded together" in capsys.readouterr().err
    monkeypatch.setattr(pace, "_found", {})  # another process
    assert pace.best_rows(passes) == 64
    assert len(measured) == 1
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        pace.best_rows(passes)  # of another machine, as it were
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2


def test_a_setting_stands_above_the_measurement_and_few_rows_are_not_worth_one(
    tiny_model: ModelSpec, random_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_passes: PromptPasses) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr("qprobe.sampling.hf.best_rows", refused)
    settings = SamplingSettings(n=9, max_new_tokens=2)
    prompts = random_ids([3] * 8)
    seeds = [[9 * p + s for s in range(9)] for p in range(8)]
    HFSampler(tiny_model, settings).sample(prompts[:7], seeds[:7])
    HFSampler(tiny_model, settings, rows_at_once=80).sample(prompts, seeds)
    with pytest.raises(AssertionError, match="measured"):
        HFSampler(tiny_model, settings).sample(prompts, seeds)
    assert HFSampler(tiny_model, settings).identity() == HFSampler(tiny_model, settings, 80).identity()
    with pytest.raises(ValueError, match="rows_at_once"):
        HFSampler(tiny_model, settings, rows_at_once=0)


# ------------------------------------------------------------------------------------------------------------- in a run


def a_pool(spec: ModelSpec, run: Path) -> Pool:
    prompts = [Prompt(f"p/{i:02d}", text=f"def add_{i}(first, second):\n") for i in range(20)]
    settings = SamplingSettings(n=4, temperature=1.0, top_p=1.0, max_new_tokens=60)
    sampler = HFSampler(spec, settings, rows_at_once=24)
    return Pool(run, Split("few", prompts, {"data": "few"}), "sample", sampler, seed=0, batch_rows=8)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_refilled import a_pool
from qprobe.models.language_model import ModelSpec
from qprobe.run import stages
from qprobe.sampling.refilled import RefilledBatch
grow = RefilledBatch._grow
def slowly(self):
    time.sleep(0.02)
    return grow(self)
RefilledBatch._grow = slowly
stages.sample(a_pool(ModelSpec(sys.argv[2], dtype="float32", device="cpu"), Path(sys.argv[3])), progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="a process is killed by a signal")
def test_killed_in_the_middle_of_a_refilled_batch_it_ends_as_if_undisturbed(
    leaving_model: ModelSpec, tmp_path: Path
) -> None:
    whole, killed = a_pool(leaving_model, tmp_path / "whole"), a_pool(leaving_model, tmp_path / "killed")
    stages.sample(whole, progress=False)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), leaving_model.name, str(tmp_path / "killed")]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and len(list((tmp_path / "killed").rglob("part-*.parquet"))) < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    there = [path.name for path in killed.completions.parts()]
    assert 3 <= len(there) <= 7  # of 10; three and some whose rows were in work are lost
    stages.sample(killed, progress=False)
    names = sorted(path.name for path in whole.completions.parts())
    assert sorted(path.name for path in killed.completions.parts()) == names
    ours, undisturbed = (pool.completions.read(pool.batches).to_pylist() for pool in (killed, whole))
    # Which rows grow beside each other differs, and with it the last digits of the log-probabilities.
    assert [row | {"logprob": 0} for row in ours] == [row | {"logprob": 0} for row in undisturbed]
    assert [row["logprob"] for row in ours] == pytest.approx([row["logprob"] for row in undisturbed], abs=1e-3)


def test_rows_that_nobody_wants_leave_and_disturb_nobody(leaving_model: ModelSpec, random_ids: Ids) -> None:
    prompts = random_ids(LENGTHS)
    seeds = [sample_seeds(0, f"task {p}", SETTINGS.n) for p in range(len(prompts))]
    asked: list[int] = []

    def wanted(_: int, place: int) -> bool:
        asked.append(place)
        return place != 2 or asked.count(2) <= 4

    whole = HFSampler(leaving_model, SETTINGS, rows_at_once=7).sample(prompts, seeds)
    ((_, found),) = HFSampler(leaving_model, SETTINGS, rows_at_once=7).sample_batches([(prompts, seeds)], wanted)
    others = [place for place in range(len(prompts)) if place != 2]
    assert tokens_of([found[place] for place in others]) == tokens_of([whole[place] for place in others])
    assert any(completion.finish_reason == "" for completion in found[2])
    for completion, full in zip(found[2], whole[2], strict=True):
        kept = completion.token_ids or []
        assert kept == (full.token_ids or [])[: len(kept)]
        assert completion.finish_reason in ("", full.finish_reason)
    assert asked.count(2) < sum(len(full.token_ids or []) for full in whole[2])


def test_batches_that_come_later_join_those_in_work(
    leaving_model: ModelSpec, by_single_rows: tuple[list[list[int]], list[Any]]
) -> None:
    prompts, wanted = by_single_rows
    batches = batches_of(prompts, 1)
    asked: list[int] = []

    def coming() -> Iterator[Batch | None]:
        """The first at once, the others when they have been asked for in vain three times each."""
        for number, batch in enumerate(batches):
            for _ in range(3 if number else 0):
                asked.append(number)
                yield None
            yield batch
        while True:
            yield None

    found: dict[int, list[list[Completion]]] = {}
    sampler = HFSampler(leaving_model, SETTINGS, rows_at_once=64)
    with watched() as (rows, _):
        for number, completions in sampler.sample_batches(coming()):
            found[number] = completions
    assert tokens_of([found[number][0] for number in sorted(found)]) == wanted[: len(found)]
    assert len(found) > 1
    assert max(rows) > SETTINGS.n
    assert set(asked) == set(range(1, min(len(batches), len(found) + 1)))
