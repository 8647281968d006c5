"""What `qprobe export` does: a probe as a sequence classifier's folder, or as a repository of the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qprobe.cli import composition, uses
from qprobe.probe.estimator import QProbe
from qprobe.serving.export import SequenceClassifier
from qprobe.serving.origin import Origin

CLASSIFIER, HUB = "sequence-classification", "hub"


def to_sequence_classification(probe: str, folder: Path, overrides: Sequence[str]) -> None:
    """Write the base model with the probe as its head, and say how it is used.

    Args:
        probe: a folder, or a name on the hub.
        overrides: KEY=VALUE each, of the probe's card, such as model.dtype=float32.

    Raises:
        ValueError: a probe that is no such head; see `SequenceClassifier`.
        OSError: the folder is there already or cannot be written.
    """
    loaded = QProbe.from_pretrained(probe)
    use = uses.used(loaded, overrides)
    classifier = SequenceClassifier(loaded, composition.model_spec(use))
    classifier.save(folder)
    if (origin := Origin.of(Path(probe))) is not None:
        rows = list(origin.rows(classifier.tokenizer, use["sampler"]["backend"] == "openai"))
        if rows:
            print(classifier.joined_text(rows).sentence(), file=sys.stderr)
    loading = "".join(f", {name}={value!r}" for name, value in classifier.loading.items())
    pooler = json.dumps({"logit_mean": -classifier.bias})
    print(
        f"{folder}: Q = logit {classifier.bias:+.6g} (config.json, qprobe.bias; the constant moves no choice).\n"
        f"transformers: AutoModelForSequenceClassification.from_pretrained({str(folder)!r}{loading})\n"
        f"vLLM:         vllm serve {folder} --runner pooling --pooler-config '{pooler}'"
    )


def to_hub(probe: str, name: str, private: bool) -> None:
    """Upload a probe with a card that says what its run says of it.

    Args:
        probe: a folder.
        name: of the repository, USER/NAME.
    """
    loaded, origin = QProbe.from_pretrained(probe), Origin.of(Path(probe))
    trained_on, table = ("", "") if origin is None else (origin.counts(), origin.tables())
    print(loaded.push_to_hub(name, private, trained_on=trained_on, table=table))
