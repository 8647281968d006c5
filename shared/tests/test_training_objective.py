"""Looks at held-out prompts: their own chunks, always the same, bounded in cost, and the best step is taken."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from trained import cross_entropy, everything, full_batch, held_out, parameters, planted, quick, train_one

from qprobe.probe import losses
from qprobe.probe.network import StackedNetworks
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, TrainingSettings, batches, score_rows, train
from qprobe.probe.training.objective import CHUNKS_LOOKED_AT, HeldOutWatch, columns_of, loss_values

SETTINGS = TrainingSettings(chunk=5, check_every=10)


def rows(prompts: int, samples: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(prompts * samples, generator=generator) % prompts  # in no order
    features = torch.randn(len(groups), 3, generator=generator)
    return Data(features, (features[:, 0] > 0).float(), groups)


def test_every_loss_is_that_of_its_own_probes_wherever_they_stand() -> None:
    data = rows(6, 5)
    names = ["policy_gradient", "reward_mse", "policy_gradient", "bradley_terry"]
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    weights = (torch.arange(6)[:, None] > torch.arange(4)).float()[data.groups]
    values = loss_values(columns_of(names), scores, data.rewards, data.groups, weights, SETTINGS)
    for m, name in enumerate(names):
        (alone,) = loss_values(
            columns_of([name]), scores[:, [m]], data.rewards, data.groups, weights[:, [m]], SETTINGS
        ).tolist()
        assert values[m].item() == pytest.approx(alone, rel=1e-5)
    own = weights[:, 1] > 0
    assert values[1].item() == pytest.approx(float(losses.reward_mse(scores[own, 1], data.rewards[own])), rel=1e-5)


def test_a_look_reads_a_bounded_number_of_samples_of_each_held_out_prompt() -> None:
    data = rows(8, 37)
    held = torch.tensor([[True, False] * 4, [False] * 8])
    watch = HeldOutWatch(data, ["reward_mse"] * 2, held, SETTINGS, rows_per_batch=100)
    assert bool((watch.rows.diff() > 0).all())
    chunks = 8  # of 37 samples by at most 5: 4 or 5 each
    for prompt in range(8):
        mine = data.groups[watch.rows] == prompt
        sizes = torch.bincount(watch.chunks[mine])
        sizes = sizes[sizes > 0].tolist()
        if prompt % 2:
            assert sizes == []
        else:
            assert len(sizes) == min(chunks, CHUNKS_LOOKED_AT)
            assert set(sizes) <= {4, 5}
    assert bool((torch.unique(data.groups[watch.rows]) % 2 == 0).all())
    assert watch.watched.tolist() == [True, False]


def test_rows_sorted_by_reward_still_make_mixed_chunks() -> None:
    rewards = (torch.arange(40) >= 20).float()
    data = Data(torch.zeros(40, 1), rewards, torch.zeros(40, dtype=torch.int64))
    watch = HeldOutWatch(data, ["policy_gradient"], torch.ones(1, 1, dtype=torch.bool), SETTINGS, 40)
    means = torch.zeros(4).index_add(0, watch.chunks, rewards[watch.rows]) / torch.bincount(watch.chunks)
    assert bool(((means > 0.3) & (means < 0.7)).all())


@pytest.mark.parametrize(("rows_per_batch", "every"), [(1000, 10), (40, 10), (20, 16), (3, 107)])
def test_looks_are_so_rare_that_they_cost_a_quarter_of_training_at_most(rows_per_batch: float, every: int) -> None:
    # 8 prompts of 20 samples are 160 rows to look at; a step reads a batch forward and backward, a look only forward.
    data = rows(8, 20)
    watch = HeldOutWatch(data, ["reward_mse"], torch.ones(1, 8, dtype=torch.bool), SETTINGS, rows_per_batch)
    assert len(watch.rows) == 160
    assert watch.every == every
    assert 2 * len(watch.rows) <= watch.every * rows_per_batch


def look_at(watch: HeldOutWatch, biases: list[tuple[float, ...]]) -> StackedNetworks:
    stack = StackedNetworks(3, seeds=[0] * len(biases[0]))
    for step, values in enumerate(biases):
        with torch.no_grad():
            stack.biases[0][:, 0] = torch.tensor(values)
        watch.look(stack, 10 * step)
    return stack


def test_the_best_of_every_probe_is_kept_and_given_back() -> None:
    held = torch.tensor([[True] * 8, [True] * 8, [False] * 8])
    watch = HeldOutWatch(rows(8, 5), ["reward_mse"] * 3, held, dataclasses.replace(SETTINGS, patience=2), 100)
    # Biases towards the mean reward and away from it: the first probe becomes better twice, the second never.
    stack = look_at(watch, [(0.0, 0.0, 0.0), (0.3, -1.0, 5.0), (0.5, -2.0, 6.0), (9.0, -3.0, 7.0), (9.5, -4.0, 8.0)])
    watch.restore(stack, 40)
    assert stack.biases[0][:, 0].tolist() == [0.5, 0.0, 8.0]
    assert watch.steps == [20, 0, 40]
    assert not watch.finished  # the third has nothing to be watched on


@pytest.mark.parametrize(("patience", "steps"), [(2, [50, 0]), (3, [50, 30]), (None, [50, 30])])
def test_a_probes_patience_is_its_own(patience: int | None, steps: list[int]) -> None:
    held = torch.ones(2, 8, dtype=torch.bool)
    watch = HeldOutWatch(rows(8, 5), ["reward_mse"] * 2, held, dataclasses.replace(SETTINGS, patience=patience), 100)
    # The second is worse at two looks before it is best: it waits for that, or does not see it any more.
    stack = look_at(watch, [(0.05 * i, second) for i, second in enumerate([0.2, 2.0, 3.0, 0.5, 4.0, 4.0])])
    assert not watch.finished
    watch.restore(stack, 50)
    assert watch.steps == steps
    look_at(watch, [(7.0, 7.0)] * 3)
    assert watch.finished == (patience is not None)


def test_patience_ends_training_that_no_longer_helps_and_null_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    data = planted([4] * 30, dimension=20, noise=0.5)
    settings = full_batch(held_out=0.5, minimum_mixed=3, steps=400, learning_rate=0.03, patience=None)
    made: list[int] = []
    step = batches.StackedAdamW.step
    monkeypatch.setattr(batches.StackedAdamW, "step", lambda *arguments: made.append(1) or step(*arguments))

    def count(*more: ProbeTask, **changes: Any) -> tuple[TrainedProbe, int]:
        made.clear()
        tasks = [ProbeTask("reward_cross_entropy", 0, everything(data)), *more]
        return train(data, tasks, dataclasses.replace(settings, **changes), k=4)[0], len(made)

    whole, all_steps = count()
    assert 0 < whole.steps < 300
    assert all_steps == 400
    patient, steps = count(patience=3)
    assert steps == whole.steps + 3 * settings.check_every
    assert torch.equal(parameters(whole.network), parameters(patient.network))
    # A companion with too few mixed prompts to hold any out has no loss to watch: it gets all its steps.
    few = ProbeTask("reward_mse", 0, torch.arange(30) < 15)
    assert count(few, patience=3, minimum_mixed=8)[1] >= 400


def test_the_step_of_the_lowest_held_out_loss_is_taken() -> None:
    data = planted([4] * 30, dimension=20, noise=0.5)
    settings = full_batch(held_out=0.5, minimum_mixed=3, steps=105, learning_rate=0.03)
    held = held_out(data, settings)
    assert 14 <= int(held.sum()) <= 15
    steps = [*range(10, 101, 10), 105]
    networks = [
        train_one(
            data, "reward_cross_entropy", dataclasses.replace(settings, held_out=0.0, steps=s), groups=~held
        ).network
        for s in steps
    ]
    rows = held[data.groups]
    losses = [cross_entropy(score_rows(n, data.features[rows]), data.rewards[rows]) for n in networks]
    best = int(np.argmin(losses))
    assert 0 < best < len(steps) - 1  # it overfits, so that there is something to see
    assert losses[best] < np.log(2)  # better than step 0, where every score is 0
    found = train_one(data, "reward_cross_entropy", settings)
    assert found.steps == steps[best]
    assert torch.equal(parameters(found.network), parameters(networks[best]))


def test_the_last_step_is_looked_at_wherever_it_falls() -> None:
    found = train_one(planted([6] * 40, noise=0.1), "reward_mse", quick(held_out=0.3, minimum_mixed=3, steps=17))
    assert (found.steps, found.chosen) == (17, True)


def test_a_probe_that_only_worsens_on_held_out_prompts_stays_at_its_start() -> None:
    data = planted([4] * 40)
    settings = quick(held_out=0.5, minimum_mixed=3)
    held = held_out(data, settings)[data.groups]
    flipped = dataclasses.replace(data, rewards=torch.where(held, 1 - data.rewards, data.rewards))
    found = train_one(flipped, "policy_gradient", settings)
    assert found.steps == 0
    assert not parameters(found.network).any()
