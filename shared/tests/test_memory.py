"""A batch is cut into passes that fit the memory, what runs out of it is done in halves, and neither changes an output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import memory
from qprobe.models.language_model import ModelSpec
from qprobe.models.memory import Passes, cut, halve
from qprobe.models.prefix import PrefixRun
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.refilled import RefilledBatch

Ids = Callable[..., list[list[int]]]
LENGTHS = (5, 17, 1, 9)
SETTINGS = SamplingSettings(n=3, temperature=1.0, top_p=0.97, max_new_tokens=10)
SEEDS = [[10 * p + s for s in range(3)] for p in range(4)]
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def with_memory(spec: ModelSpec, gib: float | None) -> ModelSpec:
    return ModelSpec(spec.name, dtype=spec.dtype, device=spec.device, memory_gib=gib)


@contextmanager
def rows_of_passes() -> Iterator[list[int]]:
    """The number of rows in every pass of an embedder that is begun."""
    begun: list[int] = []
    run = Passes.run

    def watched(self: Passes, rows: Any, owner: Any, lengths: Any, need: Any, work: Any) -> None:
        def counted(chosen: list[int]) -> None:
            begun.append(len(chosen))
            work(chosen)

        run(self, rows, owner, lengths, need, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "run", watched)
        yield begun


@contextmanager
def rows_in_work() -> Iterator[list[int]]:
    """The number of rows in a sampler's batch whenever some begin, those that begin included."""
    found: list[int] = []
    join = RefilledBatch._join

    def watched(self: RefilledBatch, rows: Any, last: Any) -> None:
        found.append(len(self._alive) + len(rows))
        join(self, rows, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefilledBatch, "_join", watched)
        yield found


@contextmanager
def at_most(rows: int, spec: ModelSpec, error: Exception) -> Iterator[None]:
    """While inside, a forward pass of more rows runs out of memory."""

    def check(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].shape[0] > rows:
            raise error

    handle = models.load(spec).model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------ the cut


def rows_times_longest(owner: Sequence[int], lengths: Sequence[int]) -> Callable[[Sequence[int]], int]:
    return lambda rows: len(rows) * max(lengths[owner[row]] for row in rows)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(1, 200),
)
def test_every_row_is_in_one_pass_and_every_pass_fits(prompts: list[tuple[int, int]], budget: int) -> None:
    lengths = [length for length, _ in prompts]
    owner = [p for p, (_, count) in enumerate(prompts) for _ in range(count)]
    need = rows_times_longest(owner, lengths)
    found = cut(range(len(owner)), owner, lengths, need, budget)
    assert sorted(row for rows in found for row in rows) == list(range(len(owner)))
    assert all(need(rows) <= budget or len(rows) == 1 for rows in found)
    order = [lengths[owner[row]] for rows in found for row in rows]
    assert order == sorted(order)


def test_prompts_stay_whole_where_they_fit_and_alike_go_together() -> None:
    owner, lengths = [0, 0, 1, 1, 2, 2, 3, 3, 3], [10, 3, 9, 20]
    found = cut(range(9), owner, lengths, rows_times_longest(owner, lengths), 40)
    # 3 and 9 tokens: 4 rows of 9; then 10 tokens: 2 rows; of 20 tokens two rows fit, then one.
    assert found == [[2, 3, 4, 5], [0, 1], [6, 7], [8]]


def test_halves_part_between_prompts_then_between_rows() -> None:
    owner = [0, 0, 0, 1, 2, 2]
    assert halve([0, 1, 2, 3, 4, 5], owner) == [[0, 1, 2, 3], [4, 5]]
    assert halve([0, 1, 2], owner) == [[0, 1], [2]]


# --------------------------------------------------------------------------------------------- the cut changes nothing


@pytest.mark.parametrize("gib", [1e-9, 1e-4, 2e-4])
def test_completions_are_those_of_one_pass(any_tiny_model: ModelSpec, random_ids: Ids, gib: float) -> None:
    prompts = random_ids(LENGTHS)
    whole = HFSampler(any_tiny_model, SETTINGS).sample(prompts, SEEDS)
    with rows_in_work() as found:
        parts = HFSampler(with_memory(any_tiny_model, gib), SETTINGS).sample(prompts, SEEDS)
    assert found == [1] * 12 if gib < 1e-8 else 1 < len(found) <= 12
    assert max(found) < 12
    for a, b in zip((c for row in whole for c in row), (c for row in parts for c in row), strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.seed) == (b.text, b.token_ids, b.finish_reason, b.seed)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


@pytest.mark.parametrize("gib", [1e-9, 1e-4])
def test_states_are_those_of_one_pass(any_tiny_model: ModelSpec, random_ids: Ids, gib: float) -> None:
    prompts, completions = random_ids(LENGTHS), [random_ids(n, seed=3) for n in ((4, 0, 9), (2,), (), (7, 7))]
    whole = HFEmbedder(any_tiny_model, (1, 4)).embed(prompts, completions)
    with rows_of_passes() as begun:
        parts = HFEmbedder(with_memory(any_tiny_model, gib), (1, 4)).embed(prompts, completions)
    assert sum(begun) == 6
    assert len(begun) > 1
    for layer in (1, 4):
        torch.testing.assert_close(parts[layer], whole[layer], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- the estimate


def peak_bytes(work: Callable[[], Any], first: Callable[[], Any] | None = None) -> int:
    """What torch allocated at most at one time during the work; `first` (the work) is done before, for what is made once."""
    (first or work)()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    kineto = recorded.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = sorted(
        (e for e in kineto.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    held = highest = 0
    for event in events:
        held += event.nbytes()
        highest = max(highest, held)
    return highest


# (prompts, their length, samples, new tokens, changes of the model): what dominates the pass.
SHAPES = {
    "keys of the prompts": (24, 150, 1, 8, {}),
    "keys of the rows": (2, 20, 48, 60, {"vocab_size": 300}),
    "scores": (2, 10, 40, 2, {"vocab_size": 30_000, "hidden_size": 16}),
    "a pass over long prompts": (1, 180, 2, 2, {"intermediate_size": 1500}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_estimate_of_sampling_is_what_is_allocated(
    make_model: Callable[..., ModelSpec], random_ids: Ids, name: str, temperature: float
) -> None:
    count, length, n, new_tokens, changes = SHAPES[name]
    if temperature == 0:
        n, count = 1, count * n
    settings = SamplingSettings(n=n, temperature=temperature, top_p=0.9, max_new_tokens=new_tokens)
    sampler = HFSampler(make_model(**changes, eos_token_id=1), settings, rows_at_once=count * n)
    prompts = random_ids([length] * count)
    measured = peak_bytes(lambda: sampler.sample(prompts, [list(range(n))] * count))
    run = sampler.passes.run
    assert run is not None
    estimate = memory.Footprint(run.language_model, run.shared, run.tokens_per_pass).sampling(
        count, length, count * n, new_tokens, temperature == 0
    )
    assert measured <= estimate <= 2 * measured


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_of_a_refilled_batch_is_what_is_allocated(
    make_model: Callable[..., ModelSpec], random_ids: Ids, name: str
) -> None:
    count, length, n, new_tokens, changes = SHAPES[name]
    settings = SamplingSettings(n=n, temperature=1.0, top_p=0.9, max_new_tokens=new_tokens)
    sampler = HFSampler(make_model(**changes, eos_token_id=list(range(1, 250, 60))), settings, rows_at_once=count * n)
    run, largest = sampler.passes.run, 0
    footprint = memory.Footprint(run.language_model, run.shared, run.tokens_per_pass)
    join = RefilledBatch._join

    def estimated(self: RefilledBatch, rows: Any, last: Any) -> None:
        nonlocal largest
        largest = max(largest, self._need(rows))
        join(self, rows, last)

    batches = [(random_ids([length] * count), [[n * p + s for s in range(n)] for p in range(count)])] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefilledBatch, "_join", estimated)
        measured = peak_bytes(
            lambda: list(sampler.sample_batches(batches)), lambda: list(sampler.sample_batches(batches[:1]))
        )
    fixed = footprint.sampling(count, length, count * n, new_tokens, False)
    assert measured <= largest <= 2.5 * measured
    assert largest <= 2 * fixed  # prompts are held until half of a group's have no row


@pytest.mark.parametrize("layers", [(4,), (1, 2, 3)])
def test_the_estimate_of_embedding_is_what_is_allocated(
    any_tiny_model: ModelSpec, random_ids: Ids, layers: tuple[int, ...]
) -> None:
    embedder = HFEmbedder(any_tiny_model, layers)
    prompts, completions = random_ids([100] * 4), [random_ids([40] * 6)] * 4
    measured = peak_bytes(lambda: embedder.embed(prompts, completions))
    run = embedder.passes.run
    assert run is not None
    estimate = memory.Footprint(run.language_model, run.shared, run.tokens_per_pass).reading(4, 100, [40] * 24, layers)
    assert measured <= estimate <= 2.5 * measured


# -------------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(CPU_ERROR),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GiB)"),
        MemoryError("std::bad_alloc"),
    ],
    ids=["cuda", "cpu", "mps", "bad_alloc"],
)
def test_a_pass_out_of_memory_is_done_in_halves_and_remembered(
    tiny_model: ModelSpec, random_ids: Ids, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = random_ids(LENGTHS)
    whole = HFSampler(tiny_model, SETTINGS).sample(prompts, SEEDS)
    sampler = HFSampler(tiny_model, SETTINGS)
    with at_most(2, tiny_model, error), rows_in_work() as found_rows:
        first = sampler.sample(prompts, SEEDS)
        assert found_rows[:3] == [12, 6, 3]  # and then none of more than 2
        assert max(found_rows[3:]) == 2
        del found_rows[:]
        second = sampler.sample(prompts, SEEDS)
    assert max(found_rows) == 2
    for found in (first, second):
        assert [[c.token_ids for c in row] for row in found] == [[c.token_ids for c in row] for row in whole]
    output = capsys.readouterr().out
    assert output.count("ran out of memory on cpu; going on with") == 1
    assert "12 rows at once" in output


def test_an_embedder_out_of_memory_halves_too(tiny_model: ModelSpec, random_ids: Ids) -> None:
    prompts, completions = random_ids(LENGTHS), [random_ids((4, 9), seed=p) for p in range(4)]
    whole = HFEmbedder(tiny_model, (3,)).embed(prompts, completions)[3]
    with at_most(2, tiny_model, RuntimeError(CPU_ERROR)):
        found = HFEmbedder(tiny_model, (3,)).embed(prompts, completions)[3]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_a_single_row_that_does_not_fit_is_a_sentence(tiny_model: ModelSpec, random_ids: Ids) -> None:
    with (
        at_most(0, tiny_model, torch.OutOfMemoryError("out of memory")),
        pytest.raises(RuntimeError, match="single row") as error,
    ):
        HFSampler(tiny_model, SETTINGS).sample(random_ids(LENGTHS), SEEDS)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_taken_for_want_of_memory(tiny_model: ModelSpec, random_ids: Ids) -> None:
    with at_most(0, tiny_model, RuntimeError("mat1 and mat2 differ")), rows_in_work() as begun:
        with pytest.raises(RuntimeError, match="differ"):
            HFSampler(tiny_model, SETTINGS).sample(random_ids(LENGTHS), SEEDS)
        assert begun == [12]


# ---------------------------------------------------------------------------------------------------- the free memory


def test_a_budget_is_the_setting_or_a_share_of_what_is_free(
    tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _devices: 8 * 2**30)
    assert Passes(models.load(tiny_model)).budget() == 4 * 2**30
    assert Passes(models.load(with_memory(tiny_model, 1.5))).budget() == 3 * 2**29
    remembering = Passes(models.load(tiny_model))
    remembering.ceiling = 1000
    assert remembering.budget() == 1000


def write_group(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def test_the_narrowest_group_around_the_process_counts(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/slice/job\n")
    write_group(tmp_path / "slice" / "job", max="max", current="700")
    write_group(tmp_path / "slice", max="1000", current="900", stat="anon 5\ninactive_file 250")
    assert list(memory._group_memory(tmp_path, tmp_path / "membership")) == [350]


def test_the_older_interface_of_groups_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("4:memory:/job\n2:cpu,cpuacct:/job\nnot a line\n")
    stat = "inactive_file 10\ntotal_inactive_file 30"
    write_group(tmp_path / "memory" / "job", limit_in_bytes="1000", usage_in_bytes="400", stat=stat)
    assert list(memory._group_memory(tmp_path, tmp_path / "membership")) == [630]


def test_the_estimate_does_not_exceed_what_this_machine_has(tiny_model: ModelSpec) -> None:
    free = memory.free_memory([torch.device("cpu")])
    assert 2**20 < free < 2**50
    assert PrefixRun(models.load(tiny_model)).tokens_per_pass == 512


@pytest.mark.parametrize("gib", [0.0, -1.0, float("nan")])
def test_a_memory_that_cannot_be_is_refused(gib: float) -> None:
    with pytest.raises(ValueError, match="memory_gib"):
        ModelSpec(memory_gib=gib)
