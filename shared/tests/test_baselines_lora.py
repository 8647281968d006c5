"""Adapters are trained as written: losses by hand, toy tasks, a killed training goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from qprobe import models
from qprobe.baselines import objectives
from qprobe.baselines.finetune_rm import RewardModel, train_reward_model
from qprobe.baselines.lora import Training
from qprobe.baselines.objectives import Example
from qprobe.baselines.settings import LoRASettings
from qprobe.baselines.sft import fine_tune
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood

pytest.importorskip("peft", reason="the extra `lora` is not installed")

Ids = Callable[..., list[list[int]]]
Logprobs = Callable[[ModelSpec, Sequence[int]], torch.Tensor]
QUICK = LoRASettings(rank=4, dropout=0.0, epochs=1, batch_rows=4, per_prompt=4, held_out=0.0)
EOS = 1


def rows_of(random_ids: Ids, count: int = 4) -> list[Example]:
    prompts = random_ids([3 + i % 4 for i in range(count)], seed=1)
    completions = random_ids([2 + i % 3 for i in range(count)], seed=2)
    return [Example(f"t{i}", p, c) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]


def test_the_loss_is_the_cross_entropy_of_completions_and_their_ends(
    tiny_model: ModelSpec, random_ids: Ids, stock_logprobs: Logprobs, tmp_path: Path
) -> None:
    """Before the first step the adapter adds nothing, so the loss of a single batch is the base model's."""
    rows = rows_of(random_ids)
    rows[2] = dataclasses.replace(rows[2], ended=False)
    wanted, tokens = 0.0, 0
    for row in rows:
        taught = [*row.completion_ids, *([EOS] if row.ended else [])]
        scores = stock_logprobs(tiny_model, [*row.prompt_ids, *taught])
        wanted -= sum(float(scores[len(row.prompt_ids) + i - 1, token]) for i, token in enumerate(taught))
        tokens += len(taught)
    trained = fine_tune(tiny_model, rows, QUICK, tmp_path / "adapter", progress=False)
    assert trained.train_loss == pytest.approx([wanted / tokens], abs=1e-5)


def test_the_loss_of_a_reward_model_begins_at_the_mean_of_the_rewards(
    tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path
) -> None:
    rows = [dataclasses.replace(row, target=y) for row, y in zip(rows_of(random_ids), (1, 0.5, 0, 0), strict=True)]
    trained = train_reward_model(tiny_model, rows, QUICK, tmp_path / "rm", progress=False)
    mean = 0.375
    assert trained.train_loss == pytest.approx([-mean * math.log(mean) - (1 - mean) * math.log(1 - mean)], abs=1e-6)


def test_what_was_trained_on_becomes_likelier_than_what_was_not(
    tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path
) -> None:
    prompts = random_ids([4] * 8, seed=3)
    taught, other = random_ids([3, 3], seed=4)
    rows = [Example(str(i), prompt, taught) for i, prompt in enumerate(prompts[:6])]
    settings = dataclasses.replace(QUICK, epochs=15, learning_rate=1e-2)
    trained = fine_tune(tiny_model, rows, settings, tmp_path / "adapter", progress=False)
    assert trained.train_loss[-1] < 0.3 * trained.train_loss[0]
    completions = [[taught, other]] * 2
    before = Likelihood(tiny_model).log_likelihood(prompts[6:], completions)
    adapted = dataclasses.replace(tiny_model, adapter=str(trained.folder))
    after = Likelihood(adapted).log_likelihood(prompts[6:], completions)
    for (taught_before, other_before), (taught_after, other_after) in zip(before, after, strict=True):
        assert taught_after - taught_before > 3 > other_after - other_before


def test_a_reward_model_tells_unseen_completions_apart(tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path) -> None:
    """Good is what ends with token 50. Its scores are those of the network that was trained, padded or not."""
    bodies = random_ids([2 + i % 5 for i in range(60)], seed=5)
    prompts = random_ids([3 + i % 3 for i in range(60)], seed=6)
    good = [i % 2 == 0 for i in range(60)]
    rows = [Example(str(i), prompts[i], [*bodies[i], 50 if good[i] else 60], target=float(good[i])) for i in range(60)]
    settings = dataclasses.replace(QUICK, epochs=15, learning_rate=5e-3, batch_rows=8)
    trained = train_reward_model(tiny_model, rows[:40], settings, tmp_path / "rm", progress=False)
    found = RewardModel(tiny_model, trained.folder).score(
        [row.prompt_ids for row in rows[40:]], [[row.completion_ids, []] for row in rows[40:]]
    )
    assert all(len(scores) == 2 for scores in found)  # an empty one is judged too
    scores = [of_prompt[0] for of_prompt in found]
    assert roc_auc_score([row.target for row in rows[40:]], scores) > 0.9


def test_the_logit_is_that_of_the_last_token_whatever_the_padding(
    tiny_model: ModelSpec, random_ids: Ids, stock_states: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    rows = rows_of(random_ids, 3)
    language_model = models.load.__wrapped__(tiny_model)
    judgement = objectives.Judgement()
    targets = [dataclasses.replace(row, target=i / 2) for i, row in enumerate(rows)]
    head = judgement.prepare(language_model, targets)
    torch.nn.init.normal_(head.weight)  # type: ignore[arg-type]
    adapted = get_peft_model(language_model.model, LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        together = judgement.logits(adapted, rows)
        weight, bias = judgement.head.weight[0], float(judgement.head.bias)
        for row, found in zip(rows, together, strict=True):
            last = stock_states(tiny_model, row.ids)[-1][-1]
            assert float(found) == pytest.approx(float(last @ weight) + bias, abs=1e-4)
            assert float(found) == pytest.approx(float(judgement.logits(adapted, [row])[0]), abs=1e-5)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {f"{file.name}:{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_killed_training_goes_on_to_the_same_weights(
    tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, drawn rows, the optimizer's moments and held-out prompts are all in play."""
    rows = [dataclasses.replace(row, target=i % 2) for i, row in enumerate(rows_of(random_ids, 60))]
    rows = [dataclasses.replace(row, prompt=f"t{i % 30}") for i, row in enumerate(rows)]
    settings = LoRASettings(rank=2, dropout=0.2, epochs=3, batch_rows=8, per_prompt=1, held_out=0.2, learning_rate=3e-3)
    straight = train_reward_model(tiny_model, rows, settings, tmp_path / "straight", seed=4, progress=False)
    assert len(straight.held_out_loss) == len(straight.train_loss) >= 2
    assert straight.kept_epoch == 1 + straight.held_out_loss.index(min(straight.held_out_loss))

    made, step = 0, Training._step

    def killed(self: Any, *arguments: Any) -> float:
        nonlocal made
        made += 1
        if made == 5:  # in the second epoch: 24 prompts in batches of 8
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(tiny_model, rows, settings, tmp_path / "killed", seed=4, progress=False)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(Training, "_step", step)
    torch.rand(3)  # the process's own random numbers play no part
    again = train_reward_model(tiny_model, rows, settings, tmp_path / "killed", seed=4, progress=False)
    assert dataclasses.replace(again, folder=straight.folder) == straight
    one, two = _weights(straight.folder), _weights(again.folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.glob(".*"))  # nothing of the work is left


def test_a_finished_adapter_is_found_again_and_never_mistaken(
    tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(random_ids)
    trained = fine_tune(tiny_model, rows, QUICK, tmp_path / "adapter", progress=False)
    monkeypatch.setattr(models.load, "__wrapped__", lambda spec: pytest.fail("trained again"))
    assert fine_tune(tiny_model, rows, QUICK, tmp_path / "adapter", progress=False) == trained
    with pytest.raises(ValueError, match="other completions"):
        fine_tune(tiny_model, rows[:3], QUICK, tmp_path / "adapter", progress=False)


def test_easy_prompts_are_capped_and_drawn_anew(tiny_model: ModelSpec, tmp_path: Path) -> None:
    rows = [Example("easy", [9], [i]) for i in range(20, 40)] + [Example("hard", [8], [50])]
    settings = dataclasses.replace(QUICK, per_prompt=3)
    training = Training(tiny_model, rows, settings, tmp_path / "x")
    epochs = [training._of_epoch(rows, epoch) for epoch in (1, 2, 1)]
    assert [sum(row.prompt == "easy" for row in epoch) for epoch in epochs] == [3, 3, 3]
    assert all(sum(row.prompt == "hard" for row in epoch) == 1 for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_what_is_left_out_is_counted(tiny_model: ModelSpec, random_ids: Ids, tmp_path: Path) -> None:
    rows = [*rows_of(random_ids), Example("e", [5], []), Example("l", [5] * 30, [6] * 10)]
    settings = dataclasses.replace(QUICK, max_tokens=40)
    trained = fine_tune(tiny_model, rows, settings, tmp_path / "adapter", progress=False)
    assert (trained.rows, trained.prompts, trained.empty, trained.too_long) == (4, 4, 1, 1)
    said = json.loads((tmp_path / "adapter" / "base.json").read_text())
    assert said["trained"]["too_long"] == 1
    assert said["base"] == tiny_model.identity()


@pytest.mark.parametrize(("targets", "word"), [((), "missing"), ((0.0, 0.0), "all 0"), ((0.0, 2.0), "2.0")])
def test_rewards_that_nothing_can_be_trained_on(
    tiny_model: ModelSpec, tmp_path: Path, targets: Sequence[float], word: str
) -> None:
    rows = [Example(str(i), [5], [6], target=target) for i, target in enumerate(targets)]
    with pytest.raises(ValueError, match=word):
        train_reward_model(tiny_model, rows, QUICK, tmp_path / "rm", progress=False)


@pytest.mark.parametrize(
    ("example", "changes", "word"),
    [
        (Example("a", [5], []), {}, "successes"),
        (Example("a", [5, 6], [7, 8]), {"max_tokens": 4}, "max_tokens"),
        (Example("a", [5, 6], [7, 8]), {"target_modules": ("nowhere",)}, "target_modules"),
    ],
)
def test_what_cannot_be_trained(
    tiny_model: ModelSpec, tmp_path: Path, example: Example, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        fine_tune(tiny_model, [example], dataclasses.replace(QUICK, **changes), tmp_path / "x", progress=False)


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("held_out", -0.1)])
def test_settings_that_cannot_be_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        LoRASettings(**{key: value})  # type: ignore[arg-type]


def test_too_little_memory_halves_the_rows_at_once(
    tiny_model: ModelSpec,
    random_ids: Ids,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, fits = rows_of(random_ids, 8), 2
    settings = dataclasses.replace(QUICK, batch_rows=8)
    whole = fine_tune(tiny_model, rows, settings, tmp_path / "whole", progress=False)
    loss = objectives.Imitation.loss

    def short(self: Any, model: Any, part: Sequence[Example]) -> torch.Tensor:
        if len(part) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, model, part)

    monkeypatch.setattr(objectives.Imitation, "loss", short)
    halved = fine_tune(tiny_model, rows, settings, tmp_path / "halved", progress=False)
    assert "ran out of memory on cpu" in capsys.readouterr().out
    one, two = _weights(whole.folder), _weights(halved.folder)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    monkeypatch.undo()
    tight = dataclasses.replace(tiny_model, memory_gib=1e-3)  # the estimate cuts before anything fails
    cut = fine_tune(tight, rows, settings, tmp_path / "cut", progress=False)
    assert not capsys.readouterr().out
    three = _weights(cut.folder)
    assert all(torch.allclose(one[name], three[name], atol=1e-5) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    fits = 0
    monkeypatch.setattr(objectives.Imitation, "loss", short)
    with pytest.raises(RuntimeError, match="single row"):
        fine_tune(tiny_model, rows, settings, tmp_path / "none", progress=False)
