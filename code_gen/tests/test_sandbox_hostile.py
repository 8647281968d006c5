"""Clumsy and hostile programs: none passes, none leaves anything behind, and the executor goes on.

Programs of the first group must end with the verdict that is named. Those of the second attack, and check themselves that
the attack was refused: they pass if and only if the sandbox held. Attacks that only a namespace, Landlock or seccomp stops
are skipped where that layer is absent.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qprobe_code_gen.sandbox import Executor, Limits, Program, Verdict

LINUX = sys.platform.startswith("linux")
LIMITS = Limits(cpu_seconds=1.0, wall_seconds=2.5, memory_mib=256, output_kib=64, processes=32, disk_mib=8)
TESTS = "assert answer() == 42"

ENDS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"error", "timeout"}),
    "fork bomb that catches": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        {"timeout"},
    ),
    "memory bomb": ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", {"out_of_memory"}),
    "one huge allocation": ("x = bytearray(1 << 40)", {"out_of_memory"}),
    "memory bomb in many processes": (
        "import os, time\nfor _ in range(16):\n    if os.fork() == 0:\n        x = b'1' * (60 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)",
        {"out_of_memory"},
    ),
    "busy in many processes": (
        "import os\nfor _ in range(3):\n    os.fork()\nwhile True:\n    pass",
        {"timeout"},
    ),
    "filling the disk": ("f = open('x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))", {"error"}),
    "filling the disk with many files": (
        "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(1 << 20))\n    i += 1",
        {"error"},
    ),
    "endless output": ("while True:\n    print('x' * 1000)", {"output_limit"}),
    "endless errors": ("import sys\nwhile True:\n    sys.stderr.write('x' * 1000)", {"output_limit"}),
    "endless output of a child": ("import os\nos.fork()\nwhile True:\n    os.write(1, b'x' * 1000)", {"output_limit"}),
    "a huge value": ("def answer():\n    return 42", {"output_limit"}),
    "sleeping": ("import time\ntime.sleep(3600)", {"timeout"}),
    "waiting for ever": ("import threading\nthreading.Event().wait()", {"timeout"}),
    "busy loop": ("while True:\n    pass", {"timeout"}),
    "busy loop inside C": ("sum(range(10 ** 12))", {"timeout"}),
    "busy in big integers": ("x = 7 ** (10 ** 9)", {"timeout", "out_of_memory"}),
    "busy in the compiler": ("x = " + "+".join(["(1" * 60 + ")" * 60] * 20_000), {"timeout", "out_of_memory", "error"}),
    "nested too deep to compile": ("x = " + "(" * 10_000 + ")" * 10_000, {"syntax_error", "out_of_memory"}),
    "ignoring every signal": (
        "import signal\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n    pass",
        {"timeout"},
    ),
    "catching everything": (
        "def f():\n    while True:\n        try:\n            while True:\n                pass\n"
        "        except BaseException:\n            pass\nf()",
        {"timeout"},
    ),
    "os._exit(0)": ("import os\nos._exit(0)", {"error"}),
    "os._exit(0) in the function": ("import os\ndef answer():\n    os._exit(0)", {"error"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {"error"}),
    "SystemExit in the function": ("def answer():\n    raise SystemExit(0)", {"error"}),
    "SystemExit in a thread": (
        "import threading\ndef stop():\n    raise SystemExit(0)\nt = threading.Thread(target=stop)\nt.start()\nt.join()",
        {"error"},
    ),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", {"error"}),
    "replacing the process": ("import os\nos.execv('/bin/true', ['true'])", {"error"}),
    "killing itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", {"error"}),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {"error"}),
    "patched exec and compile": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\nbuiltins.AssertionError = ValueError",
        {"error"},
    ),
    "patched AssertionError": (
        "import builtins\nclass Quiet(Exception):\n    pass\nbuiltins.AssertionError = Quiet\ndef answer():\n    return 1",
        {"failed"},
    ),
    "patched os and json": (
        "import os, sys, json\nfor n in ('write', '_exit', 'dup2', 'getpid'):\n    setattr(os, n, lambda *a: 0)\n"
        "json.dumps = lambda *a: 'passed'\ndef answer():\n    return 1",
        {"failed"},
    ),
    "a word on the result channel": ("import os\nos.write(3, b'passed\\n\\n')\nos._exit(0)", {"error"}),
    "words on all descriptors": (
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'x\\npassed\\n\\n')\n    except OSError:\n"
        "        pass\nos._exit(0)",
        {"error"},
    ),
    "speaking for its slot": (
        # A slot's answer (status 0, no CPU time, take another program) on every descriptor, then on with the work.
        "import os, struct, time\nfor fd in range(4, 256):\n    try:\n        os.write(fd, struct.pack('=idB', 0, 0.0, 0))\n"
        "    except OSError:\n        pass\ntime.sleep(0.2)\ndef answer():\n    return 41",
        {"failed"},
    ),
    "closing the result channel": ("import os\nos.closerange(3, 256)\ndef answer():\n    return 42", {"error"}),
    "a fork that passes in place of its parent": (
        "import os, time\nif os.fork():\n    time.sleep(0.3)\n    os._exit(1)\ndef answer():\n    return 42",
        {"error"},
    ),
    "an exception that cannot be described": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\nraise E",
        {"error"},
    ),
    "reading standard input": ("x = input()", {"error"}),
    "deep recursion": ("def f(n):\n    return f(n + 1)\nf(0)", {"error"}),
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10 ** 8)\nx = []\nfor _ in range(10 ** 6):\n    x = [x]\nrepr(x)",
        {"error", "out_of_memory", "timeout"},
    ),
    "thousands of threads": (
        "import threading\ne = threading.Event()\nfor _ in range(5000):\n    threading.Thread(target=e.wait).start()",
        {"error", "out_of_memory"},
    ),
    "zombies": ("import os\nwhile True:\n    if os.fork() == 0:\n        os._exit(0)", {"error"}),
    "opening files without end": ("x = []\nwhile True:\n    x.append(open('/dev/null'))", {"error"}),
    "raising its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10 ** 6, 10 ** 6))",
        {"error"},
    ),
}

# name: (code that must pass, the layer without which it may not)
REFUSED: dict[str, tuple[str, str]] = {
    "signals to the parent": (
        "import os, signal\ntry:\n    os.kill(os.getppid() or 1, signal.SIGKILL)\nexcept OSError:\n    pass",
        "pid namespace",
    ),
    "signals to everyone": (
        "import os, signal\ntry:\n    os.kill(-1, signal.SIGKILL)\nexcept OSError:\n    pass",
        "pid namespace",
    ),
    "seeing other processes": (
        "import os\nseen = 0\nfor pid in range(3, 40_000):\n    try:\n        os.kill(pid, 0)\n"
        "        seen += pid != os.getpid()\n    except OSError:\n        pass\nassert seen == 0",
        "pid namespace",
    ),
    "sockets": (
        "import socket\nfor kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):\n    try:\n"
        "        socket.socket(kind)\n        raise SystemExit('a socket')\n    except OSError:\n        pass",
        "seccomp",
    ),
    "reading home": (
        "import os\nfor path in ('/root', '/home'):\n    try:\n        names = os.listdir(path)\n    except OSError:\n"
        "        continue\n    assert not any(n.startswith(('.ssh', '.bash', '.netrc')) for n in names), names",
        "mount namespace",
    ),
    "reading secrets of the system": (
        "for path in ('/etc/shadow', '/proc/1/environ', '/proc/self/environ', '/proc/1/maps', '/sys/kernel'):\n    try:\n"
        "        open(path, 'rb').read()\n        raise SystemExit(path)\n    except OSError:\n        pass",
        "mount namespace",
    ),
    "reading the environment": (
        "import os\nassert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'TMPDIR'}, os.environ\n"
        "assert 'QPROBE_SECRET' not in os.environ",
        "empty environment",
    ),
    "writing outside": (
        "import os, sys\nfor path in ('/x', '/etc/x', '/usr/x', '/var/x', os.__file__ + '.x', '/dev/x', sys.prefix + '/x'):\n"
        "    try:\n        open(path, 'w')\n        raise SystemExit(path)\n    except OSError:\n        pass",
        "landlock",
    ),
    "symlinks out of the tree": (
        "import os\nfor target in ('/etc/passwd', '/usr/x', os.__file__):\n    os.path.lexists('l') and os.unlink('l')\n"
        "    os.symlink(target, 'l')\n    try:\n        open('l', 'a')\n        raise SystemExit(target)\n"
        "    except OSError:\n        pass",
        "landlock",
    ),
    "deleting the tree": (
        "import os, shutil\nfor path in ('/etc', os.path.dirname(os.__file__) + '/json'):\n"
        "    shutil.rmtree(path, ignore_errors=True)\nassert os.path.exists(os.__file__)\nimport json.tool",
        "landlock",
    ),
    "ptrace and process memory": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(0, 0, 0, 0) == -1 and ctypes.get_errno() == 1",
        "seccomp",
    ),
    "raw system calls": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def refused(result):\n    assert result == -1, result\n    assert ctypes.get_errno() in (1, 38)\n"
        "refused(libc.unshare(0x10000000))\nrefused(libc.setns(0, 0))\nrefused(libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0))\n"
        "refused(libc.umount2(b'/tmp', 2))\nrefused(libc.chroot(b'/tmp'))\nrefused(libc.reboot(0))\n"
        "refused(libc.prctl(1, 0, 0, 0, 0))\nrefused(libc.memfd_create(b'x', 0))\nrefused(libc.shmget(0, 4096, 0o600))\n"
        "refused(libc.personality(0xffffffff))\nrefused(libc.syscall(425, 1, 0))",
        "seccomp",
    ),
    "limits and priority of the slot": (
        "import os, resource\n"
        "for act in (lambda: resource.prlimit(1, resource.RLIMIT_AS, (1, 1)), lambda: os.sched_setaffinity(1, {0}),\n"
        "            lambda: os.setpriority(os.PRIO_USER, 0, 19), lambda: os.setpriority(os.PRIO_PROCESS, 1, 19)):\n"
        "    try:\n        act()\n        raise SystemExit('the slot was touched')\n    except OSError:\n        pass",
        "seccomp",
    ),
    "holding capabilities": (
        "import ctypes, struct\ndata = ctypes.create_string_buffer(24)\n"
        "header = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0), 8)\n"
        "assert ctypes.CDLL(None).capget(header, data) == 0 and data.raw == bytes(24), data.raw",
        "user namespace",
    ),
    "becoming root": (
        "import os\nfor act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):\n    try:\n"
        "        act()\n        raise SystemExit('root')\n    except OSError:\n        pass",
        "unprivileged id",
    ),
    "device files": (
        "import os, stat\ntry:\n    os.mknod('d', stat.S_IFBLK | 0o600, os.makedev(254, 0))\n"
        "    raise SystemExit('a device')\nexcept OSError:\n    pass",
        "unprivileged id",
    ),
    "closed outputs": ("import os, sys\nsys.stdout.close()\nsys.stderr.close()\nos.close(0)", "bounded output"),
    "odd permissions left behind": (
        "import os\nos.makedirs('a/b/c')\nopen('a/b/c/f', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('.', 0)",
        "bounded output",
    ),
    "a fork that outlives": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3600)\n    os._exit(0)",
        "bounded output",
    ),
    "a thread that outlives": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()",
        "bounded output",
    ),
    "exit handlers": ("import atexit, os\natexit.register(lambda: os._exit(1))", "bounded output"),
}


@pytest.fixture(scope="module", autouse=True)
def _secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPROBE_SECRET", "of the parent")
        yield


def children(pid: int) -> list[int]:
    return [int(x) for task in Path(f"/proc/{pid}/task").iterdir() for x in (task / "children").read_text().split()]


def left_behind(executor: Executor) -> list[int]:
    """Processes below the executor that are neither its own nor one of its slots, after a moment to end."""
    parents = [executor.pid]
    if next(layer for layer in executor.info() if layer.name == "pid namespace").active:
        parents = children(executor.pid)  # the one that was started waits outside
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a slot that is ending
            # Below the nursery are the zygote and the slots, up to three kinds of them a worker.
            below = [slot for parent in parents for slot in children(parent)]
            found = [program for slot in below for program in children(slot)] + below[1 + 3 * executor.workers :]
            if not found:
                return []
        time.sleep(0.02)
    return found


def needs_a_bound(executor: Executor) -> None:
    if not next(layer for layer in executor.info() if layer.name == "process bound").active:
        pytest.skip("nothing bounds processes here: a fork bomb would hit the machine")


@pytest.mark.parametrize("name", ENDS)
def test_a_hostile_program_ends_with_the_right_verdict_and_leaves_nothing(executor: Executor, name: str) -> None:
    needs_a_bound(executor)
    code, allowed = ENDS[name]
    expression = "'x' * 10 ** 6" if name == "a huge value" else ""
    tests = "" if expression else TESTS
    execution = executor.execute(Program(code, tests, expression))
    assert execution.verdict.value in allowed, execution
    assert len(execution.detail) <= 300
    assert execution.detail
    assert len(execution.output) <= LIMITS.output_kib << 10
    if LINUX:
        assert left_behind(executor) == []
    assert executor.execute(Program("x = 1", "assert x == 1")).passed


@pytest.mark.parametrize("name", REFUSED)
def test_an_attack_is_refused_and_the_honest_rest_passes(executor: Executor, name: str) -> None:
    code, needed = REFUSED[name]
    if not next(layer for layer in executor.info() if layer.name == needed).active:
        pytest.skip(f"this machine lacks: {needed}")
    execution = executor.execute(Program(code + "\ndef answer():\n    return 42", TESTS))
    assert execution.verdict is Verdict.PASSED, execution
    if LINUX:
        assert left_behind(executor) == []
    # What the program did to its folder, its limits or its slot must not reach the next ones.
    check = (
        "import os, tempfile\nassert not [n for n in os.listdir('.') if n in 'ald']\ntempfile.TemporaryFile().close()"
    )
    after = [execution for _, execution in executor.run([Program(f"{check}\nn = {i}") for i in range(4)])]
    assert all(execution.passed for execution in after), after


def test_a_program_holds_its_three_streams_and_the_channel_and_no_other_descriptor(executor: Executor) -> None:
    look = "import os\nopen_ones = []\nfor fd in range(4096):\n    try:\n        os.fstat(fd)\n        open_ones.append(fd)\n"
    execution = executor.execute(Program(look + "    except OSError:\n        pass", expression="open_ones"))
    assert execution.value == "[0, 1, 2, 3]"
