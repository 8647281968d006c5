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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from qprobe.files import fingerprint, write_whole
from qprobe.probe import losses, network, selection
from qprobe.probe.arrays import floats
from qprobe.probe.calibration import CALIBRATION_FILE, load_calibration, save_calibration
from qprobe.probe.card import CARD_FILE, EmbeddingSource, described, from_hub
from qprobe.probe.ids import dense_ids
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.options import OPTIONS, OWN, check_options, check_solver
from qprobe.probe.own_state import own_state
from qprobe.probe.training import (
    ROWS_AT_A_TIME,
    Data,
    ProbeTask,
    TrainedProbe,
    TrainingSettings,
    refitted,
    score_rows,
    train,
)
from qprobe.probe.training.alike import why_alike


class QProbe:
    """A small network that scores embeddings of prompt + completion, and the policy softmax(Q / beta).

    Args:
        loss: a name of `qprobe.probe.losses.LOSSES`.
        beta: temperature at use; None chooses it on held-out prompts, or takes the settings' own where these are too few.
        k: candidates at use, for that choice.
        seed: of everything random in training.
        settings: how it is trained by steps; keyword arguments of `TrainingSettings` may be given instead.
        solver: "closed_form" (reward_mse, centred_mse) or "lbfgs" (the other losses) solves a linear probe, and chooses L2 and
            beta by left-out scores of all prompts; "steps" trains by stochastic steps. "auto" solves, unless something is said
            of the training (hidden layers, a number of steps, ...), the table is too large to be held, or has nothing to choose.
        l2: strength of L2 of a solver, > 0, as a share of the largest variance along an axis of the features, infinity being
            the difference of means; "auto" chooses it.

    `get_params`, `set_params` and the signature of `fit` are as scikit-learn wants them: `sklearn.base.clone` makes an
    untrained copy, and a grid search may vary any option (with a scoring function of its own: `score` gives Q values).

    `use` is free for what an application needs besides the probe (a sampler's settings, the style of the prompts): it is
    saved in the card.

    Learned by `fit`: `network_`, `beta_`, `training_` (steps and learning rate, or solver and L2; whether chosen on held-out or
    left-out prompts, how many of them), `solution_` where it was solved (`qprobe.probe.solvers.Solution`), and `calibration_`:
    how likely a choice is right (`qprobe.probe.calibration`), of the loss "auto" on rewards in [0, 1], else None.

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
        solver: str = "auto",
        l2: float | str = "auto",
        **options: Any,
    ) -> None:
        losses.find_loss(loss)
        check_solver(loss, solver, l2)
        check_options(options)
        if settings is not None and any(getattr(settings, name) != value for name, value in options.items()):
            raise ValueError(f"Give either settings or {', '.join(options)}, not both.")
        if beta is not None and not beta >= 0:
            raise ValueError(f"beta is {beta}: a temperature is 0 (argmax) or more.")
        if k < 1:
            raise ValueError(f"k is {k}: a policy chooses from at least one candidate.")
        self.loss = loss
        self.beta = beta
        self.k = k
        self.seed = seed
        self.solver = solver
        self.l2 = l2
        self.settings = settings or TrainingSettings(**options)
        self.source: EmbeddingSource | None = None
        self.data_: dict[str, Any] = {}
        self.use: dict[str, Any] = {}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What the constructor was given or took by default, by name, as scikit-learn asks for it; `deep` changes nothing."""
        # One field of the settings has the name of a parameter: only as a whole do they say another value of it.
        whole = self.settings.beta != TrainingSettings.beta
        parameters = {name: getattr(self, name) for name in OWN} | {"settings": self.settings if whole else None}
        return parameters | {name: getattr(self.settings, name) for name in sorted(OPTIONS)}

    def set_params(self, **parameters: Any) -> QProbe:
        """Change parameters by name, for the next `fit`; returns itself.

        Raises:
            ValueError: an unknown name, or a value out of its range; nothing is changed then.
        """
        options = {name: value for name, value in parameters.items() if name not in (*OWN, "settings")}
        check_options(options)
        settings = dataclasses.replace(parameters.get("settings") or self.settings, **options)
        own = {name: parameters.get(name, getattr(self, name)) for name in OWN}
        changed = type(self)(**own, settings=settings)
        for name in (*OWN, "settings"):
            setattr(self, name, getattr(changed, name))
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn's tools ask of an estimator; only they call it, so that scikit-learn is needed by them alone."""
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type=None, target_tags=TargetTags(required=True))

    def __repr__(self) -> str:
        """The call that makes it, without what is default, and what it was fitted on."""
        defaults = QProbe().get_params()
        given = {n: v for n, v in self.get_params().items() if n == "loss" or v != defaults[n]}
        call = f"QProbe({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        if not hasattr(self, "network_"):
            return call
        sizes = ", ".join(f"{self.data_[name]} {name}" for name in ("prompts", "rows") if name in self.data_)
        return f"<{call}, fitted: {sizes + ', ' if sizes else ''}{self.dimension} features, beta_={self.beta_:g}>"

    @property
    def dimension(self) -> int:
        """D, the width of the embeddings that it reads."""
        return self._fitted().dimension

    @own_state()
    def fit(
        self, features: ArrayLike | Tensor, rewards: ArrayLike | Tensor, prompts: ArrayLike | Sequence[Any]
    ) -> QProbe:
        """Train on rewards.

        Args:
            features: (N, D) float embeddings of prompt + completion.
            rewards: (N,) float; in [0, 1] for the cross-entropy. With bradley_terry the within-prompt pairs are formed.
            prompts: (N,) ids of each row's prompt, of any hashable kind (`qprobe.probe.ids`); prompts may have different numbers
                of rows.

        Raises:
            ValueError: lengths that differ, NaN, rewards that the loss cannot read, or a training that diverged.

        Warns: UserWarning where all rows get the same score, with the reason.
        """
        groups = torch.from_numpy(dense_ids(prompts))
        rows = floats(features, "features")
        if rows.ndim == 2 and len(groups) != len(rows):
            raise ValueError(f"prompts has {len(groups)} rows, features has {len(rows)}: give one id for each row.")
        return self._fit(Data(rows, floats(rewards, "rewards").float(), groups))

    @own_state()
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
        better, worse = floats(chosen, "chosen"), floats(rejected, "rejected")
        if better.shape != worse.shape:
            raise ValueError(
                f"chosen has shape {tuple(better.shape)}, rejected {tuple(worse.shape)}: row i of both is one pair."
            )
        pairs = len(better)
        of_pair = np.arange(pairs) if prompts is None else dense_ids(prompts)
        if len(of_pair) != pairs:
            raise ValueError(f"prompts has {len(of_pair)} entries for {pairs} pairs: give one a pair.")
        rewards = torch.cat([torch.ones(pairs), torch.zeros(pairs)])
        groups = torch.arange(pairs).repeat(2)
        return self._fit(Data(torch.cat([better, worse]), rewards, groups, torch.from_numpy(of_pair)))

    def _fit(self, data: Data) -> QProbe:
        losses.check_rewards(data.rewards, self.loss)
        if not self._solved(data):
            self._trained(data)
        total = sum(part.double().sum().item() for part in data.features.split(ROWS_AT_A_TIME))
        self.data_ = {
            "rows": len(data.features),
            "prompts": len(torch.unique(data.prompt_of_group)),
            "fingerprint": fingerprint([data.rewards.double().sum().item(), total]),
        }
        return self

    def _solved(self, data: Data) -> bool:
        """Solve; whether that was wanted, and there was something to choose from."""
        from qprobe.probe import solved, solvers

        auto = self.solver == "auto"
        if self.solver == "steps" or (auto and (self.settings != TrainingSettings() or not solved.fits_memory(data))):
            return False
        try:
            probe = solved.solved(
                data, self.loss, l2=None if isinstance(self.l2, str) else self.l2, k=self.k, seed=self.seed
            )
        except solvers.NothingToLearn:
            if auto:
                return False
            raise
        choice = probe.solution.choice
        self.network_, self.solution_, self.calibration_ = probe.network, probe.solution, probe.calibration
        self.beta_ = probe.beta if self.beta is None else self.beta
        self.training_ = {
            "solver": solved.solver_of(self.loss, self.solver),
            "l2": "infinity" if choice is None or np.isinf(choice.candidate.strength) else choice.candidate.strength,
            "chosen_on_held_out_prompts": choice is not None,
            "held_out_mixed_prompts": 0 if choice is None else choice.prompts,
            "auc": None if choice is None else choice.auc,
            "auc_error": None if choice is None else choice.error,
            "note": probe.solution.sentence(),
        }
        return True

    def _trained(self, data: Data) -> None:
        task = ProbeTask(self.loss, self.seed, torch.ones(len(data.sizes), dtype=torch.bool))
        trained = train(data, [task], self.settings, k=self.k, seed=self.seed)
        (trained_on_all,) = refitted(data, [task], trained, self.settings, k=self.k, seed=self.seed)
        if reason := why_alike(trained_on_all, data):
            warnings.warn(f"This probe scores all rows alike: {reason}", stacklevel=5)
            trained_on_all = dataclasses.replace(trained_on_all, note=f"{trained_on_all.note} {reason}".strip())
        self._take(trained_on_all)

    def _take(self, trained: TrainedProbe) -> QProbe:
        vars(self).pop("solution_", None)  # that of an earlier fit
        self.network_, self.calibration_ = trained.network, trained.calibration
        self.beta_ = trained.beta if self.beta is None else self.beta
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

    @own_state()
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
        rows = floats(features, "features")
        if rows.ndim != 2 or rows.shape[1] != trained.dimension:
            raise ValueError(f"features has shape {tuple(rows.shape)}: this probe reads (N, {trained.dimension}).")
        losses.check_finite(rows, "features")
        return score_rows(trained, rows).numpy()

    def check_source(self, source: EmbeddingSource) -> None:
        """Raise ValueError where the probe's own source is known and another one."""
        if self.source is not None and source != self.source:
            raise ValueError(
                f"This probe reads {described(self.source)}; it was given {described(source)}: embed with the probe's own "
                "model and layer, or train a probe on these embeddings."
            )

    @own_state()
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
            return int(selection.selection_weights(scores, 0).argmax())
        return selection.select(scores, temperature, generator)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and card (JSON); no pickle."""
        trained = self._fitted()
        folder = Path(folder)
        (folder / CARD_FILE).unlink(missing_ok=True)  # the card comes last: an older one must not describe new weights
        network.save(trained, folder)
        save_calibration(self.calibration_, folder)
        card = {
            "loss": self.loss,
            "beta": self.beta_,
            "beta_given": self.beta,
            "k": self.k,
            "seed": self.seed,
            "solver": self.solver,
            "l2": "infinity" if self.l2 == np.inf else self.l2,  # JSON has no number for it
            "settings": dataclasses.asdict(self.settings),
            "training": self.training_,
            "data": self.data_,
            "use": self.use,
            "source": None if self.source is None else dataclasses.asdict(self.source),
        }
        write_whole(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    @classmethod
    @own_state()
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> QProbe:
        """Read a probe from a folder, or from the hub by its id.

        Raises:
            FileNotFoundError: there is no probe there.
            ValueError: the folder holds something else.
        """
        folder = Path(name)
        if not folder.is_dir():
            files = [CARD_FILE, network.SHAPE_FILE, network.WEIGHTS_FILE, CALIBRATION_FILE]
            folder = from_hub(str(name), revision, files)
        if not (folder / CARD_FILE).is_file():
            raise FileNotFoundError(f"{name} holds no saved probe: {CARD_FILE} is missing.")
        try:
            card = json.loads((folder / CARD_FILE).read_text())
            source = card["source"] and EmbeddingSource(**card["source"])
            settings = TrainingSettings(**card["settings"])
            # What `beta_` became in training is not what was asked for: another fit chooses it again.
            solver, l2 = card.get("solver", "steps"), card.get("l2", "auto")  # older cards know steps alone
            l2 = np.inf if l2 == "infinity" else l2
            probe = cls(card["loss"], card.get("beta_given"), card["k"], card["seed"], settings, solver, l2)
            if not card["beta"] >= 0:
                raise ValueError(f"its beta is {card['beta']}, a temperature is 0 or more")
            probe.beta_, probe.training_, probe.data_ = card["beta"], card["training"], card["data"]
            probe.source, probe.use = source, dict(card.get("use", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CARD_FILE} is no card of a probe ({error}): save the probe anew.") from error
        probe.network_ = network.load(folder)
        probe.calibration_ = load_calibration(folder, probe.network_.dimension)
        return probe

    def push_to_hub(self, repo_id: str, private: bool = False, *, trained_on: str = "", table: str = "") -> str:
        """Upload the saved probe with a card to the Hugging Face hub. Needs `hf auth login`.

        Args:
            repo_id: USER/NAME.
            private: for nobody else to see.
            trained_on: how much it learned from, in words, where the probe does not say so itself.
            table: of results, as Markdown; `qprobe export --to hub` takes both from the probe's run.

        Returns: the commit's address.
        """
        from qprobe.probe import hub

        return hub.push(self, repo_id, private, trained_on, table)

    def _fitted(self) -> ProbeNetwork:
        if not hasattr(self, "network_"):
            raise ValueError("This QProbe is not trained yet: call fit or fit_pairs first.")
        return self.network_
