"""A user's own work by the command `qprobe`: run, import and answer on a tiny model, and a sentence where it cannot be."""

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
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:reward", "--run", "runs/mine") == 0
    said = capsys.readouterr()
    assert "6 prompts, put to the model as messages of a user (prompts=chat)." in said.err
    assert "6 prompts x 3 samples" in said.out
    assert "2-fold cross-validation over prompts" in said.out
    assert "greedy" in said.out
    probe = "runs/mine/probes/prompts/policy_gradient"
    assert f'Next:     qprobe answer --probe {probe} "your prompt"' in said.out.splitlines()[-1]
    assert sorted(path.name for path in Path(probe).parent.iterdir() if path.is_dir()) == [
        "policy_gradient",
        "reward_cross_entropy",
        "reward_mse",
    ]
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
    assert [line.removeprefix("    | ") for line in shown.splitlines()][
        : len(said.out.splitlines())
    ] == said.out.splitlines()
    assert call("answer", "--probe", probe, "Say 7.", "--seed", "1") == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert again.err == ""


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


def test_the_same_command_does_nothing_twice(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "prompts.jsonl", "--reward", "own_reward:reward", WORK)
    assert call(*arguments) == 0
    before = contents("runs/prompts")  # the run folder is named after the file
    assert call(*arguments) == 0
    assert contents("runs/prompts") == before
    # Prompts, completions and rewards of two pools, features; a sweep, three probes, and the candidates with their scores.
    assert len(before) == 6 + 5


def test_a_changed_reward_is_refused_and_only_its_table_need_go(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "prompts.jsonl", "--reward", "own_reward.py:reward", "sampler.greedy=false", WORK)
    assert call(*arguments) == 0
    kept = contents("runs/prompts/completions") | contents("runs/prompts/features")
    Path("own_reward.py").write_text(REWARD.replace("% 3 / 2", "% 2"))
    capsys.readouterr()
    assert call(*arguments) == 1
    table = Path("runs/prompts/rewards/prompts.sample/own_reward.reward")
    assert f"{table} was made from other inputs (the file of the reward function changed)" in capsys.readouterr().err
    for path in table.iterdir():
        path.unlink()
    assert call(*arguments) == 0
    assert contents("runs/prompts/completions") | contents("runs/prompts/features") == kept
    assert {row["reward"] for row in rows(str(table), store.REWARDS)} <= {0.0, 1.0}


def test_with_test_prompts_the_probes_train_on_the_others(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        call("run", "prompts.jsonl", "--test", "test.jsonl", "--reward", "own_reward.py:whole", "--batched", WORK) == 0
    )
    assert capsys.readouterr().out.startswith("run:")
    assert len(rows("runs/prompts/completions/test.sample", store.COMPLETIONS)) == 9
    assert (
        json.loads(Path("runs/prompts/results/test.json").read_text())["protocol"] == "trained on prompts, tested here"
    )
    assert Path("runs/prompts/probes/prompts/policy_gradient/probe.json").exists()
    baselines = "baselines.names=[few_shot,prompt_rm]", "baselines.few_shot.shots=1"
    words = ["--test", "test.jsonl", "--reward", "own_reward.py:whole", "--batched", WORK, *baselines]
    assert call("run", "prompts.jsonl", *words) == 0
    found = {
        row["method"]: row["value"] for row in json.loads(Path("runs/prompts/results/test.json").read_text())["rows"]
    }
    assert None not in (found["few-shot (1 success)"], found["Prompt RM"])
    write("test.jsonl", {"prompt": "Say 3.", "number": 1})
    assert (
        call("run", "prompts.jsonl", "--test", "test.jsonl", "--reward", "own_reward.py:reward", "--run", "other") == 1
    )
    assert "Line 1 of the test prompts is line 4 of the training prompts" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "start"), [("prompts=text", "Say 0."), ("prompts=chat", "<|bos|><|user|>Say 0.")])
def test_a_plain_prompt_is_put_as_asked_for(setting: str, start: str, call: Call) -> None:
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:reward", setting, "stages=[sample]") == 0
    assert rows("runs/prompts/prompts/prompts", store.PROMPTS)[0]["prompt"].startswith(start)


def test_a_model_without_a_chat_template_continues_the_text(
    call: Call, make_model: Callable[..., ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"model.name={make_model(chat_template=None).name}"
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:reward", name, "stages=[sample]") == 0
    assert "put to the model as text to be continued (prompts=text)" in capsys.readouterr().err
    assert rows("runs/prompts/prompts/prompts", store.PROMPTS)[0]["prompt"] == "Say 0."


def test_candidates_of_unequal_groups_are_imported_and_answered_from(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("mine.jsonl", *candidates())
    assert call("import", path, "--run", "runs/mine") == 0
    said = capsys.readouterr()
    assert "5 prompts with 2 to 5 candidates each, 16 in all" in said.err
    assert "1 of 6 prompts have a single candidate (the first: line 4)" in said.err
    assert "5 prompts, 16 samples (at most 5 of a prompt)" in said.out
    assert "k = 2" in said.out  # as many as the smallest group has
    assert "skyline pass@2" in said.out
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
    said = capsys.readouterr()
    assert "Nothing that was begun is missing." in said.out
    assert "16 imported" in said.out
    assert any(line.endswith("prompts with good and bad completions") for line in said.out.splitlines())
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
    for lines, sentence in [
        (candidates([2, 2, 2]), "2 of 5 prompts are no longer there, such as"),
        (others, "1 candidates are no longer there, such as '1 and 0' of prompts-00002"),
        (flipped, "candidates have another reward, such as one of prompts-00001: it was"),
    ]:
        assert imported(*lines) == 1
        assert sentence in capsys.readouterr().err
    assert contents("runs/mine") == before


def test_rewards_that_a_loss_cannot_read_are_said_before_any_work(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("mine.jsonl", *candidates(add=3))
    assert call("import", path, "--run", "runs/mine") == 1
    assert (
        "The rewards lie in [3, 4], but reward_cross_entropy reads rewards in [0, 1]: scale them, or set "
        "evaluation.losses=[reward_mse,policy_gradient]" in capsys.readouterr().err
    )
    assert not Path("runs").exists()
    assert call("import", path, "--run", "runs/mine", "evaluation.losses=[reward_mse,policy_gradient]", WORK) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "none.jsonl", "--reward", "own_reward.py:reward"], "There is no file none.jsonl"),
        (
            ["run", "prompts.jsonl", "--reward", "own_reward.py:gone"],
            "has no function gone: it has reward, whole, wrong",
        ),
        (
            ["run", "prompts.jsonl", "--reward", "own_reward.py:reward", "prompts=talk"],
            "prompts is 'talk': choose chat",
        ),
        (["run", "prompts.jsonl", "--reward", "own_reward.py:reward", "samplr.n=2"], "did you mean sampler.n?"),
        (
            ["run", "prompts.jsonl", "--reward", "own_reward.py:reward", "+speed=2"],
            "the configuration has no key speed",
        ),
        (["run", "prompts.jsonl", "--reward", "own_reward.py:reward", "evaluation.k=4"], "but only n=3 completions"),
        (
            ["run", "prompts.jsonl", "--reward", "own_reward.py:reward", "evaluation.folds=7"],
            "6 prompts cannot make 7 folds",
        ),
        (["import", "mine.jsonl", "--run", "runs/mine"], "mine.jsonl, line 2: this is no JSON"),
        (
            ["import", "good.jsonl", "--run", "runs/mine", "evaluation.k=3"],
            "a prompt of prompts has 2 candidates: lower k",
        ),
        (["answer", "--probe", "nowhere", "x"], "Probe 'nowhere' is neither a folder here nor"),
        (["answer", "--probe", "nowhere", " "], "The prompt is empty"),
        (["inspect", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_what_cannot_be_is_a_sentence_before_any_work(
    arguments: list[str], sentence: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    write("good.jsonl", *candidates())
    Path("mine.jsonl").write_text("\n{")
    assert (main.main if arguments[0] == "inspect" else lambda words: call(*words))(arguments) == (
        2 if "samplr.n=2" in arguments else 1
    )
    said = capsys.readouterr()
    assert said.err.startswith("qprobe: ")
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not Path("runs").exists()


def test_a_reward_outside_its_range_stops_the_run_and_the_completions_stay(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "prompts.jsonl", "--reward", "own_reward.py:wrong", WORK) == 1
    assert "own_reward.py:wrong gave 2 for completion 0 of prompt prompts-00004 (line 4)" in capsys.readouterr().err
    assert len(rows("runs/prompts/completions/prompts.sample", store.COMPLETIONS)) == 18


def test_a_reward_that_failed_at_once_is_corrected_and_goes_on(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "prompts.jsonl", "--reward", "own_reward.py:wrong", WORK)
    Path("own_reward.py").write_text(REWARD.replace('2 if "3"', '2 if "0"'))
    assert call(*arguments) == 1
    completions = contents("runs/prompts/completions")
    Path("own_reward.py").write_text(REWARD.replace("return 2 if", "return 0 if"))
    assert call(*arguments) == 0
    assert contents("runs/prompts/completions") == completions


def test_a_probe_answers_with_its_own_model_only(
    call: Call, make_model: Callable[..., ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("import", write("mine.jsonl", *candidates()), "--run", "runs/mine", WORK) == 0
    other = make_model(seed=1).name
    assert call("answer", "--probe", "runs/mine/probes/prompts/reward_mse", "x", f"model.name={other}") == 1
    said = capsys.readouterr()
    assert "This probe reads layer 2 of" in said.err
    assert said.out == "run:      runs/mine\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "prompts.jsonl"],
        ["import", "mine.jsonl"],
        ["answer", "x"],
        ["run", "prompts.jsonl", "--reward", "a:b", "more"],
        ["run", "prompts.jsonl", "--reward", "a:b", "--rum", "x=1"],
        ["inspect", "runs", "a=1"],
    ],
)
def test_an_unknown_argument_prints_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: qprobe")


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
    assert call("run", "-", "--reward", "own_reward.py:reward", "stages=[sample]") == 0
    assert Path("runs/stdin/completions").is_dir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    assert call("import", "-", "--run", "runs/piped") == 1


def test_one_prompt_cannot_be_cross_validated(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    write("one.jsonl", {"prompt": "Say 1.", "number": 1})
    assert call("run", "one.jsonl", "--reward", "own_reward.py:reward") == 1
    said = capsys.readouterr().err
    assert "1 prompt cannot make 2 folds: cross-validation needs two at least" in said
    assert "evaluation.folds=2" not in said
