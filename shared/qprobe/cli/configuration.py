"""From the words of a command line to a configuration: Hydra composes it, and what is misspelt is said with the nearest name.

A word is GROUP=NAME (a file of a group's folder), KEY=VALUE (a setting, with dots), or one of Hydra's `+KEY=VALUE` and `~KEY`.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.registry import Registry
from qprobe.settings import UsageError, defaults, meant

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CORE = "qprobe.conf"
# Groups whose choices other packages add to by registering a back end, and the choice whose file such a one begins with, but
# for its own keys.
_REGISTERED = {
    "sampler": ("qprobe.samplers", "hf"),
    "embedder": ("qprobe.embedders", None),
    "judge": ("qprobe.judges", None),
}
_NO_CHOICES = ("given",)  # registered, and chosen by another option
# Arguments of back ends that a run gives.
_GIVEN = ("model", "settings", "folder")
EXPERIMENT = "experiment"
_SEARCHPATH = "hydra.searchpath"


@dataclass(frozen=True)
class Choice:
    """A file of a group: its name, and the first line of its comment."""

    name: str
    about: str


def groups(package: str, more: Sequence[Path] = ()) -> dict[str, list[Choice]]:
    """What can be chosen by GROUP=NAME, by group: a package's own groups with those of the core.

    Args:
        package: of the configuration's files, such as "qprobe.conf".
        more: folders of a user's own.
    """
    found: dict[str, dict[str, Choice]] = {}
    for folder in [_folder(package), *([] if package == CORE else [_folder(CORE)]), *more]:
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {}).setdefault(path.stem, Choice(path.stem, _about(path)))
    for group, (registered, _) in _REGISTERED.items():
        for name, packages in Registry(registered).packages().items() if group in found else ():
            if name not in _NO_CHOICES:
                found[group].setdefault(name, Choice(name, f"Of {' and of '.join(packages)}."))
    return {group: list(found[group].values()) for group in sorted(found)}


def _folder(package: str) -> Path:
    return Path(str(importlib.resources.files(package)))


def search(folder: Path) -> str:
    """The word that adds a folder of a user's own to the groups.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(
            f"There is no folder {folder}: --config-dir names one with groups, such as {folder}/experiment."
        )
    return f"{_SEARCHPATH}=[pkg://{CORE},'file://{folder.resolve()}']"


def _searched(parsed: Sequence[Override]) -> list[Path]:
    """The folders that such words add."""
    said = [word.value() for word in parsed if word.key_or_group == _SEARCHPATH]
    found = [entry for value in said if isinstance(value, list) for entry in value]
    return [Path(str(entry).removeprefix("file://")) for entry in found if str(entry).startswith("file://")]


def _about(path: Path) -> str:
    lines = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


def composed(package: str, name: str, words: Sequence[str]) -> dict[str, Any]:
    """The configuration of a package's primary file with the words of a command line, as plain values.

    Args:
        package: of its files; the groups of the core belong to it too.
        name: of the primary configuration.
        words: in Hydra's grammar; one value each (several are a multirun's).

    Raises:
        UsageError: a word that nothing knows, or a group without a choice.
        ValueError: a value that cannot be, or that is still missing.
        ModuleNotFoundError: hydra is missing.
    """
    with _hydra():
        from hydra import compose, initialize_config_module
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        parsed = _parsed(words)
        if several := [word for word, found in zip(words, parsed, strict=True) if found.is_sweep_override()]:
            raise UsageError(
                f"{several[0]} says several values: write KEY=[1,2] for a list; add --multirun for a run with each."
            )
        for word in parsed:
            _offer(package, str(word.key_or_group), word.value())
        with initialize_config_module(package, version_base="1.3"):
            try:
                config = compose(name, list(words))
            except (HydraException, OmegaConfBaseException):
                # It composes again, which a command that is right need not wait for.
                _check(package, name, words, parsed)
                raise
            return plain(config)


def plain(config: Any) -> dict[str, Any]:
    """A DictConfig as plain values, references resolved.

    Raises:
        ValueError: a value is missing.
    """
    with _hydra():
        from omegaconf import OmegaConf
        from omegaconf.errors import MissingMandatoryValue

        try:
            return _plain(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        except MissingMandatoryValue as error:
            raise ValueError(f"The setting {error.full_key} is missing: say {error.full_key}=VALUE.") from error


def keys(package: str, name: str, words: Sequence[str] = ()) -> list[str]:
    """Every setting of a configuration, with dots; settings that hang on a choice are those of the given words."""
    with _hydra():
        from hydra import initialize_config_module

        with initialize_config_module(package, version_base="1.3"):
            return list(leaves(_unresolved(name, words)))


def _unresolved(name: str, words: Sequence[str]) -> dict[str, Any]:
    """A configuration with its references and missing values, where Hydra is initialised."""
    from hydra import compose
    from omegaconf import OmegaConf

    return _plain(OmegaConf.to_container(compose(name, list(words)), resolve=False))


def jobs(words: Sequence[str]) -> list[list[str]]:
    """The words of every job of a multirun: every combination of the values, as Hydra's own sweeper makes them.

    Raises:
        UsageError: a word that cannot be read.
    """
    with _hydra():
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        return [list(job) for batch in BasicSweeper.split_arguments(_parsed(words), None) for job in batch]


def values(words: Sequence[str]) -> list[tuple[str, Any]]:
    """The keys and plain values of words that each say KEY=VALUE, in Hydra's grammar.

    Raises:
        UsageError: a word that cannot be read.
    """
    with _hydra():
        return [(str(found.key_or_group), found.value()) for found in _parsed(words)]


def swept(words: Sequence[str]) -> list[str]:
    """The keys of those words that say several values."""
    return [str(found.key_or_group) for found in _parsed(words) if found.is_sweep_override()]


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """What Hydra and OmegaConf raise becomes a sentence, without the advice on Hydra's own files."""
    try:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: install it with `pip install 'qprobe[hydra]'`.") from error
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        said = re.split(r"Config search path|To append|\n\s*See http|Set the environment|full_key:", str(error))[0]
        raise UsageError(f"The settings cannot be used: {' '.join(said.split()).rstrip('.')}.") from error


def _plain(config: Any) -> dict[str, Any]:
    assert isinstance(config, dict)  # the root of a configuration is one
    return {str(key): value for key, value in config.items()}


def _parsed(words: Sequence[str]) -> list[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), []
    for word in words:
        try:
            found.append(parser.parse_override(word))
            if not str(found[-1].key_or_group).strip():
                raise UsageError(f"{word} names no setting: write KEY=VALUE.")
        except HydraException as error:
            why = str(error).splitlines()[0].rstrip(".")
            key, equals, _ = word.partition("=")
            if not equals and not word.startswith("~"):
                raise UsageError(f"{word!r} is no setting: write KEY=VALUE, without spaces around the sign.") from error
            raise UsageError(
                f"{word} cannot be read ({why}): a value with spaces, commas, brackets or signs needs quotes inside quotes, such "
                f"as '{key}=\"...\"'."
            ) from error
    return found


def _check(package: str, name: str, words: Sequence[str], parsed: Sequence[Override]) -> None:
    """Raise UsageError for the first word that names no group, choice or setting."""
    from hydra.errors import ConfigCompositionException

    of_group = groups(package, _searched(parsed))
    chosen, settings = [], []
    for word, found in zip(words, parsed, strict=True):
        key = str(found.key_or_group)
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            chosen.append(word)
            continue
        if key.partition("@")[0] in of_group:
            _check_choice(key, found.value(), of_group[key.partition("@")[0]])
            chosen.append(word)
        elif found.is_add() or found.is_force_add():
            chosen.append(word)  # whether anything reads it is for those who read
        else:
            settings.append((word, key))
    try:
        known = _unresolved(name, chosen)
    except ConfigCompositionException as error:
        group = re.match(r"You must specify '(\w+)'", str(error))
        if group is None or group[1] not in of_group:
            raise
        named = [word for word, key in settings if meant(key, [group[1]])]
        wrong = f"{named[0]} names no group or setting. " if named else ""
        raise UsageError(f"{wrong}Say {group[1]}=NAME: one of {_names(of_group[group[1]])}.") from error
    there = list(leaves(known))
    for word, key in settings:  # what is below a list or a reference is left to Hydra
        if not any(one == key or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in there):
            above = key.rpartition(".")[0]
            near_by = [one for one in there if above and one.startswith(f"{above}.")]
            near = meant(key, near_by) or meant(key, [*there, *known, *of_group])
            raise UsageError(f"{word}: there is no setting {key}{near}. There are {', '.join(near_by or known)}.")


def _offer(package: str, group: str, name: Any) -> None:
    """Have Hydra find a back end of another package as a choice of its group: no file, but the keys of its constructor."""
    registered, begins_with = _REGISTERED.get(group, ("", None))
    files = [_folder(of) / group / f"{name}.yaml" for of in (package, CORE)]
    if not registered or name in _NO_CHOICES or any(file.is_file() for file in files):
        return
    registry = Registry(registered)
    if name in registry.names():
        from hydra.core.config_store import ConfigStore
        from omegaconf import OmegaConf

        own = defaults(registry.find(name, group), _GIVEN)
        based: dict[str, Any] = {}
        if begins_with is not None:
            based = _plain(OmegaConf.to_container(OmegaConf.load(_folder(CORE) / group / f"{begins_with}.yaml")))
            for key in defaults(registry.find(begins_with, group), _GIVEN):
                based.pop(key, None)
        ConfigStore.instance().store(name, {**based, "backend": name, **own}, group)


def _check_choice(group: str, value: Any, choices: Sequence[Choice]) -> None:
    names = {choice.name for choice in choices}
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not isinstance(one, dict) and str(one) not in names:
            raise UsageError(f"There is no {group} {one}{meant(str(one), names)}: choose from {_names(choices)}.")


def _names(choices: Sequence[Choice]) -> str:
    return ", ".join(choice.name for choice in choices)


def leaves(values: dict[str, Any], above: str = "") -> Iterator[str]:
    """The settings of a configuration, with dots."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
