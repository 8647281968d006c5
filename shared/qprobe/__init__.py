"""Q-probe: adapt a frozen language model to a reward with a small probe on its embeddings."""
