"""The executor of untrusted programs. README.md in this folder says what each layer stops and what none does."""

from .executor import Executor
from .verdicts import JUDGE, Execution, ExecutorError, Layer, Limits, Program, Reference, Verdict

__all__ = ["JUDGE", "Execution", "Executor", "ExecutorError", "Layer", "Limits", "Program", "Reference", "Verdict"]
