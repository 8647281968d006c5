"""The local runner: batch by batch, each written before the next begins."""

from collections.abc import Iterable, Iterator

import pytest

from qprobe.run.runners.local import Work, run_stage


def test_the_runner_counts_what_it_made_and_takes_batches_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []

    def stage(batches: Iterable[str]) -> Iterator[tuple[str, int]]:
        for batch in batches:
            events.append(f"work {batch}")
            yield batch, 1

    works = [Work("a", 3, True), Work("b", 2, False), Work("c", 1, False)]
    made = run_stage("name", works, stage, lambda batch, rows: events.append(f"write {batch}"))
    assert made == 3
    assert events == ["work b", "write b", "work c", "write c"]
    assert "6/6" in capsys.readouterr().err
