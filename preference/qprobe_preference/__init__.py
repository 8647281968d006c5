"""Q-probes on preference pairs."""
