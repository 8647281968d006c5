"""Tiny models with random weights and a byte-level tokenizer, made in code: real transformers, no hub, milliseconds."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import re
import secrets
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# No test may wait for a network; libraries read this when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests that run side by side have a core each; torch counts its threads when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Models that are unpacked once stay for the next call of the tests, and out of the user's own cache.
os.environ.setdefault("QPROBE_CACHE", str(Path(__file__).parent / ".pytest_cache" / "qprobe"))

# Run folders are thousands of small files, each written through to the disk: in memory, where there is enough of it.
if (
    os.access(IN_MEMORY := "/dev/shm", os.W_OK)
    and os.statvfs(IN_MEMORY).f_bavail * os.statvfs(IN_MEMORY).f_frsize > 4 * 2**30
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", IN_MEMORY)

import pytest
import torch

from qprobe.models.language_model import ModelSpec


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the collector need not look at them after every some tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that the caller leaves to chance (an answer's, a request's) is the same in every run of a test.

    A tiny model of random weights ends at its first token now and then, and an empty answer is an error: no test may fail by that
    once in some hundred runs.
    """
    monkeypatch.setattr(secrets, "randbits", random.Random(request.node.nodeid).getrandbits)


CORPUS = [
    "def add(first, second):\n    return first + second\n",
    "The answer to the question is the number of the letters in the word.",
    "<|user|>What is the sum?<|end|>\n<|assistant|>\n",
]
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONTEXT = 192


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """About 300 tokens: every byte, some merges, five special ones; BOS is put before plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.chat_template = chat_template
    return fast


def save_model(folder: Path, config: Any, tokenizer: Any, seed: int = 0) -> ModelSpec:
    """Write a model of random weights with its tokenizer; the process's random state is left as it was."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(name=str(folder), dtype="float32", device="cpu")


def llama_config(**changes: Any) -> Any:
    """Grouped queries (4 heads, 2 of keys), 4 layers; weights wide enough that scores are far from flat."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**values | changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A Llama of 4 layers and width 32: its attention is the plain one, so prompts are shared."""
    return save_model(tmp_path_factory.mktemp("tiny-llama"), llama_config(), byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_code_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The same with a context that holds HumanEval's prompts byte by byte."""
    config = llama_config(max_position_embeddings=8192)
    return save_model(tmp_path_factory.mktemp("tiny-code-llama"), config, byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_sliding_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A Gemma 2 with a window of 6 tokens in every other layer and capped scores: keys and values are copied."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=CONTEXT,
        sliding_window=6,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save_model(tmp_path_factory.mktemp("tiny-gemma2"), config, byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_gpt2_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A GPT-2: learned positions, no rotary ones, another name for its layers; keys and values are copied."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save_model(tmp_path_factory.mktemp("tiny-gpt2"), config, byte_tokenizer())


@pytest.fixture(scope="session")
def tiny_qwen2_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A Qwen2: biased queries, and one matrix for embeddings and output head."""
    from transformers import Qwen2Config

    values = llama_config(num_hidden_layers=3, tie_word_embeddings=True).to_dict()
    for name in ("model_type", "head_dim", "architectures", "transformers_version", "rope_parameters"):
        values.pop(name, None)
    return save_model(tmp_path_factory.mktemp("tiny-qwen2"), Qwen2Config(**values), byte_tokenizer())


def load_from_tests(name: str) -> ModuleType:
    """A module of shared/tests that is no test file."""
    path = Path(__file__).parent / "shared" / "tests" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"qprobe_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The module `shared/tests/fakes.py`: a sampler, an embedder and a reward in a few lines of arithmetic."""
    return load_from_tests("fakes")


@pytest.fixture(scope="session")
def api_server() -> ModuleType:
    """The module `shared/tests/api_server.py`: an OpenAI-compatible server in a thread."""
    return load_from_tests("api_server")


@pytest.fixture(scope="session")
def vllm_server() -> ModuleType:
    """The module `shared/tests/vllm_server.py`: vLLM's own server, and a proxy that does harm."""
    return load_from_tests("vllm_server")


@pytest.fixture
def make_server(api_server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModelSpec], Any]]:
    """Start an OpenAI-compatible server on a model; its key is in the environment, and waits are short."""
    from qprobe.models import openai_client

    monkeypatch.setenv("OPENAI_API_KEY", api_server.KEY)
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 0.01)
    started: list[Any] = []

    def make(spec: ModelSpec) -> Any:
        started.append(api_server.Server(spec))
        return started[-1]

    yield make
    openai_client.close_clients()
    for server in started:
        server.close()


@pytest.fixture
def server(make_server: Callable[[ModelSpec], Any], tiny_model: ModelSpec) -> Any:
    """An OpenAI-compatible server with the tiny Llama behind it."""
    return make_server(tiny_model)


@pytest.fixture
def refusal(api_server: ModuleType) -> Callable[..., Exception]:
    """Makes an error as a server words it, for a server's `faults` and `always`."""
    made: Callable[..., Exception] = api_server.Refusal
    return made


@pytest.fixture
def key(api_server: ModuleType) -> str:
    """The key that the servers take."""
    return str(api_server.KEY)


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command's main in an empty folder: it must end in a status, say something in its first or last line, and leave
    no traceback, no advice about Hydra and no file. Gives back its standard output."""

    def run(main: Callable[[list[str]], int], line: str, status: int, said: str) -> str:
        monkeypatch.chdir(tmp_path)
        try:
            found: Any = main(line.split())
        except SystemExit as stopped:
            found = stopped.code
        printed = capsys.readouterr()
        text = (printed.out + printed.err).strip()
        assert found == status, text
        assert said in text.splitlines()[0] or said in text.splitlines()[-1], text
        for word in ("Traceback", "HYDRA_FULL_ERROR", "hydra.cc", "Hydra 1"):
            assert word not in text
        assert list(tmp_path.iterdir()) == []
        return printed.out

    return run


@pytest.fixture(scope="module")
def six_cpus() -> Iterator[Any]:
    """A Ray of its own with more logical processors than this machine may have."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that nobody looks at are drawn, but not laid out and written: that takes longer than the rest of a small run.

    test_report_figures.py has the real ones.
    """
    drawing = pytest.importorskip("qprobe.report.drawing", reason="figures need the extra `report`")

    def plain(figure: Any, suffix: str) -> bytes:
        figure.set_layout_engine("none")
        if suffix == "png":
            figure.draw_without_rendering()
        return f"a figure as {suffix}".encode()

    monkeypatch.setattr(drawing, "image", plain)


ARCHITECTURES = ("tiny_model", "tiny_sliding_model", "tiny_gpt2_model")


@pytest.fixture(params=ARCHITECTURES)
def any_tiny_model(request: pytest.FixtureRequest) -> ModelSpec:
    """Every tiny model in turn: both ways of qprobe.models.prefix."""
    spec: ModelSpec = request.getfixturevalue(request.param)
    return spec


@functools.lru_cache(maxsize=8)
def stock_model(spec: ModelSpec) -> Any:
    """A copy of its own of the model, with transformers' plain (eager) attention, untouched by qprobe."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec.name, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def stock() -> Callable[[ModelSpec], Any]:
    """The stock model of a spec, the second implementation that ours is compared with."""
    return stock_model


@pytest.fixture(scope="session")
def stock_states() -> Callable[[ModelSpec, Sequence[int]], tuple[torch.Tensor, ...]]:
    """The hidden states (T, D) of every layer 0..L of one sequence, run by itself."""

    def states(spec: ModelSpec, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            output = stock_model(spec)(torch.tensor([list(ids)]), output_hidden_states=True)
        return tuple(layer[0] for layer in output.hidden_states)

    return states


@pytest.fixture(scope="session")
def stock_logprobs() -> Callable[[ModelSpec, Sequence[int]], torch.Tensor]:
    """Log-probabilities (T, V) of the token after each of one sequence, run by itself."""

    def logprobs(spec: ModelSpec, ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            scores: torch.Tensor = stock_model(spec)(torch.tensor([list(ids)])).logits[0]
        return scores.double().log_softmax(dim=-1)

    return logprobs


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., list[list[int]]]:
    """Token ids of the given lengths, none special."""

    def draw(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(len(SPECIAL_TOKENS), 300, (length,), generator=generator).tolist() for length in lengths]

    return draw


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest relative L2 distance of any row (N, D) from its reference."""

    def error(values: torch.Tensor, reference: torch.Tensor) -> float:
        assert values.shape == reference.shape
        distance = (values.double() - reference.double()).norm(dim=-1) / reference.double().norm(dim=-1)
        return float(distance.max())

    return error


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSpec]:
    """Save a tiny Llama with some settings changed, and a chat template or none."""

    def make(chat_template: str | None = CHAT_TEMPLATE, seed: int = 0, **changes: Any) -> ModelSpec:
        folder = tmp_path_factory.mktemp("tiny")
        return save_model(folder, llama_config(**changes), byte_tokenizer(chat_template), seed)

    return make


def install(target: Path, name: str, modules: dict[str, str], entry_points: str, version: str = "1.0") -> None:
    """Install a package of a few modules with pip, from a wheel that is written here: no build back end, no network."""
    info = f"{name}-{version}.dist-info"
    files = {f"{module}.py": text for module, text in modules.items()} | {f"{info}/entry_points.txt": entry_points}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    target.mkdir(parents=True, exist_ok=True)
    wheel = target.parent / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for path, text in files.items():
            packed.writestr(path, text)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the package `letters` of docs/BACK_ENDS.md is installed, written as the page has it."""
    page = (Path(__file__).parent / "docs" / "BACK_ENDS.md").read_text()
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("python", "toml")}
    groups = tomllib.loads(blocks["toml"][0])["project"]["entry-points"]
    lines = [line for group, own in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in own.items()))]
    target = tmp_path_factory.mktemp("letters") / "site-packages"  # a name that the sandbox knows
    install(target, "letters", {"letters": "\n".join(blocks["python"])}, "\n".join(lines))
    return target
