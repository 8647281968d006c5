"""Rankers that know of programs: rows of the table, asked for by `baselines.names`."""

from __future__ import annotations

from qprobe.baselines.consistency import Agreement
from qprobe_code_gen.programs.agreement import OutputsAgree
from qprobe_code_gen.programs.rewards import UnitTestReward


def of_programs(agreement: Agreement | None, name: str) -> UnitTestReward:
    """What knows the problems of a run, and how completions become programs.

    Raises:
        ValueError: the candidates are no programs.
    """
    if not isinstance(agreement, OutputsAgree):
        raise ValueError(
            f"baselines.names has {name}, which ranks programs, and these candidates are none: leave it out."
        )
    return agreement.reward
