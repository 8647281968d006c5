"""Rankers that know of programs: rows of the table, asked for by `baselines.names`."""

from __future__ import annotations

from qprobe.baselines.consistency import Agreement, Remembered
from qprobe_code_gen.programs.agreement import OutputsAgree
from qprobe_code_gen.programs.rewards import UnitTestReward


def of_programs(agreement: Agreement | None, name: str) -> UnitTestReward:
    """What knows the problems of a run, and how completions become programs.

    Raises:
        ValueError: the candidates are no programs.
    """
    own = agreement.agreement if isinstance(agreement, Remembered) else agreement
    if not isinstance(own, OutputsAgree):
        raise ValueError(
            f"baselines.names has {name}, which ranks programs, and these candidates are none: leave it out."
        )
    return own.reward
