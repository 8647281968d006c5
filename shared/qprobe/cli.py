"""The command `qprobe`.

qprobe run PROMPTS --reward MODULE:FUNCTION   your prompts and your reward: from completions to probes and a table
qprobe import CANDIDATES --run RUN            the same from completions and rewards that you have already
qprobe answer --probe PROBE PROMPT            an answer chosen by a saved probe
qprobe inspect RUN                            what is in a run folder
qprobe report RUN                             a finished run as one HTML page
qprobe pack RUN FOLDER                        a run without its model: what sampler=recorded reads
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qprobe.own_work import Work

OVERRIDES = "KEY=VALUE arguments change settings, such as sampler.n=16, model=hub model.name=NAME, evaluation.seeds=2."


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    chosen, rest = _parser().parse_known_args(arguments)
    if unknown := [
        word
        for word in rest
        if chosen.command in ("inspect", "report", "pack") or word.startswith("-") or "=" not in word
    ]:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    work = {"run": _run, "import": _import, "answer": _answer, "inspect": _inspect, "report": _report, "pack": _pack}
    try:
        work[chosen.command](chosen, rest)
    except KeyboardInterrupt:
        print("\nqprobe: stopped. What was written stays; the same command goes on from there.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"qprobe: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qprobe", description="Q-probes: adapt a frozen language model to a reward.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser(
        "run", help="your prompts and your reward: completions, rewards, probes, a table", epilog=OVERRIDES
    )
    running.add_argument(
        "prompts", type=Path, help="JSON lines, each with prompt (or messages) and fields for the reward"
    )
    running.add_argument(
        "--reward", required=True, help="module:function or file.py:function, giving a number in [0, 1]"
    )
    running.add_argument("--run", type=Path, help="the run folder; runs/NAME after the file of prompts if not said")
    running.add_argument("--test", type=Path, help="prompts to test on; without them the probes are cross-validated")
    running.add_argument("--batched", action="store_true", help="the function takes lists and gives a list")
    importing = commands.add_parser(
        "import", help="the same from completions and rewards that you have already", epilog=OVERRIDES
    )
    importing.add_argument(
        "candidates", type=Path, help="JSON lines, each with prompt (or messages), completion, reward"
    )
    importing.add_argument("--run", type=Path, required=True, help="the run folder")
    answering = commands.add_parser(
        "answer",
        help="an answer chosen by a saved probe",
        epilog="KEY=VALUE arguments change settings, such as sampler.temperature=0.7 or model.device=cpu.",
    )
    answering.add_argument("prompt", help="the prompt; - reads it from the standard input")
    answering.add_argument("--probe", required=True, help="a folder such as runs/NAME/probes/prompts/policy_gradient")
    answering.add_argument("--n", type=int, help="candidates; as in training if not said")
    answering.add_argument(
        "--beta", type=float, help="temperature of the choice, 0 takes the best; the probe's own if not said"
    )
    answering.add_argument("--seed", type=int, help="for the same answer again; a new one every time if not said")
    answering.add_argument(
        "--show-candidates", action="store_true", help="print all with score and probability (stderr)"
    )
    inspecting = commands.add_parser(
        "inspect", help="what is in a run folder: rows a stage, pass rate, what is missing"
    )
    inspecting.add_argument("run", type=Path, help="the run folder, such as runs/demo")
    reporting = commands.add_parser(
        "report", help="a finished run as one HTML page: tables, figures, and every prompt with its candidates"
    )
    reporting.add_argument("run", type=Path, help="the run folder, such as runs/demo")
    reporting.add_argument("--output", type=Path, help="the page; report.html in the run folder if not said")
    packing = commands.add_parser(
        "pack", help="prompts, completions and features of a run in a few files, for sampler=recorded embedder=recorded"
    )
    packing.add_argument("run", type=Path, help="the run folder, with its stages sample and embed finished")
    packing.add_argument("folder", type=Path, help="where the recording goes")
    packing.add_argument("--layers", type=int, nargs="+", help="of the features; all if not said")
    packing.add_argument("--note", action="append", default=[], help="NAME=TEXT, such as weights=..., kept in its card")
    return parser


def _run(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import own_work

    _execute(
        own_work.run(
            chosen.prompts,
            chosen.reward,
            folder=chosen.run,
            test=chosen.test,
            batched=chosen.batched,
            overrides=overrides,
        )
    )


def _import(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import own_work

    _execute(own_work.import_candidates(chosen.candidates, folder=chosen.run, overrides=overrides))


def _execute(work: Work) -> None:
    for note in work.notes:
        print(note, file=sys.stderr)
    work.execute()
    print(work.closing_words())


def _answer(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import composition
    from qprobe.probe import QProbe

    prompt = sys.stdin.read().rstrip("\n") if chosen.prompt == "-" else chosen.prompt
    if not prompt.strip():
        raise ValueError("The prompt is empty: give a text, or - and a text on the standard input.")
    more = [] if chosen.n is None else [f"sampler.n={chosen.n}"]
    policy = composition.policy(QProbe.from_pretrained(chosen.probe), [*overrides, *more], chosen.beta)
    choice = policy.choose(prompt, chosen.seed)
    if chosen.show_candidates:
        for place, candidate in enumerate(choice.candidates):
            mark = "chosen" if place == choice.chosen else "      "
            print(f"{mark}  Q {candidate.score:+.3f}  probability {candidate.probability:.3f}", file=sys.stderr)
            print("\n".join(f"    | {line}" for line in candidate.text.splitlines()), file=sys.stderr)
    if not choice.answer.strip():
        empty = sum(not candidate.text.strip() for candidate in choice.candidates)
        raise RuntimeError(
            f"The answer that was chosen is empty, as are {empty} of its {len(choice.candidates)} candidates: ask again, with "
            "more candidates (--n) or a longer sampler.max_new_tokens; --show-candidates prints all."
        )
    print(choice.answer)


def _inspect(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import inspection

    print(inspection.to_text(inspection.inspect(chosen.run)))


def _report(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import candidates
    from qprobe.files import write_whole
    from qprobe.report import page

    path = chosen.output or chosen.run / "report.html"
    content = page.to_html(chosen.run.resolve().name, candidates.read(chosen.run)).encode()
    write_whole(path, content)
    print(f"{path} ({len(content) / 1e6:.1f} MB): open it in a browser.")


def _pack(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    from qprobe import recording

    if wrong := [note for note in chosen.note if "=" not in note]:
        raise ValueError(f"--note {wrong[0]!r} has no name: write NAME=TEXT.")
    notes = dict(note.split("=", 1) for note in chosen.note)
    size = recording.pack(chosen.run, chosen.folder, chosen.layers, notes)
    print(
        f"{chosen.folder} ({size / 1e6:.1f} MB): sampler.recording={chosen.folder} embedder.recording={chosen.folder}."
    )


if __name__ == "__main__":
    sys.exit(main())
