"""From scores to results: sweeps of probes, layers, controls, and what may be believed."""
