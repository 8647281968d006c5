"""QProbe: the estimator on plain arrays, and what a saved probe says of itself.

probe = QProbe(loss="policy_gradient").fit(features, rewards, prompts)
probe.score(features)                       # (N,) Q values
probe.select(candidates, generator=g)       # index of one of the k rows
probe.save_pretrained("probe/"); QProbe.from_pretrained("probe/")
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from qprobe import losses, network, policy
from qprobe.files import fingerprint, write_whole
from qprobe.network import ProbeNetwork
from qprobe.training import ROWS_AT_A_TIME, Data, ProbeTask, TrainedProbe, TrainingSettings, score_rows, train

CARD_FILE = "probe.json"


@dataclass(frozen=True)
class EmbeddingSource:
    """What embeddings a probe reads. Embeddings of another source mean nothing to it.

    Args:
        model: name of the embedding model, with what identifies its weights.
        layer: hidden layer, counted from the token embeddings (0).
        token: which token's state is read.
        template: fingerprint of the tokenizer with its chat template; empty where unknown.
    """

    model: dict[str, Any]
    layer: int
    token: str = "last"
    template: str = ""

    def __post_init__(self) -> None:
        # The dtype rounds the states and does not change their meaning: a probe works across dtypes.
        object.__setattr__(self, "model", {k: v for k, v in self.model.items() if k not in ("dtype", "attention")})

    @classmethod
    def of(cls, identity: dict[str, Any], layer: int, template: str = "") -> EmbeddingSource:
        """The source that an embedder's `identity()` describes: its key `model` where that is a model's own identity."""
        rest = {key: value for key, value in identity.items() if key != "token"}
        model = rest["model"] if isinstance(rest.get("model"), dict) else rest
        return cls(model, layer, identity.get("token", "last"), template)


class QProbe:
    """A small network that scores embeddings of prompt + completion, and the policy softmax(Q / beta).

    Args:
        loss: a name of `qprobe.losses.LOSSES`.
        beta: temperature at use; None chooses it on held-out prompts, or takes the settings' own where these are too few.
        k: candidates at use, for that choice.
        seed: of everything random in training.
        settings: how it is trained; keyword arguments of `TrainingSettings` may be given instead.

    `use` is free for what an application needs besides the probe (a sampler's settings, the style of the prompts): it is
    saved in the card.

    Learned by `fit`: `network_`, `beta_`, `training_` (steps, learning rate, whether chosen on held-out
    prompts, how many of them).

    Raises:
        ValueError: an unknown loss or option.
    """

    def __init__(
        self,
        loss: str = "policy_gradient",
        beta: float | None = None,
        k: int = 48,
        seed: int = 0,
        settings: TrainingSettings | None = None,
        **options: Any,
    ) -> None:
        losses.find_loss(loss)
        known = {f.name for f in dataclasses.fields(TrainingSettings)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"QProbe has no option {', '.join(unknown)}: it knows {', '.join(sorted(known))}.")
        if settings is not None and options:
            raise ValueError(f"Give either settings or {', '.join(options)}, not both.")
        if beta is not None and not beta >= 0:
            raise ValueError(f"beta is {beta}: a temperature is 0 (argmax) or more.")
        if k < 1:
            raise ValueError(f"k is {k}: a policy chooses from at least one candidate.")
        self.loss = loss
        self.beta = beta
        self.k = k
        self.seed = seed
        self.settings = settings or TrainingSettings(**options)
        self.source: EmbeddingSource | None = None
        self.data_: dict[str, Any] = {}
        self.use: dict[str, Any] = {}

    @property
    def dimension(self) -> int:
        """D, the width of the embeddings that it reads."""
        return self._fitted().dimension

    def fit(
        self, features: ArrayLike | Tensor, rewards: ArrayLike | Tensor, prompts: ArrayLike | Sequence[Any]
    ) -> QProbe:
        """Train on rewards.

        Args:
            features: (N, D) float embeddings of prompt + completion.
            rewards: (N,) float; in [0, 1] for the cross-entropy. With bradley_terry the within-prompt pairs are formed.
            prompts: (N,) ids, numbers or text, of each row's prompt; prompts may have different numbers of rows.

        Raises:
            ValueError: lengths that differ, NaN, rewards that the loss cannot read.
        """
        ids = np.asarray(prompts)
        if ids.ndim != 1:
            raise ValueError(f"prompts has shape {ids.shape}: give one id for each row.")
        rows = _floats(features, "features")
        if rows.ndim == 2 and len(ids) != len(rows):
            raise ValueError(f"prompts has {len(ids)} rows, features has {len(rows)}: give one id for each row.")
        groups = torch.from_numpy(np.unique(ids, return_inverse=True)[1].astype(np.int64))
        return self._fit(Data(rows, _floats(rewards, "rewards").float(), groups))

    def fit_pairs(
        self,
        chosen: ArrayLike | Tensor,
        rejected: ArrayLike | Tensor,
        prompts: ArrayLike | Sequence[Any] | None = None,
    ) -> QProbe:
        """Train on preference pairs by Bradley-Terry (L_QP).

        Args:
            chosen, rejected: (P, D) float embeddings; row i of both is one pair.
            prompts: (P,) ids of the pairs' prompts, so that no prompt is both trained on and held out; None: all differ.

        Raises:
            ValueError: lengths that differ, NaN, or a loss that reads no pairs.
        """
        if losses.find_loss(self.loss).reads != "pairs":
            raise ValueError(f"The loss {self.loss} does not read pairs: use QProbe(loss='bradley_terry').")
        better, worse = _floats(chosen, "chosen"), _floats(rejected, "rejected")
        if better.shape != worse.shape:
            raise ValueError(
                f"chosen has shape {tuple(better.shape)}, rejected {tuple(worse.shape)}: row i of both is one pair."
            )
        pairs = len(better)
        of_pair = np.arange(pairs) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
        if len(of_pair) != pairs:
            raise ValueError(f"prompts has {len(of_pair)} entries for {pairs} pairs: give one a pair.")
        rewards = torch.cat([torch.ones(pairs), torch.zeros(pairs)])
        groups = torch.arange(pairs).repeat(2)
        return self._fit(Data(torch.cat([better, worse]), rewards, groups, torch.from_numpy(of_pair.astype(np.int64))))

    def _fit(self, data: Data) -> QProbe:
        task = ProbeTask(self.loss, self.seed, torch.ones(len(data.sizes), dtype=torch.bool))
        (trained,) = train(data, [task], self.settings, k=self.k, seed=self.seed)
        total = sum(part.double().sum().item() for part in data.features.split(ROWS_AT_A_TIME))
        self.data_ = {
            "rows": len(data.features),
            "prompts": len(torch.unique(data.prompt_of_group)),
            "fingerprint": fingerprint([data.rewards.double().sum().item(), total]),
        }
        return self._take(trained)

    def _take(self, trained: TrainedProbe) -> QProbe:
        self.network_: ProbeNetwork = trained.network
        self.beta_: float = trained.beta if self.beta is None else self.beta
        self.training_ = {
            "steps": trained.steps,
            "chosen_on_held_out_prompts": trained.chosen,
            "held_out_mixed_prompts": trained.held_out_mixed,
            "learning_rate": trained.learning_rate,
            "note": trained.note,
        }
        return self

    @classmethod
    def of(
        cls, trained: TrainedProbe, loss: str, source: EmbeddingSource, data: dict[str, Any], **options: Any
    ) -> QProbe:
        """An estimator around a probe that was trained in a sweep."""
        probe = cls(loss=loss, **options)._take(trained)
        probe.source, probe.data_ = source, data
        return probe

    def score(self, features: ArrayLike | Tensor, source: EmbeddingSource | None = None) -> np.ndarray:
        """Q values.

        Args:
            features: (N, D) float.
            source: where the embeddings are from; checked against the probe's own where both are known.

        Returns: (N,) float32.

        Raises:
            ValueError: features of another width, NaN, or of another source.
        """
        trained = self._fitted()
        if source is not None:
            self.check_source(source)
        rows = _floats(features, "features")
        if rows.ndim != 2 or rows.shape[1] != trained.dimension:
            raise ValueError(f"features has shape {tuple(rows.shape)}: this probe reads (N, {trained.dimension}).")
        losses.check_finite(rows, "features")
        return score_rows(trained, rows).numpy()

    def check_source(self, source: EmbeddingSource) -> None:
        """Raise ValueError where the probe's own source is known and another one."""
        if self.source is not None and source != self.source:
            raise ValueError(
                f"This probe reads {_describe(self.source)}; it was given {_describe(source)}: embed with the probe's own "
                "model and layer, or train a probe on these embeddings."
            )

    def select(
        self,
        candidates: ArrayLike | Tensor,
        beta: float | None = None,
        generator: torch.Generator | None = None,
        source: EmbeddingSource | None = None,
    ) -> int:
        """The index of one of the k candidates, with probability softmax(Q / beta).

        Args:
            candidates: (k, D) float embeddings.
            beta: temperature, 0 is argmax; None is the probe's own `beta_`.
            generator: source of randomness; needed unless beta is 0 (where it settles ties; None takes the first).
        """
        scores = torch.from_numpy(self.score(candidates, source))
        temperature = self.beta_ if beta is None else beta
        if generator is None:
            if temperature != 0:
                raise ValueError(
                    "select draws at random when beta > 0: pass a torch.Generator, or beta=0 for the best."
                )
            return int(policy.selection_weights(scores, 0).argmax())
        return policy.select(scores, temperature, generator)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and card (JSON); no pickle."""
        trained = self._fitted()
        folder = Path(folder)
        (folder / CARD_FILE).unlink(missing_ok=True)  # the card comes last: an older one must not describe new weights
        network.save(trained, folder)
        card = {
            "loss": self.loss,
            "beta": self.beta_,
            "k": self.k,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.settings),
            "training": self.training_,
            "data": self.data_,
            "use": self.use,
            "source": None if self.source is None else dataclasses.asdict(self.source),
        }
        write_whole(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> QProbe:
        """Read a probe from a folder, or from the hub by its id.

        Raises:
            FileNotFoundError: there is no probe there.
            ValueError: the folder holds something else.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _from_hub(str(name), revision)
        if not (folder / CARD_FILE).is_file():
            raise FileNotFoundError(f"{name} holds no saved probe: {CARD_FILE} is missing.")
        try:
            card = json.loads((folder / CARD_FILE).read_text())
            source = card["source"] and EmbeddingSource(**card["source"])
            probe = cls(card["loss"], card["beta"], card["k"], card["seed"], TrainingSettings(**card["settings"]))
            probe.beta_, probe.training_, probe.data_ = card["beta"], card["training"], card["data"]
            probe.source, probe.use = source, dict(card.get("use", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CARD_FILE} is no card of a probe ({error}): save the probe anew.") from error
        probe.network_ = network.load(folder)
        return probe

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the saved probe to the Hugging Face hub; returns the commit's address. Needs `hf auth login`."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a Q-probe"))

    def _fitted(self) -> ProbeNetwork:
        if not hasattr(self, "network_"):
            raise ValueError("This QProbe is not trained yet: call fit or fit_pairs first.")
        return self.network_


def _floats(values: ArrayLike | Tensor, name: str) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        try:
            with warnings.catch_warnings():
                # Arrow, pandas and np.load(mmap_mode="r") give memory that may not be written to. Nothing writes to it here,
                # and a copy could be larger than memory.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                tensor = torch.from_numpy(np.require(values, requirements=["C"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be read as numbers ({error}): give an array of one float type.") from error
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    if tensor.is_complex():
        raise ValueError(f"{name} is {tensor.dtype}: give real numbers.")
    return tensor.float()


def _describe(source: EmbeddingSource) -> str:
    return f"layer {source.layer} of {source.model.get('name')} ({fingerprint(dataclasses.asdict(source))})"


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"Probe {name!r} is neither a folder here nor to be had from the hub: check the name."
        ) from error


def is_saved(folder: Path, inputs: dict[str, Any], use: dict[str, Any]) -> bool:
    """Whether a folder holds a probe that was trained on these inputs and is meant for this use."""
    if not (folder / CARD_FILE).exists():
        return False
    probe = QProbe.from_pretrained(folder)
    return probe.data_ == inputs and probe.use == use
