"""Back ends by name, as installed packages register them: ours in our pyproject.toml, somebody else's in theirs.

    [project.entry-points."qprobe.samplers"]
    theirs = "their_package.sampling:TheirSampler"

Nothing of a package is imported before its name is asked for. `docs/BACK_ENDS.md` has an example of every kind.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from qprobe.settings import meant


@dataclass(frozen=True)
class Registry:
    """The back ends of one kind.

    Args:
        group: of entry points, such as "qprobe.samplers".
    """

    group: str

    def packages(self) -> dict[str, list[str]]:
        """Every name, with the distributions that register it."""
        return {name: [_package(entry) for entry in entries] for name, entries in self._entries().items()}

    def names(self) -> list[str]:
        """All names, in the order of the alphabet."""
        return list(self.packages())

    def find(self, name: Any, where: str) -> Any:
        """What a name stands for, imported.

        Args:
            where: the key that holds the name, for messages.

        Raises:
            ValueError: no package registers the name, two do, or it cannot be imported.
        """
        registered = self._entries()
        if not registered:
            raise ValueError(
                f"No installed package registers {self.group}, not even Q-probe, which was installed before it did: say `make "
                "setup`, or install it again with pip."
            )
        if name not in registered:
            near = meant(str(name), registered)
            raise ValueError(f"{where} is {name!r}{near}: choose from {', '.join(registered)}.")
        if len(registered[name]) > 1:
            both = " and ".join(map(_package, registered[name]))
            raise ValueError(f"{where} is {name!r}, which {both} both register ({self.group}): uninstall one of them.")
        (entry,) = registered[name]
        try:
            return entry.load()
        except Exception as error:
            raise ValueError(
                f"{where} is {name!r}, which {_package(entry)} registers as {entry.value} and which cannot be imported "
                f"({type(error).__name__}: {error}): install what it lacks, update it or uninstall it."
            ) from error

    def _entries(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for entry in sorted(importlib.metadata.entry_points(group=self.group)):
            found.setdefault(entry.name, []).append(entry)
        return found


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
