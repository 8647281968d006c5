"""How an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoRASettings:
    """How an adapter is trained. The paper publishes none of these numbers; they are the field's usual ones.

    Args:
        rank: of the two factors, at least 1.
        alpha: their product is multiplied by alpha / rank.
        dropout: share of the adapter's inputs that are dropped while training, in [0, 1).
        target_modules: names of the layers that are adapted; None is every linear layer but the output.
        learning_rate: of AdamW at its highest.
        epochs: at most; fewer where held-out prompts say so.
        batch_rows: completions a step; what does not fit the memory is done in passes (see `qprobe.models.memory`).
        per_prompt: completions of a prompt in an epoch, at most.
        max_tokens: of prompt and completion together; longer examples are left out and counted.
        held_out: share of the prompts, in [0, 1), that say when to stop; none where there are fewer than 20.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    learning_rate: float = 2e-4
    epochs: int = 3
    batch_rows: int = 16
    per_prompt: int = 4
    max_tokens: int = 1024
    held_out: float = 0.1

    def __post_init__(self) -> None:
        own, counts = vars(self), ("rank", "epochs", "batch_rows", "per_prompt", "max_tokens")
        wrong = [f"{name} is {own[name]}: at least 1" for name in counts if own[name] < 1]
        wrong += [f"{name} is {own[name]}: above 0" for name in ("alpha", "learning_rate") if not own[name] > 0]
        wrong += [f"{name} is {own[name]}: in [0, 1)" for name in ("dropout", "held_out") if not 0 <= own[name] < 1]
        if wrong:
            raise ValueError(f"LoRA's {wrong[0]}.")
