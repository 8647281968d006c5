"""How executions come and go: streaming, cache, many at once, and nothing left behind, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qprobe_code_gen.sandbox import Executor, ExecutorError, Limits, Program, executor

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes through /proc")

SLEEP = Program("import time\ntime.sleep(3600)", limits=Limits(cpu_seconds=5, wall_seconds=3600))


Descendants = Callable[[int], list[int]]


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # A dead process whose parent was killed waits for the system's first process to reap it.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_results_come_as_they_end_with_their_indices() -> None:
    slow = Program("import time\ntime.sleep(0.5)")
    with Executor(workers=2) as executor:
        order = [index for index, _ in executor.run([slow, *(Program(f"x = {i}") for i in range(6))])]
    assert sorted(order) == list(range(7))
    assert order[-1] == 0


def test_programs_are_read_only_a_little_ahead() -> None:
    taken = 0

    def programs() -> Iterator[Program]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield Program(f"x = {i}")

    with Executor(workers=2) as executor:
        results = executor.run(programs())
        next(results)
        assert taken <= 4 * 2
        assert len(list(results)) == 99


def test_the_same_program_is_executed_once() -> None:
    program = Program("import os\nprint(os.urandom(8).hex())")
    with Executor(workers=2) as executor:
        outputs = {execution.output for _, execution in executor.run([program] * 10)}
        assert len(outputs) == 1
        assert executor.execute(program).output in outputs
        # A different limit is a different execution.
        assert executor.execute(Program(program.code, limits=Limits(memory_mib=512))).output not in outputs
        assert executor.execute(Program(program.code, tests="pass")).output not in outputs
    with Executor(workers=2, cache=False) as executor:
        assert len({execution.output for _, execution in executor.run([program] * 10)}) == 10


def test_a_timeout_of_the_clock_is_not_remembered() -> None:
    late = Program("import os, time\nprint(os.urandom(8).hex(), flush=True)\ntime.sleep(60)")
    with Executor(workers=1, limits=Limits(cpu_seconds=0.1, wall_seconds=0.3)) as executor:
        assert executor.execute(late).output != executor.execute(late).output


def test_large_programs_and_outputs_go_through() -> None:
    big = "x" * 3_000_000
    limits = Limits(output_kib=4096)
    with Executor(workers=2, limits=limits) as executor:
        programs = [Program(f"s = '{big}{i}'\nprint(s)", f"assert len(s) == {len(big) + 1}") for i in range(4)]
        executions = dict(executor.run(programs))
    assert [executions[i].output == f"{big}{i}\n" for i in range(4)] == [True] * 4


def test_leaving_the_loop_early_kills_what_runs_and_the_next_run_is_clean(descendants: Descendants) -> None:
    with Executor(workers=2, cache=False) as executor:
        counts = []
        for _ in range(3):
            for _, execution in executor.run(
                [Program("x = 1"), SLEEP, Program(SLEEP.code + "\n", limits=SLEEP.limits)]
            ):
                assert execution.passed
                break
            zygote = descendants(executor.pid)[1]
            counts.append(len(list(Path(f"/proc/{zygote}/fd").iterdir())))
        assert len(set(counts)) == 1, counts
        assert [i for i, e in executor.run([Program("y = 1"), Program("z = 1")] * 3) if not e.passed] == []
        assert wait_until(lambda: len(descendants(executor.pid)) <= 2 + 2 * 2)


def test_two_runs_at_once_are_refused() -> None:
    with Executor(workers=1) as executor:
        first = executor.run([Program("x = 1")] * 2)
        next(first)
        with pytest.raises(ExecutorError, match="run"):
            next(executor.run([Program("x = 2")]))
        list(first)
        assert executor.execute(Program("x = 2")).passed


def test_a_closed_executor_says_so() -> None:
    executor = Executor(workers=1)
    executor.close()
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.execute(Program("x = 1"))
    with pytest.raises(ValueError, match="workers"):
        Executor(workers=0)


@pytest.mark.parametrize("which", ["the one that waits outside", "nursery", "zygote"])
def test_a_killed_zygote_raises_and_is_never_a_verdict(which: str, descendants: Descendants) -> None:
    executor = Executor(workers=2)
    results = executor.run([Program("x = 1"), SLEEP, SLEEP])
    next(results)
    everything = [executor.pid, *descendants(executor.pid)]
    os.kill(everything[["the one that waits outside", "nursery", "zygote"].index(which)], signal.SIGKILL)
    with pytest.raises(ExecutorError, match="zygote"):
        next(results)
    assert wait_until(lambda: not alive(everything)), alive(everything)


def test_a_zygote_that_cannot_start_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "BOOTSTRAP", f"import no_such_module\n{executor.BOOTSTRAP}")
    with pytest.raises(ExecutorError, match="no_such_module"):
        Executor(workers=1)


PARENT = """
import sys
from qprobe_code_gen.sandbox import Executor, Limits, Program
sleep = Program("import os, time\\nos.fork()\\nos.setsid() if os.fork() == 0 else 0\\ntime.sleep(3600)",
                limits=Limits(cpu_seconds=5, wall_seconds=3600))
with Executor(workers=2, cache=False) as executor:
    results = executor.run([Program("x = 1"), sleep, sleep])
    next(results)
    print(executor.pid, flush=True)
    next(results)
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_parent(blow: signal.Signals, descendants: Descendants) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Tests that run in the background of a shell inherit an ignored SIGINT, which Python then leaves ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        assert parent.stdout is not None
        zygote = int(parent.stdout.readline())
        # Nursery and zygote in their pid namespace, two slots for programs and two for judges, two judges, two programs of
        # four processes each.
        ready = wait_until(lambda: len(descendants(zygote)) == 16)
        everything = [zygote, *descendants(zygote)]
        parent.send_signal(blow if ready else signal.SIGKILL)
        parent.wait(timeout=20)
    assert ready
    assert wait_until(lambda: not alive(everything)), alive(everything)


def test_programs_live_in_namespaces_of_their_own_and_apart_from_each_other(descendants: Descendants) -> None:
    program = "import time\nprint('started', flush=True)\ntime.sleep(3600)"
    limits = Limits(cpu_seconds=5, wall_seconds=3600)
    kinds = {"pid": "pid namespace", "net": "network namespace", "ipc": "ipc namespace", "mnt": "mount namespace"}
    with Executor(workers=2, limits=limits) as executor:
        absent = [layer.name for layer in executor.info() if not layer.active]
        results = executor.run([Program("x = 1"), Program(program), Program(program + "\n")])
        next(results)
        # Outside, nursery and zygote; then slots and what runs in them: two programs, their two judges.
        assert wait_until(lambda: len(descendants(executor.pid)) == 2 + 8 or absent)
        ends = [pid for pid in descendants(executor.pid) if not descendants(pid)][1:]
        for kind, layer in kinds.items():
            if layer not in absent:
                links = {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for pid in (os.getpid(), *ends)}
                assert len(links) == 5, kind


def test_descriptors_and_processes_are_as_many_after_many_executions_as_before(descendants: Descendants) -> None:
    def counts() -> tuple[int, int, int]:
        zygote = descendants(executor.pid)[1]
        own, other = (len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (os.getpid(), zygote))
        return own, other, len(descendants(executor.pid))

    with Executor(workers=2, cache=False, limits=Limits(cpu_seconds=0.2)) as executor:
        both_slots = [Program("import time\ntime.sleep(0.2)")] * 2
        list(executor.run(both_slots))
        before = counts()
        mixed = ["x = 1", "1 / 0", "x =", "import os\nos._exit(0)", "open('f', 'w').close()", "import os\nos.fork()"]
        list(executor.run(Program(mixed[i % len(mixed)]) for i in range(300)))
        list(executor.run(both_slots))
        assert wait_until(lambda: counts() == before), (before, counts())


def test_a_forked_copy_of_the_parent_may_not_use_or_end_the_executor() -> None:
    with Executor(workers=1) as executor:
        pid = os.fork()
        if pid == 0:
            try:
                executor.execute(Program("x = 1"))
            except ExecutorError as fault:
                executor.close()
                os._exit(0 if "belongs to the process" in str(fault) else 2)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert executor.execute(Program("x = 1")).passed
