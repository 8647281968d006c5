"""Q-probe: adapt a frozen language model to a reward with a small probe on its embeddings.

Li et al., "Q-Probe: A Lightweight Approach to Reward Maximization for Language Models", ICML 2024.
"""

from qprobe.probe.estimator import QProbe

__all__ = ["QProbe"]
__version__ = "0.1.0"
