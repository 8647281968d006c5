"""Hydra groups of this half: data sets, experiments, paths."""
