"""Hydra groups that both halves use: model, sampler, embedder, probe, evaluation. `run` is for a user's own work."""
