"""The probe and its mathematics: losses, training, choice among candidates, metrics. It knows arrays and nothing else."""

from qprobe.probe.estimator import QProbe

__all__ = ["QProbe"]
