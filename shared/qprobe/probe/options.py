"""Which options a QProbe has."""

from __future__ import annotations

import dataclasses
from typing import Any

from qprobe.probe.training import TrainingSettings

# The constructor's own parameters, and the fields of TrainingSettings that may be given beside them.
OWN = ("loss", "beta", "k", "seed", "solver", "l2")
OPTIONS = {field.name for field in dataclasses.fields(TrainingSettings)} - set(OWN)


def check_solver(loss: str, solver: str, l2: float | str) -> None:
    if solver not in ("auto", "steps"):  # these any loss has; asking imports scipy, which a probe in use does not need
        from qprobe.probe.solved import solver_of

        solver_of(loss, solver)
    if l2 != "auto" and (isinstance(l2, str) or not l2 > 0):
        raise ValueError(f"l2 is {l2!r}: give a strength above 0 (infinity is the difference of means), or auto.")


def check_options(options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - OPTIONS):
        raise ValueError(f"QProbe has no option {', '.join(unknown)}: it knows {', '.join(sorted(OPTIONS))}.")
