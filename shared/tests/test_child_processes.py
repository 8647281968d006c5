"""What a dead process leaves behind ends; what a living one started, or one that another started, does not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qprobe.models import child_processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

# Starts a process that starts another, says who they are, and waits to be killed.
SCRIPT = """
import os, subprocess, sys, time
from qprobe.models.child_processes import Guard
guard = Guard()
inner = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
child = subprocess.Popen([sys.executable, "-c", inner], env=os.environ | guard.environment, stdout=subprocess.PIPE, text=True)
other = subprocess.Popen(["sleep", "60"])
grandchild = child.stdout.readline().strip()
if sys.argv[1:]:
    guard.dismiss()
print(child.pid, grandchild, other.pid, guard._process.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize("dismissed", [False, True])
def test_a_killed_process_takes_what_it_guards_along_unless_the_guard_was_dismissed(dismissed: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, *(["dismiss"] if dismissed else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, grandchild, other, guard = map(int, parent.stdout.readline().split())
        try:
            assert all(alive(pid) for pid in (child, grandchild, other))
            assert dismissed or alive(guard)
            parent.kill()
            parent.wait()
            if dismissed:
                time.sleep(1)
                assert alive(child)
                assert alive(grandchild)
            else:
                assert within(10, lambda: not alive(child) and not alive(grandchild))
            assert alive(other)
            assert within(10, lambda: not alive(guard))
        finally:
            for pid in filter(alive, (child, grandchild, other)):
                os.kill(pid, signal.SIGKILL)


def test_a_guarded_process_may_guard_others() -> None:
    outer, inner = child_processes.Guard(), child_processes.Guard()
    environment = os.environ | outer.environment | inner.environment
    with subprocess.Popen(["sleep", "60"], env=environment) as process:
        marks = [
            name for guard in (outer, inner) for name in guard.environment if name.startswith(child_processes.MARK)
        ]
        assert [child_processes.marked(mark) for mark in marks] == [[process.pid]] * 2
        outer.dismiss()
        inner.dismiss()
        assert process.poll() is None
        process.kill()
