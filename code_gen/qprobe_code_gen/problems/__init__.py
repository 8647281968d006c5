"""Programming problems with unit tests: one module a data set."""

from qprobe_code_gen.problems.base import Problem, ProblemSet

__all__ = ["Problem", "ProblemSet"]
