"""A probe to the hub and back, by the hub's own client against a stand-in of its HTTP; and what its card says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import TOKEN, Hub

from qprobe.cli import main
from qprobe.models.language_model import ModelSpec
from qprobe.probe.calibration import Calibration
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.probe.hub import OnHub
from qprobe.report.results import Results

ROWS = np.random.default_rng(0).normal(size=(80, 5)).astype("float32")
PROBE = "runs/short/probes/prompts/reward_mse"
# The client reads its settings when it is imported, so it runs in a process of its own.
SCRIPT = """
import os, sys
import numpy as np
from qprobe import QProbe
from qprobe.cli import main
export = ["export", sys.argv[1], "--to", "hub", "user/probe", "--private"]
token = os.environ["HF_TOKEN"]
os.environ["HF_TOKEN"] = "hf_another"
print(main.main(export))
os.environ["HF_TOKEN"] = token
print(main.main(export))
probe = QProbe.from_pretrained("user/probe")
np.save("scores.npy", probe.score(np.load("rows.npy")))
print(probe.beta_, probe.use["prompts"], probe.calibration_ and probe.calibration_.intercept)
try:
    QProbe.from_pretrained("user/none")
except FileNotFoundError as error:
    print(error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    started = Hub()
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run: a probe of the last layer of a tiny model, its completions and its results."""
    folder = tmp_path_factory.mktemp("short")
    lines = [
        {"prompt": f"Say {p}.", "completion": f"{p} and {s}", "reward": (p + s) % 3 / 2}
        for p in range(6)
        for s in range(3)
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["model=hub", f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu", "prompts=chat"]
    words += ["embedder.layers=[-1]", "evaluation.losses=[reward_mse]", "evaluation.seeds=1", "evaluation.folds=2"]
    words += ["evaluation.bootstrap=100", "probe.steps=5", "stages=[sample,reward,embed,baselines,train,evaluate]"]
    assert main.main(["import", str(folder / "mine.jsonl"), "--run", str(folder / "runs/short"), *words]) == 0
    return folder


def test_a_probe_of_a_run_goes_to_the_hub_with_its_table_and_comes_back(hub: Hub, folder: Path) -> None:
    made = QProbe.from_pretrained(folder / PROBE)
    made.calibration_ = Calibration(np.zeros(made.dimension), 0.0, 0.25, 1.0, 2.0)
    made.save_pretrained(folder / PROBE)
    rows = np.random.default_rng(0).normal(size=(9, made.dimension)).astype("float32")
    np.save(folder / "rows.npy", rows)
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    others = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, PROBE], cwd=folder, env=others | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, commit, pushed, card, unknown = done.stdout.strip().splitlines()
    assert (refused, pushed, card) == ("1", "0", f"{made.beta_} chat 0.25")
    assert "hf auth login" in done.stderr
    assert not [words for words in ("Traceback", TOKEN, "hf_another") if words in done.stderr]
    assert commit == f"{hub.url}/user/probe/commit/{hub.commit('user/probe')}"
    assert "user/none" in unknown
    assert np.array_equal(np.load(folder / "scores.npy"), made.score(rows))

    files = hub.repositories["user/probe"]
    assert hub.private == {"user/probe"}
    assert set(files) >= {"README.md", "probe.json", "network.json", "network.safetensors"}
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl"))]
    model = made.use["model"]["name"]  # a folder of this machine
    assert not [path for path, content in files.items() if TOKEN.encode() in content or model.encode() in content]
    assert json.loads(files["probe.json"])["use"]["model"]["name"] == Path(model).name
    text = files["README.md"].decode()
    assert "| trained on | 18 completions of 6 prompts |" in text
    for row in Results.read(folder / "runs/short/results/prompts.json").rows:
        if row.value is not None:
            assert f"{row.value:.3f}" in text
            assert f"[{row.low:.3f}, {row.high:.3f}]" in text


def test_the_classifier_of_a_runs_probe_says_how_it_is_loaded_and_what_joined_text_changes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(folder / PROBE), "--to", "sequence-classification"]
    assert main.main([*words, str(tmp_path / "classifier"), "model.dtype=float32"]) == 0
    said = capsys.readouterr()
    assert "of 18 rows of the run" in said.err
    bias = json.loads((tmp_path / "classifier/config.json").read_text())["qprobe"]["bias"]
    assert f"Q = logit {bias:+.6g}" in said.out
    assert f"from_pretrained('{tmp_path}/classifier')" in said.out
    assert main.main([*words, str(tmp_path / "classifier")]) == 1
    assert "another folder" in capsys.readouterr().err


def card_of(made: QProbe, trained_on: str = "", table: str = "") -> tuple[dict[str, object], str]:
    """The metadata and the text of a card, read by another reader than the one that wrote it."""
    text = str(OnHub(made).generate_model_card(name="user/probe", trained_on=trained_on, table=table))
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_says_what_a_reader_asks() -> None:
    made = QProbe(loss="reward_mse", k=7).fit(ROWS, ROWS[:, 0], np.arange(80) // 8)
    made.source = EmbeddingSource({"name": "org/model", "revision": "abc123", "content": None}, 4, template="f00d")
    made.use = {"sampler": {"n": 7}}
    head, body = card_of(made, table="### Numbers\n\n| method | reward |")
    assert (head["library_name"], head["base_model"]) == ("qprobe", "org/model")
    for words in (
        "`org/model`",
        "`abc123`",
        "layer 4, at the last token",
        "`f00d`",
        "`reward_mse`",
        "linear, 5 weights",
    ):
        assert words in body
    for words in (
        "80 completions of 10 prompts",
        f"{made.beta_:g} |",
        "qprobe answer --probe user/probe",
        "## Results\n\n###",
    ):
        assert words in body
    # A model that lies here is known by its content; where it lies is nobody's business.
    model = {"name": "/home/me/models/mine", "revision": None, "content": "0123456789abcdef"}
    made.source, made.use, made.data_ = EmbeddingSource(model, 4, blocks=(4, 9, -1)), {}, {}
    head, body = card_of(made, trained_on="3 completions of 1 prompts")
    assert "base_model" not in head
    for words in (
        "`mine`",
        "0123456789abcdef",
        "layer 4, layer 9, likelihood columns beside each other",
        "| 3 completions",
    ):
        assert words in body
    assert not [words for words in ("/home", "qprobe answer", "## Results") if words in body]


def test_nothing_of_this_machines_folders_goes_to_the_hub(tmp_path: Path) -> None:
    """Features of the user's own, and an adapter: where they lie is nobody's business; new completions have no such features."""
    made = QProbe(loss="reward_mse", k=7).fit(ROWS, ROWS[:, 0], np.arange(80) // 8)
    made.source = EmbeddingSource({"name": "given", "features": ["0123"]}, 0, token="none", blocks=(0, 1))
    files = ["/home/me/data/one.npy", "/home/me/data/two.npy"]
    model = {"name": "org/model", "adapter": "/home/me/adapters/mine"}
    made.use = {"sampler": {"n": 7}, "model": model, "embedder": {"backend": "given", "files": files}}
    OnHub(made)._save_pretrained(tmp_path)
    assert "/home/me" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    use = QProbe.from_pretrained(tmp_path).use
    assert (use["embedder"]["files"], use["model"]) == (
        ["one.npy", "two.npy"],
        {"name": "org/model", "adapter": "mine"},
    )
    assert made.use["embedder"]["files"] == files
    assert "qprobe answer" not in card_of(made)[1]
