"""The tables of a run folder: stages that make them, rewards, recordings, and where stages run."""
