"""Programming problems rewarded by unit tests: data sets, prompts, how answers are read and where they end, rewards."""

from qprobe_code_gen.programs.problem import Problem

__all__ = ["Problem"]
