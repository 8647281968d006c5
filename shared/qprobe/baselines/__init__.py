"""Baselines: rows of the table that no probe made, paired on the same prompts.

A *rival* is another policy (few-shot, fine-tuned); a *ranker* scores the candidates that the probes choose from.
"""

from qprobe.baselines.base import Baseline, Ranker, Rival, TrainingData, TrainingRow
from qprobe.baselines.runner import Baselines

__all__ = ["Baseline", "Baselines", "Ranker", "Rival", "TrainingData", "TrainingRow"]
