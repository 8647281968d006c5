"""The estimator on plain arrays, its card, and what it refuses: other embeddings, unknown options, damaged cards."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qprobe import QProbe
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.training import BETAS, Data, ProbeTask, TrainingSettings, train

OPTIONS: dict[str, Any] = {"steps": 40, "learning_rate": 0.05, "held_out": 0.3, "minimum_mixed": 3}
SOURCE = EmbeddingSource({"name": "model-a", "content": "0f", "dtype": "float32"}, layer=18, template="t")


def rows(prompts: int = 30, samples: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feature 0 decides, within a prompt; prompts are named, and come in no order."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts * samples, 6)).astype(np.float32)
    names = rng.permutation([f"task {i}" for i in range(prompts) for _ in range(samples)])
    return features, (features[:, 0] > 0.3).astype(np.float32), names


def fitted(**changes: Any) -> QProbe:
    return QProbe(**{"loss": "policy_gradient", **OPTIONS} | changes).fit(*rows())


@pytest.mark.parametrize(
    "loss", ["policy_gradient", "reward_mse", "reward_cross_entropy", "bradley_terry", "centred_mse"]
)
def test_fit_returns_itself_and_ranks_new_completions(loss: str) -> None:
    probe = QProbe(loss=loss, **OPTIONS | {"steps": 100})
    assert probe.fit(*rows(80)) is probe
    features, rewards, names = rows(seed=1)
    scores = probe.score(features)
    assert scores.dtype == np.float32
    assert scores.shape == (150,)
    groups = np.unique(names, return_inverse=True)[1]
    assert np.nanmean(within_prompt_auc(scores, rewards, groups)) > 0.9
    assert probe.beta_ in BETAS
    assert probe.training_["chosen_on_held_out_prompts"]
    assert probe.dimension == 6


def test_fit_is_one_probe_of_train_on_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, rewards, names = rows()
    groups = torch.from_numpy(np.unique(names, return_inverse=True)[1])
    data = Data(torch.from_numpy(features), torch.from_numpy(rewards), groups)
    task = ProbeTask("reward_mse", 3, torch.ones(30, dtype=torch.bool))
    settings = TrainingSettings(**OPTIONS)
    (expected,) = train(data, [task], settings, k=4, seed=3)
    assert expected.chosen
    assert expected.steps > 0
    # What was held out to choose on comes back: as many steps on all of the prompts.
    whole = dataclasses.replace(settings, steps=expected.steps, held_out=0.0)
    (on_all,) = train(data, [task], whole, k=4, seed=3)
    asked: list[dict[str, Any]] = []

    def spy(*arguments: Any, **more: Any) -> Any:
        asked.append(more)
        return train(*arguments, **more)

    monkeypatch.setattr("qprobe.probe.estimator.train", spy)
    probe = QProbe("reward_mse", k=4, seed=3, **OPTIONS).fit(features, rewards, names)
    assert asked == [{"k": 4, "seed": 3}]
    assert torch.equal(probe.network_.weights[0], on_all.network.weights[0])
    assert not torch.equal(on_all.network.weights[0], expected.network.weights[0])
    assert (probe.beta_, probe.training_["steps"]) == (expected.beta, expected.steps)
    assert probe.data_ | {"fingerprint": ""} == {"rows": 150, "prompts": 30, "fingerprint": ""}


def test_arrays_of_every_kind_are_read_as_the_same_numbers() -> None:
    features, rewards, names = rows()
    features = features.astype(np.float16)
    expected = QProbe(**OPTIONS).fit(features, rewards, names).score(features)
    locked = features.astype(np.float32)
    locked.setflags(write=False)  # as Arrow, pandas and np.load(mmap_mode="r") give them
    kinds: list[Any] = [locked, np.asfortranarray(locked.astype(float)), features.tolist(), torch.from_numpy(features)]
    for kind in kinds:
        probe = QProbe(**OPTIONS).fit(kind, rewards.tolist(), names.tolist())
        np.testing.assert_array_equal(probe.score(kind), expected)
    numbers = torch.from_numpy(np.unique(names, return_inverse=True)[1])
    np.testing.assert_array_equal(
        QProbe(**OPTIONS).fit(locked, torch.from_numpy(rewards), numbers).score(locked), expected
    )


def test_a_temperature_of_the_users_own_is_kept() -> None:
    assert fitted(beta=0.0).beta_ == 0.0
    assert fitted(beta=0.7).beta_ == 0.7
    few = fitted(minimum_mixed=31)
    assert few.beta_ == TrainingSettings().beta
    assert few.training_ == {
        "steps": 40,
        "chosen_on_held_out_prompts": False,
        "held_out_mixed_prompts": 8,  # of nine
        "learning_rate": 0.05,
        "note": "",
    }


def test_the_learning_rate_is_chosen_and_recorded(tmp_path: Path) -> None:
    probe = fitted(learning_rates=(1e-7, 0.05))
    assert probe.training_["learning_rate"] == 0.05
    left = fitted(learning_rates=(1e-7, 0.05), learning_rate=0.02, minimum_mixed=31)
    assert left.training_["learning_rate"] == 0.02
    assert left.training_["note"].startswith("The learning rate was not chosen among 2")
    left.save_pretrained(tmp_path)
    again = QProbe.from_pretrained(tmp_path)
    assert again.settings == left.settings
    assert again.training_ == left.training_


def pairs(count: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(size=(2, count, 6))
    chosen[:, 0] = rejected[:, 0] + rng.uniform(0.5, 1.5, count)
    return chosen.astype(np.float32), rejected.astype(np.float32)


def test_pairs_are_learnt_and_equal_the_rewards_that_say_the_same() -> None:
    chosen, rejected = pairs()
    probe = QProbe("bradley_terry", **OPTIONS).fit_pairs(chosen, rejected)
    new_chosen, new_rejected = pairs(seed=1)
    assert np.mean(probe.score(new_chosen) > probe.score(new_rejected)) > 0.9
    assert probe.data_["rows"] == 80
    assert probe.data_["prompts"] == 40
    rewards = np.repeat([1.0, 0.0], 40)
    same = QProbe("bradley_terry", **OPTIONS).fit(
        np.concatenate([chosen, rejected]), rewards, np.tile(np.arange(40), 2)
    )
    np.testing.assert_array_equal(same.score(new_chosen), probe.score(new_chosen))


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    chosen, rejected = pairs()
    prompts = [f"prompt {i // 4}" for i in range(40)]
    probe = QProbe("bradley_terry", **OPTIONS).fit_pairs(chosen, rejected, prompts)
    assert probe.data_["prompts"] == 10
    assert probe.training_["held_out_mixed_prompts"] == 3  # 0.3 of ten prompts, not of forty pairs


def test_select_follows_the_policy() -> None:
    probe = fitted()
    candidates = rows(seed=1)[0][:6]
    scores = probe.score(candidates)
    assert probe.select(candidates, beta=0) == int(scores.argmax())
    assert probe.select(candidates, beta=0, generator=torch.Generator().manual_seed(0)) == int(scores.argmax())
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([probe.select(candidates, beta=2.0, generator=generator) for _ in range(2000)], minlength=6)
    law = np.exp(scores / 2.0) / np.exp(scores / 2.0).sum()
    np.testing.assert_allclose(drawn / 2000, law, atol=0.045)  # four standard errors of a half
    probe.beta_ = 0.5
    assert probe.select(candidates, beta=0) == int(scores.argmax())  # 0 is a temperature, not the absence of one
    probe.beta_ = 0.0
    assert probe.select(candidates) == int(scores.argmax())  # its own


def test_ties_are_the_first_without_a_generator_and_by_lot_with_one() -> None:
    probe = fitted()
    same = np.repeat(rows()[0][:1], 4, axis=0)
    assert probe.select(same, beta=0) == 0
    generator = torch.Generator().manual_seed(0)
    assert {probe.select(same, beta=0, generator=generator) for _ in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_saved_and_read_back_is_bit_for_bit_the_same(hidden: tuple[int, ...], tmp_path: Path) -> None:
    probe = fitted(hidden=hidden, seed=7, k=5)
    probe.source = SOURCE
    probe.use = {"prompts": "chat", "sampler": {"n": 5}}
    probe.save_pretrained(tmp_path / "probe")
    read = QProbe.from_pretrained(tmp_path / "probe")
    features = rows(seed=1)[0]
    np.testing.assert_array_equal(read.score(features), probe.score(features))
    for name in ("loss", "k", "seed", "settings", "beta_", "training_", "data_", "source", "use"):
        assert getattr(read, name) == getattr(probe, name), name
    assert {path.suffix for path in (tmp_path / "probe").iterdir()} == {".json", ".safetensors"}  # no pickle
    read.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "probe").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    source = json.loads((tmp_path / "probe" / "probe.json").read_text())["source"]
    expected = {"layer": 18, "token": "last", "template": "t", "blocks": [], "likelihood": {}}
    assert source == {"model": {"name": "model-a", "content": "0f"}, **expected}


def test_a_card_of_before_it_named_a_use_is_read(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    card = tmp_path / "probe.json"
    card.write_text(json.dumps({name: value for name, value in json.loads(card.read_text()).items() if name != "use"}))
    assert QProbe.from_pretrained(tmp_path).use == {}


def test_a_save_that_was_cut_off_is_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # New weights beside an old card would be another probe than either.
    fitted().save_pretrained(tmp_path)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qprobe.probe.estimator.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(seed=9).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds"):
        QProbe.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"layer": 17}, {"token": "first"}, {"template": "u"}, {"model": {"name": "model-b", "content": "0f"}}]
)
def test_embeddings_of_another_source_are_an_error(change: dict[str, Any]) -> None:
    probe = fitted()
    features = rows()[0]
    other = dataclasses.replace(SOURCE, **change)
    probe.score(features, other)  # a probe on plain arrays knows no source
    probe.source = SOURCE
    probe.score(features)
    probe.score(features, SOURCE)
    for call in (probe.score, lambda f, s: probe.select(f, 0, source=s)):
        with pytest.raises(ValueError, match="layer 18"):
            call(features, other)


def test_the_dtype_of_a_model_does_not_make_it_another_source() -> None:
    assert dataclasses.replace(SOURCE, model={"name": "model-a", "content": "0f", "dtype": "bfloat16"}) == SOURCE


def test_the_source_of_an_embedder_names_its_model() -> None:
    identity = {"embedder": "hf", "model": {"name": "m", "dtype": "bfloat16"}, "token": "last"}
    assert EmbeddingSource.of(identity, 3, "t") == EmbeddingSource({"name": "m"}, 3, "last", "t")
    plain = EmbeddingSource.of({"embedder": "api", "model": "text-embedding-3-small"}, 0)
    assert plain == EmbeddingSource({"embedder": "api", "model": "text-embedding-3-small"}, 0)
    # A model that is known by its content may lie anywhere; one of the hub is known by its whole name.
    here, there = (EmbeddingSource({"name": f"{folder}/tiny", "content": "0f"}, 3) for folder in ("/a", "b/c"))
    assert here == there != EmbeddingSource({"name": "b/c/tiny", "content": "0e"}, 3)
    assert EmbeddingSource({"name": "a/tiny", "content": None}, 3) != EmbeddingSource(
        {"name": "b/tiny", "content": None}, 3
    )


FEATURES, REWARDS, NAMES = rows()
HOLED = np.where(np.arange(6) == 2, np.nan, FEATURES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QProbe(loss="nonsense"), "nonsense"),
        (lambda: QProbe(learning_speed=1), "learning_speed"),
        (lambda: QProbe(settings=TrainingSettings(), steps=3), "settings"),
        (lambda: QProbe(beta=-1), "beta"),
        (lambda: QProbe(k=0), "k is 0"),
        (lambda: QProbe().score(FEATURES), "trained"),
        (lambda: QProbe().save_pretrained("x"), "trained"),
        (lambda: QProbe().fit(HOLED, REWARDS, NAMES), "features"),
        (lambda: QProbe().fit(FEATURES, REWARDS + np.inf, NAMES), "infinity"),
        (
            lambda: QProbe("reward_cross_entropy").fit(FEATURES, REWARDS * 3, NAMES),
            "rewards",
        ),
        (lambda: QProbe().fit(FEATURES, REWARDS[:-1], NAMES), "rewards"),
        (lambda: QProbe().fit(FEATURES, REWARDS, NAMES[:-1]), "prompts"),
        (lambda: QProbe().fit(FEATURES, REWARDS[:, None], NAMES), "rewards"),
        (lambda: QProbe().fit(FEATURES, REWARDS, NAMES[:, None]), "prompts"),
        (lambda: QProbe().fit(FEATURES[0], REWARDS, NAMES), "features"),
        (lambda: QProbe().fit(FEATURES * 1j, REWARDS, NAMES), r"torch\.complex64"),
        (lambda: QProbe().fit(FEATURES.astype(str), REWARDS, NAMES), "features"),
        (lambda: QProbe().fit([[1.0], [1.0, 2.0]], REWARDS, NAMES), "features"),
        (lambda: QProbe("reward_mse").fit_pairs(FEATURES, FEATURES), "reward_mse"),
        (lambda: QProbe("bradley_terry").fit_pairs(FEATURES, FEATURES[1:]), "rejected"),
        (lambda: QProbe("bradley_terry").fit_pairs(FEATURES, FEATURES, [1]), "entries"),
        (lambda: QProbe("bradley_terry").fit_pairs(HOLED, FEATURES), "infinity"),
        (lambda: fitted().score(FEATURES[:, :5]), "features"),
        (lambda: fitted().score(FEATURES[0]), "features"),
        (lambda: fitted().score(HOLED), "features"),
        (lambda: fitted().select(FEATURES, beta=0.5), r"torch\.Generator"),
        (lambda: fitted().select(FEATURES, beta=-0.5, generator=torch.Generator()), "beta"),
        (lambda: fitted().select(FEATURES[:0], beta=0), "candidate"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_saved_probe_that_is_fitted_again_chooses_its_temperature_again(tmp_path: Path) -> None:
    features, rewards, names = rows()
    chosen = QProbe("policy_gradient", k=4, seed=3, **OPTIONS).fit(features, rewards, names)
    chosen.beta_ = 7.0  # as if other data had led to it
    chosen.save_pretrained(tmp_path / "chosen")
    again = QProbe.from_pretrained(tmp_path / "chosen")
    assert (again.beta, again.beta_) == (None, 7.0)
    assert again.fit(features, rewards, names).beta_ in BETAS
    given = QProbe("policy_gradient", beta=0.3, k=4, seed=3, **OPTIONS).fit(features, rewards, names)
    given.save_pretrained(tmp_path / "given")
    again = QProbe.from_pretrained(tmp_path / "given")
    assert (again.beta, again.beta_) == (0.3, 0.3)
    assert again.fit(features, rewards, names).beta_ == 0.3


def edited(**changes: Any) -> Any:
    return lambda card: json.dumps(json.loads(card) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card[:-20],
        lambda card: "[]",
        lambda card: "\xff",
        edited(loss="nonsense"),
        edited(settings={"speed": 1}),
        edited(source={"model": "m"}),
        edited(source={"model": "m", "layer": 1}),
        edited(beta="warm"),
        lambda card: json.dumps({k: v for k, v in json.loads(card).items() if k != "training"}),
    ],
)
def test_a_damaged_card_is_named(damage: Any, tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    card = tmp_path / "probe.json"
    card.write_bytes(damage(card.read_text()).encode("latin-1"))
    with pytest.raises(ValueError, match=r"probe\.json"):
        QProbe.from_pretrained(tmp_path)


def test_a_folder_without_a_probe_or_without_its_weights_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"probe\.json"):
        QProbe.from_pretrained(tmp_path)
    fitted().save_pretrained(tmp_path)
    (tmp_path / "network.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"network\.safetensors"):
        QProbe.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither"):
        QProbe.from_pretrained("nobody/has-such-a-probe")
