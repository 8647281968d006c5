"""SHP (Ethayarajh et al. 2022, hub `stanfordnlp/SHP`): two comments under one Reddit post, of which one scored higher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qprobe_preference.pairs.base import Found
from qprobe_preference.pairs.rows import Row, needed

_COLUMNS = ("post_id", "history", "human_ref_A", "human_ref_B", "labels", "score_ratio")


def pairs(rows: Iterable[Row], minimum_ratio: float = 2.0) -> Iterator[Found | str]:
    """A pair of each row, or why there is none.

    Args:
        minimum_ratio: of the preferred comment's score to the other's, 1 or more; SHP's authors advise 2, which is the paper's.

    Raises:
        ValueError: a label or ratio that is none.
    """
    if minimum_ratio < 1:
        raise ValueError(f"dataset.options.minimum_ratio is {minimum_ratio}: the better comment's ratio is 1 or more.")
    for row in rows:
        post, history, a, b, label, ratio = needed(row, _COLUMNS)
        if label not in (0, 1) or not isinstance(ratio, int | float):
            raise ValueError(
                f"{row.place}: labels is {label!r} and score_ratio {ratio!r}; SHP has 0 or 1, and a number there."
            )
        if ratio < minimum_ratio:
            yield "low_ratio"
            continue
        chosen, rejected = (a, b) if label == 1 else (b, a)
        yield Found(({"role": "user", "content": history},), chosen, rejected, cluster=f"post {post}")
