"""What a run prints at its end."""

from __future__ import annotations

from qprobe.pipeline.pipeline import Pipeline
from qprobe.report import tables


def closing_words(pipeline: Pipeline) -> str:
    """Tables, a pair of completions, and where everything lies."""
    if pipeline.shard[1] > 1:
        number, count = pipeline.shard
        return (
            f"shard {number} of {count} is done, in {pipeline.run}. When all are, the same command without shard trains, "
            "evaluates and reports."
        )
    parts = []
    for split in pipeline.tests:
        parts.append(tables.to_text(pipeline.results(split)))
        pair = pipeline.example(split, pipeline.shown_loss)
        if pair is not None:
            parts.append(
                f"{pair.task_id}: of its completions the {pipeline.shown_loss} probes prefer this one "
                f"({pair.preferred_verdict}):\n{_indented(pair.preferred)}\nand like this one least "
                f"({pair.other_verdict}):\n{_indented(pair.other)}"
            )
    figures = sorted(str(path) for path in (pipeline.outputs_at / "figures").rglob("*.png"))
    lines = [
        f"tables:   {pipeline.outputs_at / 'tables'}",
        *(f"figure:   {path}" for path in figures),
        f"run:      {pipeline.run}",
    ]
    return "\n\n".join([*parts, "\n".join(lines)])


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.strip("\n").splitlines()) or "    | (empty)"
