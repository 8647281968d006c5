"""Passes that probes share: whole epochs, batches as large as each needs, steps of AdamW where there is something to learn."""

import dataclasses

import pytest
import torch
from torch import Tensor
from trained import full_batch, planted, quick, train_one

from qprobe.probe.training import Data, TrainingSettings
from qprobe.probe.training.batches import ADAM_EPSILON, Passes, StackedAdamW, total_steps


def rows(sizes: list[int]) -> Data:
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Data(torch.zeros(len(groups), 1), torch.zeros(len(groups)), groups)


@pytest.mark.parametrize("chunk", [1, 4, 10, 100])
def test_an_epoch_sees_every_row_once_in_even_chunks_of_one_prompt(chunk: int) -> None:
    sizes = torch.tensor([1, 12, 4, 25, 10])
    groups = torch.repeat_interleave(torch.arange(5), sizes)[
        torch.randperm(52, generator=torch.Generator().manual_seed(1))
    ]
    cut_into = Passes(torch.arange(52), groups, torch.ones(5, 1), sizes, chunk, batch=3)
    generator = torch.Generator().manual_seed(0)
    batches = list(cut_into.epoch(generator))
    assert len(batches) == cut_into.batches_per_epoch
    seen = torch.cat([at for at, _ in batches])
    assert torch.equal(seen.sort().values, torch.arange(52))
    cut: dict[int, list[int]] = {group: [] for group in range(5)}
    for at, chunks in batches:
        assert bool((at.diff() > 0).all())
        assert set(chunks.tolist()) == set(range(int(chunks.max()) + 1))
        assert int(chunks.max()) < 3
        for number in range(int(chunks.max()) + 1):
            (group,) = set(groups[at[chunks == number]].tolist())
            cut[group].append(int((chunks == number).sum()))
    for group, size in enumerate(sizes.tolist()):
        assert len(cut[group]) == -(-size // chunk)
        assert max(cut[group]) - min(cut[group]) <= 1
    again = list(cut_into.epoch(generator))
    if chunk < 100:  # chunks come in random order
        assert [set(at.tolist()) for at, _ in batches] != [set(at.tolist()) for at, _ in again]
    if 1 < chunk < 25:  # and prompts are cut by lot, anew in every epoch
        cuts = [
            {frozenset(at[c == n].tolist()) for at, c in epoch for n in set(c.tolist())} for epoch in (batches, again)
        ]
        assert len(cuts[0] - cuts[1]) >= 4


def test_epochs_count_as_the_paper_does() -> None:
    # 464 prompts x 200 samples, 100 chunks of 10 samples in a batch: 1000 rows, so 93 batches an epoch, 150 epochs.
    data = rows([200] * 464)
    everything = torch.ones(1, 464, dtype=torch.bool)
    settings = TrainingSettings(steps=None)
    passes = Passes.over(data, everything, settings)
    assert (passes.batch, passes.batches_per_epoch) == (100, 93)
    assert total_steps(passes, settings) == 150 * 93
    assert total_steps(passes, TrainingSettings(steps=500)) == 500
    assert len(next(iter(passes.epoch(torch.Generator().manual_seed(0))))[0]) == 1000


def test_every_probe_finds_as_many_chunks_of_its_own_in_a_batch_as_alone() -> None:
    data = rows([20] * 60)
    fitted = torch.stack([torch.arange(60) % 3 != third for third in range(3)])
    settings = TrainingSettings(chunks_per_batch=10, steps=None, epochs=1)
    alone = [Passes.over(data, mask[None], settings) for mask in fitted]
    assert [(p.batch, total_steps(p, settings)) for p in alone] == [(10, 8)] * 3  # 40 prompts of two chunks
    shared = Passes.over(data, fitted, settings)
    assert (shared.batch, total_steps(shared, settings)) == (15, 8)
    own = torch.zeros(3)
    for at, _ in shared.epoch(torch.Generator().manual_seed(0)):
        own += shared.weights[shared.groups[at]].sum(0)
    assert own.tolist() == [800.0] * 3
    # Never more than there is.
    assert Passes.over(data, fitted, TrainingSettings(chunks_per_batch=1000)).batch == 120


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_optimiser_is_torchs_adamw_with_steps_of_each_networks_own(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, generator=generator)]
    rates = [0.1, 0.01, 0.001]
    stacked = [p.clone() for p in start]
    ours = StackedAdamW(stacked[:1], stacked[1:], torch.tensor(rates), decay)
    alone = [[p[m].clone().requires_grad_() for p in start] for m in range(3)]
    theirs = [
        torch.optim.AdamW(
            [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}],
            lr=rate,
            eps=ADAM_EPSILON,
        )
        for (weight, bias), rate in zip(alone, rates, strict=True)
    ]
    for _ in range(12):
        taught = torch.rand(3, generator=generator) < 0.6
        gradients = [torch.randn(p.shape, generator=generator) * taught.reshape(-1, *[1] * (p.ndim - 1)) for p in start]
        ours.step(gradients, taught)
        for m in taught.nonzero()[:, 0].tolist():
            for parameter, gradient in zip(alone[m], gradients, strict=True):
                parameter.grad = gradient[m]
            theirs[m].step()
    for m in range(3):
        for found, expected in zip(stacked, alone[m], strict=True):
            torch.testing.assert_close(found[m], expected.detach(), rtol=1e-5, atol=1e-6)


def moved(before: Tensor, after: Tensor) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_a_network_that_a_batch_does_not_teach_stands_still() -> None:
    weight, bias = torch.ones(2, 1, 3), torch.ones(2, 1)
    optimiser = StackedAdamW([weight], [bias], torch.tensor([0.1, 0.1]), 0.5)
    optimiser.step([torch.ones(2, 1, 3), torch.ones(2, 1)], torch.tensor([True, True]))
    before = weight.clone(), bias.clone()
    optimiser.step([torch.zeros(2, 1, 3), torch.zeros(2, 1)], torch.tensor([True, False]))
    assert moved(before[0], weight) == moved(before[1], bias) == [True, False]  # by momentum and decay, where taught


def test_epochs_count_passes_and_steps_count_steps() -> None:
    data = planted([9] * 10)  # chunks of at most 4: 3 a prompt, 30 chunks, 8 in a batch: 4 steps an epoch
    assert train_one(data, "reward_mse", quick(steps=None, epochs=3)).steps == 12
    assert train_one(data, "reward_mse", quick(steps=5, epochs=3)).steps == 5


def test_weight_decay_spares_the_bias() -> None:
    data = planted([4] * 30)
    rewards = dataclasses.replace(data, rewards=torch.ones(120))
    found = train_one(rewards, "reward_mse", full_batch(steps=800, learning_rate=0.02, weight_decay=5.0))
    assert float(found.network.biases[0].detach()) == pytest.approx(1.0, abs=0.02)
