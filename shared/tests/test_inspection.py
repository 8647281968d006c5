"""What `qprobe inspect` says of a run folder: rows, pass rate, mixed prompts, what is missing; and of what is none."""

from pathlib import Path
from types import ModuleType

import pytest

from qprobe.cli import main
from qprobe.pipeline import inspection
from qprobe.pipeline.inspection import TableState
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool
from qprobe.store.table import StoreError


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    """10 prompts x 4 samples, in batches of 12 rows; sampled, rewarded and embedded at two layers."""
    pool = Pool(tmp_path / "run", fakes.split("numbers", 10), "sample", fakes.Sampler(), seed=0, batch_rows=12)
    stages.sample(pool, progress=False)
    rewarding.reward(pool, fakes.Reward(), progress=False)
    stages.embed(pool, fakes.Embedder((1, 2)), progress=False)
    return pool


def test_a_finished_run_folder(pool: Pool, fakes: ModuleType) -> None:
    joined = join(pool, fakes.Reward())
    passed = int(joined.rewards.sum())
    by_prompt = joined.rewards.reshape(10, 4)
    mixed = sum(0 < row.sum() < 4 for row in by_prompt)
    assert 0 < mixed < 10
    counts = [(40 - passed, "failed"), (passed, "passed")]  # the most frequent first, then by name
    counts = counts[::-1] if passed > 20 else counts
    remark = f"mean reward {passed / 40:.3f}; {mixed} of 10 prompts with good and bad completions; " + ", ".join(
        f"{count} {verdict}" for count, verdict in counts
    )
    states = inspection.inspect(pool.run)
    assert states == [
        TableState("prompts/numbers", 10, 10),
        TableState("completions/numbers.sample", 40, 40, "40 stop"),
        TableState("rewards/numbers.sample/passes", 40, 40, remark),
        TableState("features/numbers.sample/fake-numbers/layer=01", 40, 40),
        TableState("features/numbers.sample/fake-numbers/layer=02", 40, 40),
    ]
    text = inspection.to_text(states)
    assert text.splitlines()[-1] == "Nothing that was begun is missing."
    assert f"40 rows  {remark}" in text


def test_what_is_missing_is_said_for_every_table(pool: Pool, fakes: ModuleType) -> None:
    pool.completions.part(pool.batches[0]).unlink()
    for part in pool.features(fakes.Embedder(), 2).parts():
        part.unlink()
    for part in pool.rewards(fakes.Reward()).parts():
        part.unlink()
    states = {state.path: state for state in inspection.inspect(pool.run)}
    assert (states["completions/numbers.sample"].rows, states["completions/numbers.sample"].expected) == (28, 40)
    assert states["rewards/numbers.sample/passes"] == TableState("rewards/numbers.sample/passes", 0, 40)
    lines = inspection.to_text(list(states.values())).splitlines()
    assert any(line.startswith("completions/numbers.sample ") and "28 of 40 rows" in line for line in lines)
    assert lines[-1] == (
        "completions/numbers.sample is missing 12 of 40 rows; rewards/numbers.sample/passes is missing 40 of 40 rows; "
        "features/numbers.sample/fake-numbers/layer=02 is missing 40 of 40 rows: start the same command again."
    )


def test_a_greedy_pool_has_one_sample_a_prompt(pool: Pool, fakes: ModuleType) -> None:
    greedy = Pool(pool.run, pool.split, "greedy", fakes.Sampler(1, temperature=0.0), seed=0)
    stages.sample(greedy, progress=False)
    assert TableState("completions/numbers.greedy", 10, 10, "10 stop") in inspection.inspect(pool.run)


def test_a_sampler_that_does_not_name_its_number_of_samples_is_counted_all_the_same(
    pool: Pool, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = fakes.Sampler()
    monkeypatch.setattr(sampler, "identity", lambda: {"sampler": "an API"})
    other = Pool(pool.run, pool.split, "other", sampler, seed=0)
    stages.sample(other, progress=False)
    (state,) = (state for state in inspection.inspect(pool.run) if state.path == "completions/numbers.other")
    assert (state.rows, state.expected) == (40, None)
    assert "missing" not in inspection.to_text([state]).replace("is missing.", "")


@pytest.mark.parametrize("what", ["part", "manifest"])
def test_damage_is_named(what: str, pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    path = pool.completions.part(pool.batches[1]) if what == "part" else pool.completions.folder / "manifest.json"
    path.write_bytes(b"nothing of the kind")
    assert main.main(["inspect", str(pool.run)]) == 1
    said = capsys.readouterr()
    assert f"{path} cannot be read" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "prompts"),
        ("empty", "prompts"),
        ("file", "prompts"),
        ("begun", "sample"),
    ],
)
def test_what_is_no_run_folder_is_one_sentence_and_exit_1(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    elif kind != "absent":
        (folder / "prompts" if kind == "begun" else folder).mkdir(parents=True)
    with pytest.raises(StoreError, match=message) as caught:
        inspection.inspect(folder)
    assert main.main(["inspect", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err == f"qprobe: {caught.value}\n"
    assert said.out == ""


def test_the_command_prints_the_tables(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", str(pool.run)]) == 0
    assert capsys.readouterr().out == inspection.to_text(inspection.inspect(pool.run)) + "\n"


@pytest.mark.parametrize("arguments", [["inspect"], ["inspekt", "x"], ["inspect", "x", "y"]])
def test_an_unknown_command_prints_the_usage_and_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    assert stopped.value.code == 2
    assert "usage: qprobe" in capsys.readouterr().err
