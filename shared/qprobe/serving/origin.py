"""The run folder that a saved probe lies in, and what it holds of the probe: completions, how many, tables of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qprobe import store
from qprobe.models.tokenizer import Tokenizer
from qprobe.report import tables
from qprobe.report.results import Results
from qprobe.serving.export import Row
from qprobe.store.table import Table, found_table


@dataclass(frozen=True)
class Origin:
    """Where a probe was trained.

    Args:
        run: the run folder (or the folder of a run's outputs, which holds no completions).
        split: whose prompts it was trained on.
    """

    run: Path
    split: str

    @classmethod
    def of(cls, probe: Path) -> Origin | None:
        """The run of a probe in RUN/probes/SPLIT/LOSS; None of one that lies elsewhere."""
        folder = probe.resolve()
        probes = folder.parent.parent
        return cls(probes.parent, folder.parent.name) if folder.is_dir() and probes.name == "probes" else None

    def counts(self) -> str:
        """How many completions of how many prompts it was trained on, as words; empty where they are not here."""
        if (table := self._completions()) is None:
            return ""
        task_ids = table.read(columns=["task_id"])["task_id"].to_pylist()
        return f"{len(task_ids)} completions of {len(set(task_ids))} prompts"

    def tables(self) -> str:
        """The tables of the run's results, as Markdown; empty where there are none."""
        return "\n".join(tables.to_markdown(Results.read(path)) for path in sorted(self.run.glob("results/*.json")))

    def rows(self, tokenizer: Tokenizer, from_api: bool = False) -> Iterator[Row]:
        """The completions that it was trained on, with the token ids that were embedded.

        Args:
            tokenizer: of the model that embeds.
            from_api: whether an API drew them, which renders prompts by itself: what is known of them is plain text.
        """
        if (table := self._completions()) is None:
            return
        rendered = found_table(self.run / "prompts" / self.split, store.PROMPTS).read().to_pylist()
        prompts = {row["task_id"]: row for row in rendered}
        for row in table.read(columns=["task_id", "completion", "token_ids"]).to_pylist():
            prompt, text, ids = prompts[row["task_id"]], row["completion"], row["token_ids"]
            templated = prompt["messages"] is not None and not from_api
            if ids is None:  # as `embedding.tokens_to_read`
                own = tokenizer.encode_prompt(prompt["prompt"], templated), tokenizer.encode_completion(text)
            else:
                own = prompt["prompt_token_ids"], ids
            yield Row(prompt["prompt"], own[0], templated, text, own[1])

    def _completions(self) -> Table | None:
        folder = self.run / "completions" / f"{self.split}.sample"
        return found_table(folder, store.COMPLETIONS) if folder.is_dir() else None
