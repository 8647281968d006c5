"""Rows with a planted direction, and probes that are trained on them in a moment."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qprobe.probe.network import ProbeNetwork
from qprobe.probe.ranking import mixed_prompts
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, TrainingSettings, train, trainer

GOODNESS, HARDNESS = 0, 1  # features that differ within a prompt, and only between prompts


def planted(sizes: list[int], dimension: int = 8, noise: float = 0.3, seed: int = 0) -> Data:
    """Rewards of 0 and 1 from goodness - hardness; feature 1 says how hard the prompt is, the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    features = torch.randn(len(groups), dimension, generator=generator)
    features[:, HARDNESS] = torch.randn(len(sizes), generator=generator)[groups]
    margin = features[:, GOODNESS] - features[:, HARDNESS] + noise * torch.randn(len(groups), generator=generator)
    return Data(features, (margin > 0).float(), groups)


def everything(data: Data) -> Tensor:
    return torch.ones(len(data.sizes), dtype=torch.bool)


def quick(**changes: Any) -> TrainingSettings:
    values = {"steps": 60, "learning_rate": 0.02, "held_out": 0.0, "check_every": 10, "chunk": 4, "chunks_per_batch": 8}
    return TrainingSettings(**values | changes)


def full_batch(**changes: Any) -> TrainingSettings:
    return quick(**{"chunk": 1000, "chunks_per_batch": 1000} | changes)


def train_one(
    data: Data, loss: str, settings: TrainingSettings, groups: Tensor | None = None, **more: Any
) -> TrainedProbe:
    task = ProbeTask(loss, more.pop("task_seed", 0), everything(data) if groups is None else groups)
    return train(data, [task], settings, k=more.pop("k", 4), **more)[0]


def parameters(network: ProbeNetwork) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def held_out(data: Data, settings: TrainingSettings, groups: Tensor | None = None) -> Tensor:
    """Which groups the lot of seed 0 holds out."""
    mixed = torch.from_numpy(mixed_prompts(data.rewards.numpy(), data.groups.numpy()))
    task = ProbeTask("reward_mse", 0, everything(data) if groups is None else groups)
    return trainer._held_out(data, task, settings, mixed).held


def cross_entropy(scores: Tensor, rewards: Tensor) -> float:
    q, r = scores.double().numpy(), rewards.double().numpy()
    return float(np.mean(np.logaddexp(0, q) - r * q))
