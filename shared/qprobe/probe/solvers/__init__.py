"""Linear probes solved, not trained by steps: closed form where there is one, L-BFGS elsewhere, all choices by left-out scores.

`solve(Rows(blocks, rewards, groups), loss)` gives a `Solution`; `cross_fitted` scores rows by solutions that did not see them.
Pure mathematics on arrays: nothing here knows models, tables or runs.
"""

from qprobe.probe.solvers.choice import Candidate, Chosen
from qprobe.probe.solvers.rows import NothingToLearn, Rows
from qprobe.probe.solvers.solve import STRENGTHS, Solution, cross_fitted, solve
from qprobe.probe.solvers.space import block_weightings
from qprobe.probe.solvers.work import CLOSED_FORM

__all__ = [
    "CLOSED_FORM",
    "STRENGTHS",
    "Candidate",
    "Chosen",
    "NothingToLearn",
    "Rows",
    "Solution",
    "block_weightings",
    "cross_fitted",
    "solve",
]
