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
        found: dict[str, list[str]] = {}
        for entry in sorted(importlib.metadata.entry_points(group=self.group)):
            found.setdefault(entry.name, []).append(_package(entry))
        return found

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
        packages = self.packages()
        if not packages:
            raise ValueError(
                f"No installed package registers {self.group}, not even Q-probe, which was installed before it did: say `make "
                "setup`, or install it again with pip."
            )
        if name not in packages:
            near = meant(str(name), packages)
            raise ValueError(f"{where} is {name!r}{near}: choose from {', '.join(packages)}.")
        if len(packages[name]) > 1:
            raise ValueError(
                f"{where} is {name!r}, which {' and '.join(packages[name])} both register ({self.group}): uninstall one of them."
            )
        (entry,) = importlib.metadata.entry_points(group=self.group, name=name)
        try:
            return entry.load()
        except Exception as error:
            raise ValueError(
                f"{where} is {name!r}, which {_package(entry)} registers as {entry.value} and which cannot be imported "
                f"({type(error).__name__}: {error}): install what it lacks, update it or uninstall it."
            ) from error


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
