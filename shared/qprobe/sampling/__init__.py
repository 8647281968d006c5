"""Completions of prompts from a frozen model: one protocol, one module a back end."""

from qprobe.sampling.base import Completion, Sampler, SamplingSettings, StopRule, sample_seeds

__all__ = ["Completion", "Sampler", "SamplingSettings", "StopRule", "sample_seeds"]
