"""A user's own work on Ray: `qprobe run` with one word more makes the same tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qprobe.cli import main
from qprobe.models.language_model import ModelSpec


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_run_on_ray_makes_the_tables_of_the_local_runner(
    six_cpus: Any, tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(6)))
    Path("lengths.py").write_text("def reward(prompt, completion):\n    return len(completion) % 3 / 2\n")
    words = ["model=hub", f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu", "sampler.n=3"]
    words += ["sampler.max_new_tokens=6", "sampler.batch_rows=6", "embedder.layers=[2]", "probe.steps=5"]
    words += ["evaluation.seeds=2", "evaluation.folds=2", "evaluation.bootstrap=100", "evaluation.draws=5"]
    for name, runner in (("local", "local"), ("cluster", "ray")):
        command = ["run", "prompts.jsonl", "--reward", "lengths.py:reward", "--run", name, *words, f"runner={runner}"]
        assert main.main(command) == 0
    parts = sorted(path.relative_to("local") for path in Path("local").rglob("part-*"))
    assert len(parts) >= 10
    assert parts == sorted(path.relative_to("cluster") for path in Path("cluster").rglob("part-*"))
    for table in Path("local/tables").iterdir():
        assert Path("cluster/tables", table.name).read_bytes() == table.read_bytes()
