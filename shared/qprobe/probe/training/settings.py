"""How probes are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """How probes are trained.

    Args:
        hidden: widths of hidden ReLU layers; none is a linear probe.
        steps: optimiser steps; None counts `epochs` instead. The paper fixes epochs, so its steps grow with the data.
        epochs: passes over the training prompts; used where `steps` is None.
        chunks_per_batch: chunks (a prompt's samples, or `chunk` of them) of a probe's own in a batch.
        chunk: most samples of a chunk; the k of L_PG in training.
        learning_rate: of AdamW. The paper's 5e-5 is for features as they are; standardised ones bear more.
        learning_rates: candidates, of which every probe takes the one with the lowest loss on its held-out prompts; where
            these are too few, and where there are no candidates, `learning_rate` is used.
        weight_decay: of AdamW, on weights, not biases.
        training_beta: temperature of L_PG in training; the paper trains at 1.
        standardize: train on standardised features; the statistics are folded into the weights afterwards.
        held_out: share of the training prompts that choose stopping step, learning rate and temperature, in [0, 1).
        minimum_mixed: held-out prompts with good and bad completions below which nothing is held out.
        check_every: fewest steps between two looks at the held-out loss; looks are rarer where they would cost too much.
        patience: looks without a better held-out loss after which a probe keeps its best weights; training ends where that
            is so of all. None never ends it early.
        beta: temperature of the policy where none was chosen on held-out prompts.

    Raises:
        ValueError: a value out of its range.
    """

    hidden: tuple[int, ...] = ()
    steps: int | None = 500
    epochs: int = 150
    chunks_per_batch: int = 100
    chunk: int = 10
    learning_rate: float = 1e-3
    learning_rates: tuple[float, ...] = ()
    weight_decay: float = 0.01
    training_beta: float = 1.0
    standardize: bool = True
    held_out: float = 0.2
    minimum_mixed: int = 20
    check_every: int = 10
    patience: int | None = 10
    beta: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
        for name in ("chunks_per_batch", "chunk", "epochs", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"training.steps is {self.steps}: at least 1, or null to count epochs.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"training.patience is {self.patience}: at least 1 look, or null to never stop early.")
        for width in self.hidden:
            if type(width) is not int or width < 1:
                raise ValueError(f"training.hidden is {self.hidden}: widths are whole numbers of at least 1.")
        if not (self.learning_rate > 0 and self.weight_decay >= 0 and self.training_beta > 0 and self.beta >= 0):
            raise ValueError(
                f"training: learning_rate={self.learning_rate} and training_beta={self.training_beta} must be above 0, "
                f"weight_decay={self.weight_decay} and beta={self.beta} 0 or more."
            )
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"training.learning_rates is {self.learning_rates}: each must be above 0.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"training.held_out is {self.held_out}: a share of the prompts in [0, 1).")
