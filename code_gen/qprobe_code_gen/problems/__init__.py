"""Problems, one module a data set: programs with unit tests, questions with a number."""

from qprobe_code_gen.problems.base import Problem, ProblemSet

__all__ = ["Problem", "ProblemSet"]
