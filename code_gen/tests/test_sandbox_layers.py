"""The layers themselves: the filter of system calls against the kernel's own headers, and what happens where one is missing."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from qprobe_code_gen.sandbox import kernel, seccomp
from qprobe_code_gen.sandbox.layers import STOPS

LINUX = sys.platform.startswith("linux")
HEADERS = {
    "x86_64": (0, Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")),
    "aarch64": (1, Path("/usr/include/asm-generic/unistd.h")),
}
ALLOWED, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def verdict(machine: str, number: int, argument: int = 0, architecture: int | None = None, **options: Any) -> int:
    """What the filter answers, by a second implementation of the four BPF instructions it is made of."""
    code = list(struct.iter_unpack("HBBI", seccomp.assemble(machine, **options)))
    data = {0: number, 4: architecture or seccomp.ARCHITECTURES[machine], 16: argument & 0xFFFFFFFF}
    accumulator, position = 0, 0
    while True:
        kind, jump_true, jump_false, value = code[position]
        position += 1
        if kind == 0x20:
            accumulator = data[value]
        elif kind == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[kind]
            position += jump_true if holds else jump_false


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_those_of_the_kernel_s_headers(machine: str) -> None:
    column, header = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"needs the kernel's headers: {header}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name: int(number) for name, number in found}
    ours: dict[str, tuple[int | None, int | None]] = {
        **seccomp.REFUSED,
        **seccomp.ON_ITSELF,
        **seccomp.SIGNALLING,
        **seccomp.SIGNALLING_OTHERWISE,
        **seccomp.FORKING,
        "clone": seccomp.CLONE,
        "clone3": seccomp.CLONE3,
        "prctl": seccomp.PRCTL,
    }
    assert {name: pair[column] for name, pair in ours.items()} == {name: numbers.get(name) for name in ours}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_exactly_what_is_listed(machine: str) -> None:
    column = 0 if machine == "x86_64" else 1
    listed = {pair[column] for pair in seccomp.REFUSED.values()}
    special = {seccomp.CLONE3[column]}
    for number in range(600):
        expected = EPERM if number in listed else ENOSYS if number in special else ALLOWED
        assert verdict(machine, number) == expected, number
    clone, prctl = seccomp.CLONE[column], seccomp.PRCTL[column]
    assert verdict(machine, clone, 0x003D0F00) == ALLOWED  # a thread
    assert verdict(machine, clone, 0x01200011) == ALLOWED  # a fork
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, clone, flag | 17) == EPERM
    assert verdict(machine, prctl, 1) == EPERM  # PR_SET_PDEATHSIG
    assert verdict(machine, prctl, 15) == ALLOWED  # PR_SET_NAME
    assert verdict(machine, seccomp.ON_ITSELF["prlimit64"][column], 1) == EPERM
    assert verdict(machine, 0, architecture=0x40000003) == ENOSYS  # 32-bit calls
    if machine == "x86_64":
        assert verdict(machine, 0x40000000 + 1) == ENOSYS  # x32


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_without_a_pid_namespace_only_a_program_s_own_process_may_be_signalled(machine: str) -> None:
    column = 0 if machine == "x86_64" else 1
    kill = seccomp.SIGNALLING["kill"][column]
    assert verdict(machine, kill, 77, own_pid=77) == ALLOWED
    assert verdict(machine, kill, 78, own_pid=77) == EPERM
    assert verdict(machine, kill, -1, own_pid=77) == EPERM
    assert verdict(machine, kill, 78) == ALLOWED


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_where_nothing_bounds_processes_only_threads_may_be_started(machine: str) -> None:
    column = 0 if machine == "x86_64" else 1
    assert verdict(machine, seccomp.CLONE[column], 0x003D0F00, threads_only=True) == ALLOWED
    assert verdict(machine, seccomp.CLONE[column], 0x01200011, threads_only=True) == EPERM
    for pair in seccomp.FORKING.values():
        number = pair[column]
        if number is not None:
            assert verdict(machine, number, threads_only=True) == EPERM


def test_a_machine_whose_calls_are_not_known_has_no_filter() -> None:
    with pytest.raises(OSError, match="riscv64"):
        seccomp.assemble("riscv64")


# A container that forbids new namespaces, as Docker does: the filter refuses unshare before the executor starts.
WITHOUT_NAMESPACES = """
import ctypes, json, struct, sys
from qprobe_code_gen.sandbox import Executor, ExecutorError, Limits, Program, kernel, seccomp
unshare = {"x86_64": 272, "aarch64": 97}[kernel.MACHINE]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
data = b"".join(struct.pack("HBBI", *c) for c in code)
kept = ctypes.create_string_buffer(data, len(data))
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.syscall("seccomp", 1, 0, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(kept)))
programs = [
    Program("def f(): return 1", "assert f() == 1"),
    Program("def f(): return 1", "assert f() == 2"),
    Program("import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(3600)"),
    Program("open('x', 'w').write('y')\\nimport os, tempfile\\nassert tempfile.gettempdir() == os.getcwd()"),
    Program("open('/etc/x', 'w')"),
    Program("import os\\nos.kill(os.getppid(), 9)"),
    Program("import socket\\nsocket.socket()"),
    Program("while True: pass"),
    Program("import os\\nos.listdir('/root')\\nopen('/etc/shadow')"),
]
with Executor(workers=2, limits=Limits(cpu_seconds=0.4)) as executor:
    executions = dict(executor.run(programs))
    layers = executor.info()
try:
    Executor(strict=True)
    refusal = ""
except ExecutorError as fault:
    refusal = str(fault)
print(json.dumps({
    "verdicts": [executions[i].verdict for i in range(len(programs))],
    "active": [layer.name for layer in layers if layer.active],
    "notes": {layer.name: layer.note for layer in layers},
    "refusal": refusal,
}))
"""


@pytest.mark.skipif(not LINUX, reason="takes namespaces away, which only Linux has")
def test_without_namespaces_programs_run_with_what_there_is_and_strict_refuses() -> None:
    try:
        seccomp.assemble(kernel.MACHINE)
    except OSError as fault:
        pytest.skip(str(fault))
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_NAMESPACES)], capture_output=True, text=True, check=True
    )
    found = json.loads(child.stdout)
    passed, failed, forked, wrote, outside, killed, socket, busy, read = found["verdicts"]
    assert (passed, failed, wrote, busy) == ("passed", "failed", "passed", "timeout")
    assert "error" in (outside, killed) or "landlock" not in found["active"]
    assert [outside, socket, read] == ["error"] * 3
    assert killed == "error"
    assert forked in ("passed", "error")  # root without another id may start no process at all
    assert not {"pid namespace", "mount namespace", "network namespace"} & set(found["active"])
    assert "unshare" in found["notes"]["mount namespace"]
    assert "strict isolation was asked for" in found["refusal"]
    assert "mount namespace" in found["refusal"]


def test_every_layer_says_what_it_stops() -> None:
    assert all(stops for stops in STOPS.values())
    assert len(STOPS) == 16
