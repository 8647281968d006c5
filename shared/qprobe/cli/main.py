"""The command `qprobe`.

qprobe run PROMPTS --reward MODULE:FUNCTION   your prompts and your reward: from completions to probes and a table
qprobe import CANDIDATES --run RUN            the same from completions and rewards that you have already
qprobe answer --probe PROBE PROMPT            an answer chosen by a saved probe; with --prompts FILE one to every prompt
qprobe serve --probe PROBE                    the same for clients of OpenAI's protocol
qprobe update FOLDER                          a new probe from what users said of a server's answers
qprobe inspect RUN                            what is in a run folder
qprobe report RUN                             a finished run as one HTML page
qprobe export PROBE --to KIND WHERE           a probe as a sequence classifier, or on the hub
qprobe pack RUN FOLDER                        a run without its model: what sampler=recorded reads

`run` and `import` take several values with -m: a run for every combination.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.cli import command, completion, configuration, serving
from qprobe.cli.command import Parser, groups_text, guarded, without_debug
from qprobe.settings import UsageError

if TYPE_CHECKING:
    from qprobe.cli.own_work import Work

_DOES = """\
Q-probes: adapt a frozen language model to a reward. Completions are drawn and rewarded, a small probe of
the model's hidden states is trained to tell which earn more, and chooses among candidates."""
_EXAMPLES = """\
examples:
  qprobe run prompts.jsonl --reward short.py:reward --run runs/short sampler.n=16
  qprobe import candidates.jsonl --run runs/mine model=hub model.name=NAME
  qprobe answer --probe runs/short/probes/prompts/policy_gradient "Write a sentence about the sea."

qprobe COMMAND --help says more of each. All take --debug: where an error came from, as a traceback."""
# Commands that take KEY=VALUE, with examples.
_CHANGED = dict.fromkeys(("run", "import"), "sampler.n=16, model=hub model.name=NAME, evaluation.seeds=2")
_CHANGED["answer"] = _CHANGED["serve"] = "sampler.temperature=0.7 or model.device=cpu"
_CHANGED["export"] = "model.dtype=float32"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _parser().print_help(sys.stderr)
        return 2
    return guarded("qprobe", functools.partial(_main, words), debug)


def _main(words: list[str]) -> int | None:
    if words[0] == "--completion":
        print(_completion(words[1:]))
        return None
    chosen, rest = _parser().parse_known_args(words)
    if unknown := [word for word in rest if chosen.command not in _CHANGED or word.startswith("-") or "=" not in word]:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    work = {"run": _run, "import": _import, "answer": _answer, "serve": _serve, "export": _export}
    work |= {"update": _update, "inspect": _inspect, "report": _report, "pack": _pack}
    return work[chosen.command](chosen, rest)


def _parser() -> Parser:
    return _parsers()[0]


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and those of its commands by name."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    groups = groups_text(configuration.groups(configuration.CORE))
    parser = Parser(prog="qprobe", description=_DOES, epilog=f"{_EXAMPLES}\n\n{groups}", **layout)
    parser.add_argument("--version", action="version", version=command.version("qprobe"))
    parser.add_argument("--completion", metavar="SHELL", help="print the completion for bash or zsh")
    commands = parser.add_subparsers(dest="command", required=True)

    def arguments_of(name: str, does: str) -> Callable[..., Any]:
        words = f"KEY=VALUE arguments change settings, such as {_CHANGED.get(name)}."
        words = f"{words}\n\n{groups}" if name in ("run", "import") else words
        epilog = None if name not in _CHANGED else words
        return commands.add_parser(name, help=does, epilog=epilog, **layout).add_argument

    file: dict[str, Any] = {"type": Path}
    flag: dict[str, Any] = {"action": "store_true"}
    packed = "may be .gz or .zst; - is the standard input"
    several = "a run for every combination of values: probe.learning_rate=1e-3,1e-2"
    add = arguments_of("run", "your prompts and your reward: completions, rewards, probes, a table")
    add("prompts", **file, help=f"JSON lines, each with prompt (or messages) and fields for the reward; {packed}")
    add("--reward", required=True, help="module:function or file.py:function, giving a number in [0, 1]")
    add("--run", **file, help="the run folder; runs/NAME after the file of prompts if not said")
    add("--test", **file, help="prompts to test on; without them the probes are cross-validated")
    add("--batched", **flag, help="the function takes lists and gives a list")
    add("-m", "--multirun", **flag, help=several)
    add = arguments_of("import", "the same from completions and rewards that you have already")
    add("candidates", **file, help=f"JSON lines, each with prompt (or messages), completion, reward; {packed}")
    add("--run", **file, required=True, help="the run folder")
    own = "your own features, .npy or Parquet, in the place of a model's; again for further blocks"
    add("--features", **file, action="append", default=[], help=own)
    add("-m", "--multirun", **flag, help=several)
    add = arguments_of("answer", "an answer chosen by a saved probe")
    add("prompt", nargs="?", help="the prompt; - reads it from the standard input")
    add("--prompts", **file, help=f"JSON lines of prompts in its place: a JSON line each, in batches; {packed}")
    add("--output", **file, help="of --prompts: the file that lines are added to, gone on with after a stop")
    add("--candidates", **flag, help="of --prompts: all candidates in every line")
    add("--probe", required=True, help="a folder such as runs/NAME/probes/prompts/policy_gradient")
    add("--n", type=int, help="candidates; as in training if not said")
    add("--beta", type=float, help="temperature of the choice, 0 takes the best; the probe's own if not said")
    add("--seed", type=int, help="for the same answer again; a new one every time if not said")
    add(
        "--at-least",
        type=float,
        help="no answer where it is less likely to be right, in [0, 1]; the probe must be calibrated",
    )
    add("--show-candidates", **flag, help="print all with score and probability (stderr)")
    serving.add(arguments_of("serve", "a saved probe for clients of OpenAI's protocol"))
    serving.add_update(arguments_of("update", "a new probe from what users said of a server's answers"))
    add = arguments_of(
        "export", "a probe that leaves: its model with the probe as a classifier's head, or a page of the hub"
    )
    add("probe", help="a folder such as runs/NAME/probes/prompts/policy_gradient")
    add("--to", required=True, choices=("sequence-classification", "hub"), help="what it becomes")
    add("where", help="the new folder, or USER/NAME on the hub")
    add("--private", **flag, help="of the hub: for nobody else to see")
    add = arguments_of("inspect", "what is in a run folder: rows a stage, pass rate, what is missing")
    add("run", **file, help="the run folder, such as runs/demo")
    add = arguments_of(
        "report", "a finished run as one HTML page: tables, figures, and every prompt with its candidates"
    )
    add("run", **file, help="the run folder, such as runs/demo")
    add("--output", **file, help="the page; report.html in the run folder if not said")
    add = arguments_of("pack", "a run in a few files, for sampler=recorded embedder=recorded")
    add("run", **file, help="the run folder, with its stages sample and embed finished")
    add("folder", **file, help="where the recording goes")
    add("--layers", type=int, nargs="+", help="of the features; all if not said")
    add("--note", action="append", default=[], help="NAME=TEXT, such as weights=..., kept in its card")
    return parser, dict(commands.choices)


def _completion(shells: Sequence[str]) -> str:
    settings = completion.settings(configuration.CORE, "run")
    _, commands = _parsers()
    of_command = {"": [*commands, "--help", "--version", "--completion"]}
    for name, parser in commands.items():
        options = [option for action in parser._actions for option in action.option_strings]
        of_command[name] = [*options, *(settings if name in _CHANGED else [])]
    return completion.script("qprobe", shells, of_command)


def _run(chosen: argparse.Namespace, overrides: Sequence[str]) -> int:
    from qprobe.cli import own_work

    work = functools.partial(own_work.run, chosen.prompts, chosen.reward, test=chosen.test, batched=chosen.batched)
    return _execute(work, own_work.run_folder(chosen.prompts, chosen.run), overrides, chosen.multirun)


def _import(chosen: argparse.Namespace, overrides: Sequence[str]) -> int:
    from qprobe.cli import own_work

    work = functools.partial(own_work.import_candidates, chosen.candidates, features=chosen.features)
    return _execute(work, chosen.run, overrides, chosen.multirun)


def _execute(make: Callable[..., Work], folder: Path, overrides: Sequence[str], several: bool) -> int:
    from qprobe.cli import composition, multirun

    def execute(folder: Path, words: Sequence[str]) -> None:
        work = make(folder=folder, overrides=words)
        for note in work.notes:
            print(note, file=sys.stderr)
        work.execute()
        print(work.closing_words())

    if not several:
        execute(folder, overrides)
        return 0
    jobs = multirun.plan(
        overrides,
        lambda words: {**composition.composed("run", words), "paths": {"run": str(folder)}},
        lambda config: Path(config["paths"]["run"]),
        composition.procedures,
    )
    return multirun.run("qprobe", jobs, lambda job: execute(job.folder, job.words))


def _answer(chosen: argparse.Namespace, overrides: Sequence[str]) -> int | None:
    from qprobe.cli import answering

    if (chosen.prompt is None) == (chosen.prompts is None):
        raise UsageError("Give either a prompt or --prompts FILE: qprobe answer --help says more.")
    if chosen.prompts is None and (chosen.output or chosen.candidates):
        raise UsageError(
            "--output and --candidates belong to --prompts FILE; --show-candidates prints those of a prompt."
        )
    if chosen.prompts is not None and chosen.show_candidates:
        raise UsageError("--show-candidates belongs to a single prompt; say --candidates.")
    words = [*overrides, *([] if chosen.n is None else [f"sampler.n={chosen.n}"])]
    asked = answering.Asked(chosen.probe, words, chosen.beta, chosen.seed, chosen.at_least)
    if chosen.prompts is None:
        answering.one(asked, chosen.prompt, chosen.show_candidates)
        return None
    return answering.many(asked, chosen.prompts, chosen.output, chosen.candidates)


def _export(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe.cli import exporting

    if chosen.to == exporting.CLASSIFIER:
        exporting.to_sequence_classification(chosen.probe, Path(chosen.where), overrides)
    else:
        exporting.to_hub(chosen.probe, chosen.where, chosen.private)


def _serve(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    serving.serve(chosen, overrides)


def _update(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    serving.update(chosen)


def _inspect(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe.pipeline import inspection

    print(inspection.to_text(inspection.inspect(chosen.run)))


def _report(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe.evaluation import candidates
    from qprobe.files import write_whole
    from qprobe.report import page

    path = chosen.output or chosen.run / "report.html"
    content = page.to_html(chosen.run.resolve().name, candidates.read(chosen.run)).encode()
    write_whole(path, content)
    print(f"{path} ({len(content) / 1e6:.1f} MB): open it in a browser.")


def _pack(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe.run import recording

    if wrong := [note for note in chosen.note if "=" not in note]:
        raise ValueError(f"--note {wrong[0]!r} has no name: write NAME=TEXT.")
    notes = dict(note.split("=", 1) for note in chosen.note)
    size = recording.pack(chosen.run, chosen.folder, chosen.layers, notes)
    print(
        f"{chosen.folder} ({size / 1e6:.1f} MB): sampler.recording={chosen.folder} embedder.recording={chosen.folder}."
    )


if __name__ == "__main__":
    sys.exit(main())
