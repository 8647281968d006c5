"""Baselines: rows of the table that no probe made, paired on the same prompts.

A *rival* is another policy (few-shot, fine-tuned); a *ranker* scores the candidates that the probes choose from.
"""

from qprobe.baselines.base import Baseline, Lesson, Lessons, Ranker, Rival
from qprobe.baselines.runner import Baselines

__all__ = ["Baseline", "Baselines", "Lesson", "Lessons", "Ranker", "Rival"]
