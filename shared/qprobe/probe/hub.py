"""A probe on the Hugging Face hub: its files and a card for people, uploaded by the hub's own mixin."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

if TYPE_CHECKING:
    from qprobe.probe.estimator import QProbe

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A Q-probe ([arXiv 2402.14688]({{ paper_url }})): it scores completions by the embeddings of {{ model }}.
Several completions of a prompt are drawn, and one of them is chosen with probability softmax(Q/β). The model
itself is not changed.

| what | |
| :--- | :--- |
{% for what, value in facts.items() -%}
| {{ what }} | {{ value }} |
{% endfor %}
## How to use

```python
from qprobe import QProbe
from qprobe.cli import composition

probe = QProbe.from_pretrained("{{ name }}")
{% if answers -%}
print(composition.policy(probe).answer("your prompt"))  # draws, embeds, scores, chooses
{% endif -%}
scores = probe.score(embeddings)  # (N, {{ dimension }}): {{ reads }}
```
{% if answers %}
On the command line: `qprobe answer --probe {{ name }} "your prompt"`. Embeddings of another model mean nothing to it and are
refused.
{% endif %}
{%- if table %}
## Results

{{ table }}
{% endif %}"""


class OnHub(
    ModelHubMixin,
    library_name="qprobe",
    tags=["q-probe", "best-of-n", "reward"],
    paper_url="https://arxiv.org/abs/2402.14688",
    model_card_template=_TEMPLATE,
):
    """A probe as the hub's mixin saves and uploads it.

    Args:
        probe: trained.
    """

    def __init__(self, probe: QProbe) -> None:
        self.probe = copy.copy(probe)
        for place in _places(probe):
            self.probe.use, self.probe.data_ = (_without(place, value) for value in (self.probe.use, self.probe.data_))

    def _save_pretrained(self, save_directory: Path) -> None:
        self.probe.save_pretrained(save_directory)

    def generate_model_card(self, *, name: str, trained_on: str, table: str) -> ModelCard:
        """The card.

        Args:
            name: of the repository.
            trained_on: how much, where the probe does not say so itself.
            table: of results, as Markdown.
        """
        source, info = self.probe.source, self._hub_mixin_info
        known: dict[str, Any] = vars(info.model_card_data)
        data = ModelCardData(**known | {"base_model": None if source is None else _base_model(source.model)})
        card: ModelCard = ModelCard.from_template(
            data,
            template_str=info.model_card_template,
            paper_url=info.paper_url,
            name=name,
            model="a language model" if source is None else f"`{_name(source.model)}`",
            facts=_facts(self.probe, trained_on),
            answers="sampler" in self.probe.use and self.probe.use.get("embedder", {}).get("backend") != "given",
            dimension=self.probe.dimension,
            reads=_reads(self.probe),
            table=table,
        )
        return card


def push(probe: QProbe, name: str, private: bool, trained_on: str, table: str) -> str:
    """Upload; arguments as of `QProbe.push_to_hub`. Returns the address of the commit.

    Raises:
        OSError: the hub does not take it, in one sentence.
    """
    words = {"name": name, "trained_on": trained_on, "table": table}
    try:
        return str(
            OnHub(probe).push_to_hub(name, private=private, commit_message="Upload a Q-probe", model_card_kwargs=words)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".: ")
        raise OSError(
            f"The hub did not take the probe as {name!r} ({first}): check the name, the network, and `hf auth login` with a "
            "token that may write."
        ) from error


def _facts(probe: QProbe, trained_on: str) -> dict[str, str]:
    """What a reader asks of a probe, in words."""
    facts: dict[str, Any] = {}
    if probe.source is not None:
        model, source = probe.source.model, probe.source
        facts["base model"] = f"`{_name(model)}`"
        if model.get("content"):
            facts["its content"] = f"`{model['content']}` (SHA-256, first 16 digits)"
        else:
            facts["its revision"] = f"`{model.get('revision') or 'the newest when it was trained'}`"
        facts |= {key: f"`{json.dumps(model[key])}`" for key in ("adapter",) if model.get(key)}
        facts["reads"] = _reads(probe)
        facts["tokenizer and chat template"] = f"`{source.template}` (fingerprint)" if source.template else "not known"
    facts["loss"] = f"`{probe.loss}`"
    hidden = probe.network_.hidden
    facts["network"] = f"linear, {probe.dimension} weights" if not hidden else f"ReLU, hidden widths {list(hidden)}"
    own = {name: probe.data_[name] for name in ("rows", "prompts") if isinstance(probe.data_.get(name), int)}
    facts["trained on"] = (
        f"{own['rows']} completions of {own['prompts']} prompts" if len(own) == 2 else trained_on
    ) or "-"
    facts["β, the temperature of the choice"] = f"{probe.beta_:g}"
    facts["candidates"] = f"{probe.k} in training"
    if note := str(probe.training_.get("note", "")).strip():
        facts["training"] = note
    return {what: str(value).replace("|", "\\|").replace("\n", " ") for what, value in facts.items()}


def _reads(probe: QProbe) -> str:
    source = probe.source
    if source is None:
        return "embeddings of the user's own"
    layers = source.blocks or (source.layer,)
    said = [f"layer {layer}" for layer in layers if layer >= 0]
    said += ["likelihood columns"] if any(layer < 0 for layer in layers) else []
    return f"{', '.join(said)}{' beside each other' if len(said) > 1 else ''}, at the {source.token} token of prompt + completion"


def _name(model: dict[str, Any]) -> str:
    return str(model.get("name") or model.get("model") or "a model")


def _places(probe: QProbe) -> list[str]:
    """Folders and files of this machine that a card names: of the model, its adapter, features of the user's own."""
    model, embedder = probe.use.get("model", {}), probe.use.get("embedder", {})
    named = [model.get("adapter"), *(embedder.get("files") or [])]
    if probe.source is not None and probe.source.model.get("content"):
        named.append(model.get("name"))
    return [place for place in map(str, filter(None, named)) if Path(place).name != place]


def _without(place: str, value: Any) -> Any:
    """A copy in which a folder or file of this machine has only its last part: the rest is nobody's business."""
    if isinstance(value, dict):
        return {key: _without(place, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(place, item) for item in value]
    return Path(place).name if value == place else value


def _base_model(model: dict[str, Any]) -> str | None:
    """The hub's name of a model, where it has one."""
    name = str(model.get("name", ""))
    return name if not model.get("content") and _HUB_NAME.fullmatch(name) else None
