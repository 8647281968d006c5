"""Baselines: rows of the table that no probe made, paired on the same prompts.

A *rival* is another policy (few-shot, fine-tuned); a *ranker* scores the candidates that the probes choose from; a *fitted* score
does so from hidden states and rewards, as probes do.
"""

from qprobe.baselines.base import Baseline, Fitted, Ranker, Rival, TrainingData, TrainingRow
from qprobe.baselines.runner import Baselines

__all__ = ["Baseline", "Baselines", "Fitted", "Ranker", "Rival", "TrainingData", "TrainingRow"]
