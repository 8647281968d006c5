"""Hydra groups that both halves use: model, sampler, embedder, probe."""
