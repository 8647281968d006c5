"""What the commands qprobe, qprobe-code-gen and qprobe-preference have in common: help, near names, one sentence a fault.

A command of experiments is Hydra's: its words choose and change a configuration. It composes the configuration itself, so that
what is wrong is said in our words, and hands over to Hydra what only Hydra does (launchers, --cfg, --info).
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from qprobe.cli import completion, configuration, multirun
from qprobe.settings import UsageError, meant

_STOPPED = 130
# Options of Hydra that are handed over as they are.
_HYDRAS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--hydra-help")
_FOLDER = "--config-dir"
_MULTIRUN = ("--multirun", "-m")
_OWN = ("--help", "-h", "--version", "--debug", "--completion", _FOLDER)
_OPTIONS = """\
  -h, --help             this text
  --version              the version of the project
  -m, --multirun         a run for every combination of values: probe.learning_rate=1e-3,1e-2; one table shows all
  --cfg job              print the configuration of these words, and run nothing
  --config-dir DIR       a folder of yours with more groups, such as DIR/experiment/mine.yaml
  --debug                where an error came from, as a traceback
  --completion SHELL     print the completion for bash or zsh: eval "$({name} --completion bash)\""""


@dataclass(frozen=True)
class Experiments:
    """A command that runs experiments.

    Args:
        name: of the command.
        package: of its configuration's files; the primary one is "config".
        does: what it does, in a sentence or two.
        examples: command lines with what each is for; three are enough.
        run: runs a composed configuration.
        folder: where a configuration's run folder lies.
        check: raises for what cannot be, without work: asked of all jobs before the first is run.
        commands: first words that run something else than an experiment, with what each does.
        other: runs such a command, given its words from its name on; returns the exit status.
    """

    name: str
    package: str
    does: str
    examples: Sequence[tuple[str, str]]
    run: Callable[[dict[str, Any]], None]
    folder: Callable[[dict[str, Any]], Path]
    check: Callable[[dict[str, Any]], object]
    commands: Mapping[str, str] = field(default_factory=dict)
    other: Callable[[Sequence[str]], int] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; returns the exit status.

        Args:
            arguments: words after the command's name; None takes those of the process.
        """
        words, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
        return guarded(self.name, functools.partial(self._main, words, debug), debug)

    def help(self) -> str:
        """What the command does, its options, examples, experiments and groups."""
        of_group = configuration.groups(self.package)
        experiments = of_group.pop(configuration.EXPERIMENT)
        usage = [f"usage: {self.name} experiment=NAME [GROUP=NAME ...] [KEY=VALUE ...] [options]"]
        usage += [f"       {self.name} {word} --help" for word in self.commands]
        commands = ["Other commands:", *(f"  {word:<22} {about}" for word, about in self.commands.items())]
        parts = [
            usage,
            [self.does],
            ["Options:", _OPTIONS.replace("{name}", self.name)],
            ["Examples:", *(f"  {line}\n      {about}" for line, about in self.examples)],
            *([commands] if self.commands else []),
            ["Experiments (experiment=NAME):", *_choices(experiments)],
            [groups_text(of_group)],
            [f"Any setting is changed by KEY=VALUE. All of them: {self.name} experiment=NAME --cfg job"],
        ]
        return "\n\n".join(map("\n".join, parts))

    def _main(self, words: list[str], debug: bool) -> int:
        if not words:
            print(self.help(), file=sys.stderr)
            return 2
        if words[0] in self.commands and self.other is not None:
            return self.other(words)
        if {"-h", "--help"} & set(words):
            print(self.help())
            return 0
        if "--version" in words:
            print(version(self.name))
            return 0
        if "--completion" in words:
            print(self._completion(words[words.index("--completion") + 1 :]))
            return 0
        self._check(words)
        words = _with_folder(words)
        plain = [word for word in words if word not in _MULTIRUN]
        if set(words) & set(_HYDRAS):
            if "--hydra-help" not in words:
                configuration.composed(
                    self.package, "config", [word for word in plain if "=" in word and word[0] != "-"]
                )
            return self._by_hydra(words, [], debug)
        if set(words) & set(_MULTIRUN):
            return self._multirun(plain, debug)
        self.run(configuration.composed(self.package, "config", plain))
        return 0

    def _check(self, words: Sequence[str]) -> None:
        """Raise UsageError for an option or a command that is none."""
        known = [*_OWN, *_MULTIRUN, *_HYDRAS]
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in known:
                raise UsageError(f"There is no option {word}{meant(word, known)}: {self.name} --help lists them.")
        if "=" not in words[0] and not words[0].startswith(("-", "~")):
            experiments = [choice.name for choice in configuration.groups(self.package)[configuration.EXPERIMENT]]
            near = meant(words[0], [*self.commands, *experiments])
            for name in experiments:  # an experiment is named with its group
                near = near.replace(f"mean {name}?", f"mean experiment={name}?")
            raise UsageError(
                f"There is no command {words[0]}{near}: say experiment=NAME, NAME one of {', '.join(experiments)}"
                f"{'; or ' + ' or '.join(self.commands) if self.commands else ''}."
            )

    def _multirun(self, words: list[str], debug: bool) -> int:
        launched = any(word.startswith(("hydra/launcher=", "hydra/sweeper=")) for word in words)
        compose = functools.partial(configuration.composed, self.package, "config")
        jobs = multirun.plan(words, compose, self.folder, self.check)
        if not launched:
            return multirun.run(self.name, jobs, lambda job: self.run(multirun.placed(compose(job.words), job)))
        status = self._by_hydra([*_MULTIRUN[:1], *words], jobs, debug)
        multirun.show(jobs)
        return status

    def _by_hydra(self, words: list[str], jobs: Sequence[multirun.Job], debug: bool) -> int:
        """Hydra's own main, for what only Hydra does: launchers, sweepers, its options."""
        import hydra

        task = functools.partial(_task, self, jobs, debug)
        decorated = hydra.main(version_base="1.3", config_path=f"pkg://{self.package}", config_name="config")(task)
        before = sys.argv
        settings = [word for word in words if "=" in word and not word.startswith("-")]
        sys.argv = [self.name, *settings, *(word for word in words if word not in settings)]  # settings in one piece
        if debug:
            os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            decorated()
        except SystemExit as stopped:
            if not isinstance(stopped.code, int | None):
                raise
            return stopped.code or 0
        finally:
            sys.argv = before
        return 0

    def _completion(self, shells: Sequence[str]) -> str:
        first = configuration.groups(self.package)[configuration.EXPERIMENT][0]
        words = completion.settings(self.package, "config", [f"experiment={first.name}"])
        of_command = {"": [*words, *_OWN, *_MULTIRUN, "--cfg", *self.commands], **{name: [] for name in self.commands}}
        return completion.script(self.name, shells, of_command)


def _with_folder(words: Sequence[str]) -> list[str]:
    """The words with --config-dir DIR as the setting that it is to Hydra."""
    if _FOLDER not in words:
        return list(words)
    place = words.index(_FOLDER)
    if place + 1 == len(words):
        raise UsageError(f"{_FOLDER} names no folder: say {_FOLDER} DIR.")
    return [*words[:place], *words[place + 2 :], configuration.search(Path(words[place + 1]))]


def _task(command: Experiments, jobs: Sequence[multirun.Job], debug: bool, config: Any) -> None:
    """What Hydra runs: a module's function, so that launchers can send it to other processes."""
    from hydra.core.hydra_config import HydraConfig

    words, plain = list(HydraConfig.get().overrides.task), configuration.plain(config)
    for job in jobs:
        if words == [word for word in job.words if not word.startswith("hydra")]:
            multirun.prepare(job, jobs)
            plain = multirun.placed(plain, job)
            break
    if status := guarded(command.name, functools.partial(command.run, plain), debug):
        raise SystemExit(status)


def groups_text(of_group: Mapping[str, Sequence[configuration.Choice]]) -> str:
    """The groups of a configuration with their choices, a line each."""
    lines = ["Groups (GROUP=NAME):"]
    for group, choices in of_group.items():
        lines += [f" {group}", *_choices(choices)]
    return "\n".join(lines)


def _choices(choices: Sequence[configuration.Choice]) -> list[str]:
    return [f"  {choice.name:<22} {choice.about}" for choice in choices]


def version(name: str) -> str:
    """The version of a command's distribution, with that of the core."""
    found = {part: importlib.metadata.version(part) for part in dict.fromkeys([name, "qprobe"])}
    first, *rest = (f"{part} {number}" for part, number in found.items())
    return first + (f" ({rest[0]})" if rest else "")


def without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without --debug, and whether it was among them."""
    return [word for word in words if word != "--debug"], "--debug" in words


def guarded(name: str, work: Callable[[], int | None], debug: bool = False) -> int:
    """Do a command's work and end with its exit status: a fault is one sentence on stderr.

    Args:
        name: of the command, before the sentence.
        work: gives an exit status, or None for 0.
        debug: whether the traceback is printed too.

    Returns: 0; 2 for a word of the command line that nothing knows, 130 where it was stopped by hand, 1 for every other fault.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # a process that ends does not collect what torch and transformers consist of (.7 s)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped. What was written stays; the same command goes on from there.", file=sys.stderr)
        return _STOPPED
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        print(f"{name}: {said}. This is a fault of the program: --debug shows how it came about.", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest name where an option or a command is misspelt, and --debug and --version known to all."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        known = [option for action in self._actions for option in action.option_strings]
        commands = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        for word in words[: words.index("--")] if "--" in words else words:
            if commands is not None and not word.startswith("-"):
                if word not in commands.choices:
                    names = ", ".join(commands.choices)
                    self.error(f"there is no command {word}{meant(word, commands.choices)}: choose from {names}")
                break
            option = word.partition("=")[0]
            if option.startswith("--") and len(option) > 2 and not any(name.startswith(option) for name in known):
                self.error(f"there is no option {option}{meant(option, known)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}. {self.prog} --help says more.\n")
