"""A user's own work by the command `qprobe`: run, import and answer on a tiny model, on an API and on Ray."""

import csv
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qprobe import store
from qprobe.cli import main
from qprobe.models.language_model import ModelSpec
from qprobe.probe.estimator import QProbe

pytestmark = pytest.mark.usefixtures("plain_figures")

REWARD = """
def reward(prompt, completion, number):
    return (len(completion) + number) % 3 / 2

def whole(prompts, completions, number):
    return [reward(p, c, n) for p, c, n in zip(prompts, completions, number)]

def wrong(prompt, completion):
    return 2 if "3" in prompt else 1
"""
QUICK = ("evaluation.seeds=2", "evaluation.folds=2", "evaluation.bootstrap=100", "evaluation.draws=5", "probe.steps=5")
WORK = "stages=[sample,reward,embed,baselines,train,evaluate]"  # all but the report, whose figures take a second
RUN = ("run", "prompts.jsonl", "--reward", "own_reward.py:reward")
TESTED = ("run", "prompts.jsonl", "--test", "test.jsonl", "--reward", "own_reward.py:whole", "--batched")

Call = Callable[..., int]


@pytest.fixture
def call(tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command with a tiny model, in a working directory with prompts, test prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = [{"prompt": f"Say {number}.", "number": number} for number in range(9)]
    write("prompts.jsonl", *lines[:6])
    write("test.jsonl", *lines[6:])
    Path("own_reward.py").write_text(REWARD)
    model = ("model=hub", f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu")
    small = ("sampler.n=3", "sampler.max_new_tokens=6", "embedder.layers=[2]")

    def called(command: str, *arguments: str) -> int:
        more = () if command == "answer" else (*model, *small, *QUICK)
        return main.main(
            [command, *arguments, *(word for word in more if word.split("=")[0] not in " ".join(arguments))]
        )

    return called


def write(name: str, *lines: Any) -> str:
    Path(name).write_text("\n".join(map(json.dumps, lines)))
    return name


def candidates(sizes: list[int] = [2, 4, 3, 1, 5, 2], add: float = 0.0) -> list[dict[str, Any]]:  # noqa: B006
    """Completions of unequal groups, a row of every prompt in turn."""
    return [
        {"prompt": f"Say {p}.", "completion": f"{p} and {s}", "reward": (p + s) % 3 / 2 + add}
        for s in range(max(sizes))
        for p, size in enumerate(sizes)
        if s < size
    ]


def rows(table: str, schema: pa.Schema) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.found_table(Path(table), schema).read().to_pylist()
    return found


def contents(folder: str) -> dict[Path, int]:
    found = (path for path in Path(folder).rglob("*") if path.suffix in (".parquet", ".safetensors"))
    return {path: path.stat().st_mtime_ns for path in found}


def test_from_prompts_and_a_reward_to_an_answer(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*RUN, "--run", "runs/mine") == 0
    said = capsys.readouterr()
    assert "prompts=chat" in said.err
    for words in ("6 prompts x 3 samples", "2-fold cross-validation over prompts", "greedy"):
        assert words in said.out
    probe = "runs/mine/probes/prompts/auto"  # on a hidden state and likelihood columns
    assert f'Next:     qprobe answer --probe {probe} "your prompt"' in said.out.splitlines()[-1]
    probes = {path.name for path in Path(probe).parent.iterdir() if path.is_dir()}
    assert probes == {"auto", "policy_gradient", "reward_cross_entropy", "reward_mse"}
    texts = {row["task_id"]: row["prompt"] for row in rows("runs/mine/prompts/prompts", store.PROMPTS)}
    assert texts["prompts-00003"].endswith("<|user|>Say 2.<|end|>\n<|assistant|>\n")
    for pool in ("sample", "greedy"):
        completions = rows(f"runs/mine/completions/prompts.{pool}", store.COMPLETIONS)
        rewards = rows(f"runs/mine/rewards/prompts.{pool}/own_reward.reward", store.REWARDS)
        for completion, reward in zip(completions, rewards, strict=True):
            number = int(completion["task_id"][-1]) - 1
            assert reward["reward"] == (len(completion["completion"]) + number) % 3 / 2
    lengths = [row["finish_reason"] for row in rows("runs/mine/completions/prompts.sample", store.COMPLETIONS)]
    cut = f"{lengths.count('length') / 18:.0%} of the completions were cut at sampler.max_new_tokens=6."
    assert cut in said.out

    assert call("answer", "--probe", probe, "Say 7.", "--seed", "1", "--show-candidates") == 0
    said = capsys.readouterr()
    assert said.err.count("probability") == 3
    shown = said.err.partition("chosen")[2].partition("\n")[2].partition("       Q")[0]
    answer = said.out.splitlines()
    assert [line.removeprefix("    | ") for line in shown.splitlines()][: len(answer)] == answer
    assert call("answer", "--probe", probe, "Say 7.", "--seed", "1") == 0
    assert capsys.readouterr() == (said.out, "")


def test_the_text_of_the_readme_works_as_it_stands(call: Call) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## Your own prompts and reward")[2].partition("\n## ")[0]
    program, commands = (block.partition("\n")[2] for block in section.split("```")[1::2][:2])
    Path("short.py").write_text(program)
    written = subprocess.run([sys.executable, "short.py"], capture_output=True, text=True, check=True)
    Path("prompts.jsonl").write_text(written.stdout)
    lines = [shlex.split(line) for line in commands.replace("\\\n", " ").splitlines()]
    run, answer = (line[1:] for line in lines if line[0] == "qprobe")
    assert call(*(word for word in run if not word.startswith("sampler.")), WORK) == 0
    assert len(rows("runs/short/rewards/prompts.sample/short.reward", store.REWARDS)) == 120
    assert call(*answer) == 0


def test_the_same_command_does_nothing_twice(call: Call) -> None:
    arguments = ("run", "prompts.jsonl", "--reward", "own_reward:reward", WORK)
    assert call(*arguments) == 0
    before = contents("runs/prompts")  # the run folder is named after the file
    assert call(*arguments) == 0
    assert contents("runs/prompts") == before
    # Prompts, completions and rewards of two pools, features and likelihood columns; two sweeps, four probes, and the candidates
    # with their scores.
    assert len(before) == 7 + 7


def test_a_changed_reward_is_refused_and_only_its_table_need_go(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*RUN, "sampler.greedy=false", WORK)
    assert call(*arguments) == 0
    kept = contents("runs/prompts/completions") | contents("runs/prompts/features")
    Path("own_reward.py").write_text(REWARD.replace("% 3 / 2", "% 2"))
    capsys.readouterr()
    assert call(*arguments) == 1
    table = Path("runs/prompts/rewards/prompts.sample/own_reward.reward")
    assert str(table) in capsys.readouterr().err
    for path in table.iterdir():
        path.unlink()
    assert call(*arguments) == 0
    assert contents("runs/prompts/completions") | contents("runs/prompts/features") == kept
    assert {row["reward"] for row in rows(str(table), store.REWARDS)} <= {0.0, 1.0}


def test_with_test_prompts_the_probes_train_on_the_others(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path("runs/prompts/results/test.json")
    assert call(*TESTED, WORK) == 0
    assert capsys.readouterr().out.startswith("run:")
    assert len(rows("runs/prompts/completions/test.sample", store.COMPLETIONS)) == 9
    assert json.loads(results.read_text())["protocol"] == "trained on prompts, tested here"
    assert Path("runs/prompts/probes/prompts/policy_gradient/probe.json").exists()
    assert call(*TESTED, WORK, "baselines.names=[few_shot,prompt_rm]", "baselines.few_shot.shots=1") == 0
    found = {row["method"]: row["value"] for row in json.loads(results.read_text())["rows"]}
    assert None not in (found["few-shot (1 success)"], found["Prompt RM"])
    write("test.jsonl", {"prompt": "Say 3.", "number": 1})
    assert call(*TESTED, "--run", "other") == 1
    assert "Line 1 of the test prompts is line 4" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "start"), [("prompts=text", "Say 0."), ("prompts=chat", "<|bos|><|user|>Say 0.")])
def test_a_plain_prompt_is_read_as_asked_for(setting: str, start: str, call: Call) -> None:
    assert call(*RUN, setting, "stages=[sample]") == 0
    assert rows("runs/prompts/prompts/prompts", store.PROMPTS)[0]["prompt"].startswith(start)


def test_a_model_without_a_chat_template_continues_the_text(
    call: Call, make_model: Callable[..., ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*RUN, f"model.name={make_model(chat_template=None).name}", "stages=[sample]") == 0
    assert "prompts=text" in capsys.readouterr().err
    assert rows("runs/prompts/prompts/prompts", store.PROMPTS)[0]["prompt"] == "Say 0."


def test_candidates_of_unequal_groups_are_imported_and_answered_from(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("mine.jsonl", *candidates())
    assert call("import", path, "--run", "runs/mine") == 0
    said = capsys.readouterr()
    assert "5 prompts with 2 to 5 candidates each, 16 in all" in said.err
    assert "1 of 6 prompts" in said.err  # the fourth line's has a single candidate
    assert "5 prompts, 16 samples (at most 5 of a prompt)" in said.out
    assert "skyline pass@2" in said.out  # as many as the smallest group has
    # What a row is a mean over is said of every row: pass@1 of all candidates, a choice of k of them.
    assert [line.split()[-3:] for line in said.out.splitlines() if line.startswith("pass@1 ")] == [["2", "to", "5"]]
    completions = rows("runs/mine/completions/prompts.sample", store.COMPLETIONS)
    assert [(row["task_id"], row["sample"], row["completion"]) for row in completions] == [
        (f"prompts-{p + 1:05d}", s, f"{p} and {s}")
        for p, size in enumerate([2, 4, 3, 1, 5, 2])
        for s in range(size)
        if size > 1
    ]
    assert {row["finish_reason"] for row in completions} == {"imported"}
    rewards = rows("runs/mine/rewards/prompts.sample/imported", store.REWARDS)
    wanted = [(int(row["completion"][0]) + row["sample"]) % 3 / 2 for row in completions]
    assert [row["reward"] for row in rewards] == wanted
    assert main.main(["inspect", "runs/mine"]) == 0
    assert "16 imported" in capsys.readouterr().out
    probe = "runs/mine/probes/prompts/reward_mse"
    assert QProbe.from_pretrained(probe).k == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3.\n"))
    assert call("answer", "--probe", probe, "-", "--n", "4", "--beta", "0", "--show-candidates") == 0
    assert capsys.readouterr().err.count("probability") == 4


def test_importing_twice_does_nothing_twice_and_another_file_is_refused(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*lines: Any) -> int:
        return call("import", write("mine.jsonl", *lines), "--run", "runs/mine", WORK)

    assert imported(*candidates()) == 0
    before = contents("runs/mine")
    assert imported(*candidates()) == 0
    assert contents("runs/mine") == before
    capsys.readouterr()
    flipped = [line | {"reward": 1 - line["reward"]} for line in candidates()]
    others = candidates()
    others[1] = others[1] | {"completion": "another"}
    for lines, words in [
        (candidates([2, 2, 2]), "2 of 5 prompts"),
        (others, "'1 and 0' of prompts-00002"),
        (flipped, "another reward, such as one of prompts-00001"),
    ]:
        assert imported(*lines) == 1
        assert words in capsys.readouterr().err
    assert contents("runs/mine") == before


def test_rewards_that_a_loss_cannot_read_are_said_before_any_work(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("mine.jsonl", *candidates(add=3))
    assert call("import", path, "--run", "runs/mine") == 1
    losses = "evaluation.losses=[auto,reward_mse,policy_gradient]"
    assert losses in capsys.readouterr().err
    assert not Path("runs").exists()
    assert call("import", path, "--run", "runs/mine", losses, WORK) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["run", "none.jsonl", "--reward", "own_reward.py:reward"], 1, "none.jsonl"),
        (["run", "prompts.jsonl", "--reward", "own_reward.py:gone"], 1, "gone"),
        ([*RUN, "prompts=talk"], 1, "prompts is 'talk'"),
        ([*RUN, "samplr.n=2"], 2, "did you mean sampler.n?"),
        ([*RUN, "+speed=2"], 1, "speed"),
        ([*RUN, "evaluation.k=4"], 1, "n=3"),
        (
            [*RUN, "embedder.question=Right?", "evaluation.losses=[reward_mse]", "evaluation.controls=[]"],
            1,
            "embedder.question",
        ),
        ([*RUN, "evaluation.folds=7"], 1, "7 folds"),
        (["import", "mine.jsonl", "--run", "runs/mine"], 1, "mine.jsonl, line 2"),
        (["import", "good.jsonl", "--run", "runs/mine", "evaluation.k=3"], 1, "lower k"),
        (["answer", "--probe", "nowhere", "x"], 1, "nowhere"),
        (["answer", "--probe", "nowhere", " "], 1, "empty"),
    ],
)
def test_what_cannot_be_is_a_line_before_any_work(
    arguments: list[str], status: int, word: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    write("good.jsonl", *candidates())
    Path("mine.jsonl").write_text("\n{")
    assert call(*arguments) == status
    said = capsys.readouterr()
    assert said.err.startswith("qprobe: ")
    assert word in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not Path("runs").exists()


def test_a_reward_that_fails_stops_the_run_and_once_corrected_it_goes_on(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", "prompts.jsonl", "--reward", "own_reward.py:wrong", WORK)
    assert call(*arguments) == 1
    assert "prompts-00004 (line 4)" in capsys.readouterr().err
    Path("own_reward.py").write_text(REWARD.replace('2 if "3"', '2 if "0"'))
    kept = contents("runs/prompts/completions")
    assert len(rows("runs/prompts/completions/prompts.sample", store.COMPLETIONS)) == 18
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:wrong", WORK, "--run", "runs/first") == 1
    first = contents("runs/first/completions")
    Path("own_reward.py").write_text(REWARD.replace("return 2 if", "return 0 if"))
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:wrong", WORK, "--run", "runs/first") == 0
    assert contents("runs/first/completions") == first
    assert contents("runs/prompts/completions") == kept


def test_a_probe_answers_with_its_own_model_only(
    call: Call, make_model: Callable[..., ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("import", write("mine.jsonl", *candidates()), "--run", "runs/mine", WORK) == 0
    other = make_model(seed=1).name
    assert call("answer", "--probe", "runs/mine/probes/prompts/reward_mse", "x", f"model.name={other}") == 1
    said = capsys.readouterr()
    assert "layer 2" in said.err
    assert said.out == "run:      runs/mine\n"


def test_the_standard_input_and_packed_files_are_read(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    text = "\n".join(map(json.dumps, candidates())).encode()
    Path("mine.jsonl.gz").write_bytes(gzip.compress(text))
    assert call("import", "mine.jsonl.gz", "--run", "runs/packed", "stages=[sample,reward]") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert call("import", "-", "--run", "runs/piped", "stages=[sample,reward]") == 0
    table = "completions/prompts.sample"
    packed, piped = (rows(f"runs/{name}/{table}", store.COMPLETIONS) for name in ("packed", "piped"))
    assert [row["completion"] for row in packed] == [row["completion"] for row in piped]
    prompts = "\n".join(json.dumps({"prompt": f"Say {n}.", "number": n}) for n in range(6)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompts)))
    assert call("run", "-", *RUN[2:], "stages=[sample]") == 0
    assert Path("runs/stdin/completions").is_dir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    assert call("import", "-", "--run", "runs/piped") == 1


def test_one_prompt_cannot_be_cross_validated(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    write("one.jsonl", {"prompt": "Say 1.", "number": 1})
    assert call("run", "one.jsonl", *RUN[2:]) == 1
    said = capsys.readouterr().err
    assert "cross-validation needs two" in said
    assert "evaluation.folds=2" not in said


def test_run_and_answer_with_completions_from_an_api(
    call: Call, server: Any, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    words = ("sampler=openai", "sampler.api.model=tiny", f"sampler.api.base_url={server.url}", WORK)
    assert call(*RUN, "--run", "own", *words) == 0
    # A plain prompt is a message to an API, whatever the local model was made for.
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    said = [message for _, _, body in server.requests for message in body["messages"]]
    assert {(m["role"], m["content"]) for m in said} == {("user", f"Say {n}.") for n in range(6)}
    server.requests.clear()
    capsys.readouterr()
    assert call("answer", "Say 7.", "--probe", "own/probes/prompts/policy_gradient", "--seed", "3") == 0
    answer = capsys.readouterr().out.rstrip("\n")
    (body,) = [body for _, _, body in server.requests]
    assert body["messages"] == [{"role": "user", "content": "Say 7."}]
    assert body["n"] == 3
    drawn = [choice["message"]["content"] for choice in server.answer("/v1/chat/completions", body)["choices"]]
    assert answer in [text.rstrip("\n") for text in drawn]
    assert not [path for path in Path("own").rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_a_server_that_is_away_is_one_line(call: Call, server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sampler=openai", "sampler.api.model=tiny", "sampler.api.base_url=http://127.0.0.1:9/v1")
    assert call(*RUN, *words, "sampler.api.retries=1", "stages=[sample]") == 1
    assert "qprobe: The API at http://127.0.0.1:9/v1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_run_on_ray_makes_the_tables_of_the_local_runner(six_cpus: Any, call: Call) -> None:
    for name in ("local", "ray"):
        assert call(*RUN, "--run", name, "sampler.batch_rows=6", f"runner={name}") == 0
    parts = sorted(path.relative_to("local") for path in Path("local").rglob("part-*"))
    assert len(parts) >= 10
    assert parts == sorted(path.relative_to("ray") for path in Path("ray").rglob("part-*"))
    # The likelihood columns are made of the batches that the rows were drawn in, which are others on Ray: their last bits differ.
    drawn = [
        [
            (row["task_id"], row["sample"], row["completion"])
            for row in rows(f"{run}/completions/prompts.sample", store.COMPLETIONS)
        ]
        for run in ("local", "ray")
    ]
    assert drawn[0] == drawn[1]
    rewarded = [rows(f"{run}/rewards/prompts.sample/own_reward.reward", store.REWARDS) for run in ("local", "ray")]
    assert [row["reward"] for row in rewarded[0]] == [row["reward"] for row in rewarded[1]]
    assert {path.name for path in Path("local/tables").iterdir()} == {
        path.name for path in Path("ray/tables").iterdir()
    }
    cells = [
        [cell for line in csv.reader(Path(f"{run}/tables/prompts.csv").read_text().splitlines()) for cell in line]
        for run in ("local", "ray")
    ]
    assert len(cells[0]) == len(cells[1]) > 300
    for local, by_ray in zip(*cells, strict=True):
        assert local == by_ray or float(local) == pytest.approx(float(by_ray), abs=1e-4)
