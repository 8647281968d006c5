"""How many rows a machine decodes together best, found by a short measurement and remembered for model and machine.

A step reads all weights once, however few its rows are: more rows share that, until the products themselves take the time. Where
that is depends on processor, threads, model and type.

It is measured by steps of one token, for 64 rows and then twice as many, and so on: the fastest of some steps after a first
one. The rows are those of a usual run: eight to a prompt of 256 tokens, in as many groups as a batch has
(`qprobe.models.growing`). With one short prompt the products alone were seen, and 256 rows were as good as 512, which draw
HumanEval a tenth faster.

It ends where rows have been doubled twice and a row's time fell by less than a tenth each time (a single slow moment may be
another process's doing), where they do not fit the memory, or after five seconds; taken are the fewest rows within a tenth of
the best time a row. What is found lies under `measured/` in the cache (`qprobe.models.cache`); delete the file to have it
measured anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import time

import torch
from tqdm import tqdm

from qprobe.files import fingerprint, write_whole
from qprobe.models.cache import cache_root
from qprobe.models.growing import groups_of
from qprobe.models.memory import PromptPasses

# Rows that are decoded together where no more are there: too few to pay for a measurement, and the fewest that it tries.
UNMEASURED = 64
_LAST = 1024
_PROMPT, _ROWS_A_PROMPT = 256, 8
# Of one number of rows: steps go on up to `_EACH` seconds, at least two and at most `_STEPS`, besides the first.
_STEPS, _EACH, _SECONDS = 10, 0.2, 5.0
_WORTH = 0.1
_METHOD = 2  # raised with what is measured
_found: dict[str, int] = {}


def best_rows(passes: PromptPasses) -> int:
    """Rows that are decoded together fastest, by a measurement of this process, or of an earlier one.

    Args:
        passes: of the model; nothing of it is in work.
    """
    key = _key(passes)
    if key not in _found:
        path = cache_root() / "measured" / f"{key}.json"
        try:
            _found[key] = max(1, int(json.loads(path.read_text())["rows"]))
        except (OSError, ValueError, KeyError, TypeError):
            seconds = seconds_a_row(passes)
            _found[key] = chosen(seconds)
            said = ", ".join(f"{rows}: {1000 * each:.2g}" for rows, each in seconds.items())
            name = passes.run.language_model.spec.name
            tqdm.write(
                f"{name}: {_found[key]} rows are decoded together (milliseconds a row and token, measured: {said}).",
                file=sys.stderr,
            )
            with contextlib.suppress(OSError):  # measured anew next time
                path.parent.mkdir(parents=True, exist_ok=True)
                noted = {"rows": _found[key], "seconds a row": seconds, "model": name}
                write_whole(path, json.dumps(noted).encode())
    return _found[key]


def seconds_a_row(passes: PromptPasses) -> dict[int, float]:
    """Rows -> seconds a row of one step, for as many as the measurement goes to."""
    run = passes.run
    found: dict[int, float] = {}
    prompt = run.prefill([[1] * _PROMPT])
    groups = groups_of(run.language_model.device)
    rows, in_vain, began = UNMEASURED, 0, time.perf_counter()
    while rows <= _LAST and in_vain < 2 and time.perf_counter() - began < _SECONDS:
        if found and passes.footprint.sampling(rows // _ROWS_A_PROMPT, _PROMPT, rows, _STEPS, False) > passes.budget():
            break
        owner = torch.arange(rows // groups) // _ROWS_A_PROMPT
        prompts = prompt.times(int(owner[-1]) + 1)
        continuation = run.continuation(prompts, owner)
        for _ in range(groups - 1):
            continuation.join(prompts, owner)
        ids = torch.ones(len(owner) * groups, 1, dtype=torch.int64, device=run.language_model.device)
        times: list[float] = []
        while len(times) <= 2 or (len(times) <= _STEPS and sum(times[1:]) < _EACH):
            before = time.perf_counter()
            scores = continuation.extend(ids, logits=True).logits
            assert scores is not None  # asked for
            scores[0, 0].item()  # a GPU has done its work
            times.append(time.perf_counter() - before)
        best_so_far = min(found.values(), default=math.inf)
        found[rows] = min(times[1:]) / len(ids)
        in_vain = in_vain + 1 if found[rows] > (1 - _WORTH) * best_so_far else 0
        rows *= 2
    return found


def chosen(seconds: dict[int, float]) -> int:
    """The fewest rows within a tenth of the best time."""
    best = min(seconds.values())
    return min(rows for rows, each in seconds.items() if each <= (1 + _WORTH) * best)


def _key(passes: PromptPasses) -> str:
    """Of model and machine: another number of threads is another machine."""
    language_model = passes.run.language_model
    device = language_model.device
    machine = [_METHOD, platform.node(), platform.machine(), torch.get_num_threads(), torch.__version__, str(device)]
    if device.type == "cuda":
        machine.append(torch.cuda.get_device_name(device))
    return f"rows-{fingerprint([language_model.spec.identity(), machine])}"
