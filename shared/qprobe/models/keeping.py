"""What a sampler keeps of completions while it draws them, in the place of a second pass by an embedder."""

from __future__ import annotations

from dataclasses import dataclass

# Last tokens of a row in work whose states are held. A completion is cut behind one of them; of one that is not, nothing is kept.
HELD = 32


@dataclass(frozen=True)
class Keep:
    """What is kept of completions while they are drawn, so that nobody has to read them again.

    Args:
        layers: hidden layers, counted from 0, whose state at the last token is wanted.
        ending: the token that ends a completion where it is right to end it, for the likelihood columns; None wants none.
        as_layer: the number that the columns have among the states.
    """

    layers: tuple[int, ...] = ()
    ending: int | None = None
    as_layer: int = -1

    def __bool__(self) -> bool:
        return bool(self.layers) or self.ending is not None


NOTHING = Keep()
