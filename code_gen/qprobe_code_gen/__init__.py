"""Q-probes on code generation: problems, prompts, and rewards by unit tests."""
