"""The probe network by hand, many probes at once against each alone, and saving."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qprobe.probe.losses import reward_mse
from qprobe.probe.network import SHAPE_FILE, WEIGHTS_FILE, ProbeNetwork, StackedNetworks, load, save


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(network: torch.nn.Module, seed: int = 1) -> None:
    """Give every parameter a value of its own: the output layer starts at zero and would hide the others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)


def test_linear_probe_by_hand() -> None:
    probe = ProbeNetwork(2)
    with torch.no_grad():
        probe.weights[0].copy_(torch.tensor([[2.0, -1.0]]))
        probe.biases[0].fill_(0.5)
    assert torch.equal(probe(torch.tensor([[1.0, 3.0], [4.0, 0.0]])), torch.tensor([2 - 3 + 0.5, 8 + 0.5]))
    assert probe(torch.zeros(5, 4, 2, dtype=torch.float16)).shape == (5, 4)


def test_hidden_layers_are_rectified_and_the_output_is_not() -> None:
    probe = ProbeNetwork(1, (2,))
    with torch.no_grad():
        probe.weights[0].copy_(torch.tensor([[1.0], [-1.0]]))
        probe.biases[0].zero_()
        probe.weights[1].copy_(torch.tensor([[-2.0, -3.0]]))
    assert torch.equal(probe(torch.tensor([[5.0], [-7.0]])), torch.tensor([-10.0, -21.0]))


@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
def test_an_untrained_probe_scores_zero_and_can_learn(hidden: tuple[int, ...]) -> None:
    probe, features, rewards = ProbeNetwork(3, hidden), normal(64, 3), normal(64, 3)[:, 0]
    assert probe(features).abs().max() == 0
    optimiser = torch.optim.Adam(probe.parameters(), lr=0.03)
    start = reward_mse(probe(features), rewards).item()
    before = [parameter.detach().clone() for parameter in probe.parameters()]
    for _ in range(30):
        optimiser.zero_grad()
        torch.autograd.backward(reward_mse(probe(features), rewards))
        optimiser.step()
    assert reward_mse(probe(features), rewards).item() < 0.9 * start
    assert all(not torch.equal(old, new) for old, new in zip(before, probe.parameters(), strict=True))


def test_the_start_comes_from_the_passed_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (ProbeNetwork(3, (8,), torch.Generator().manual_seed(s)).weights[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.detach().unique()) == first.numel()  # hidden units that start alike would stay alike
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_stacked_networks_equal_separate_ones_on_standardised_features(hidden: tuple[int, ...]) -> None:
    features, mean, scale = normal(40, 6) * 3 + 2, normal(4, 6, seed=1), normal(4, 6, seed=2).abs() + 0.5
    stack = StackedNetworks(6, hidden, seeds=[0, 1, 2, 3], mean=mean, scale=scale)
    filled(stack)
    scores = stack(features)
    assert scores.shape == (40, 4)
    for m in range(4):
        alone = ProbeNetwork(6, hidden)
        for own, stacked in zip(alone.parameters(), stack.parameters(), strict=True):
            own.data.copy_(stacked.data[m])
        expected = alone((features - mean[m]) / scale[m])
        torch.testing.assert_close(scores[:, m], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stack.network(m)(features), expected, rtol=1e-4, atol=1e-4)
    # Each network its own rows: network m reads block m, and no other.
    own_rows = torch.stack([features.roll(m, 0) for m in range(4)])
    expected = torch.stack([stack(features.roll(m, 0))[:, m] for m in range(4)], dim=1)
    torch.testing.assert_close(stack(own_rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [(), (7,)])
def test_a_training_step_of_the_stack_equals_separate_steps(hidden: tuple[int, ...]) -> None:
    features, rewards = normal(32, 6), normal(32, seed=3)
    stack = StackedNetworks(6, hidden, seeds=[11, 12])
    singles = [ProbeNetwork(6, hidden, torch.Generator().manual_seed(seed)) for seed in (11, 12)]
    for model in (stack, *singles):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            torch.autograd.backward(reward_mse(model(features), rewards).sum())
            optimiser.step()
    for m, single in enumerate(singles):
        for got, expected in zip(stack.network(m).parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(got, expected)


def test_folding_is_exact_enough_for_large_means() -> None:
    # Last-token states reach 24,000 in a few dimensions.
    mean, scale = torch.tensor([[24_000.0, 0.0]]), torch.tensor([[50.0, 1.0]])
    features = normal(20, 2) * scale + mean
    stack = StackedNetworks(2, seeds=[0], mean=mean, scale=scale)
    filled(stack)
    exact = ((features - mean).double() / scale) @ stack.weights[0][0].double().T + stack.biases[0].double()
    # The folded sums are 480 times a weight, and float32 keeps them to 6e-8 of that.
    for scores in (stack(features)[:, 0], stack.network(0)(features)):
        torch.testing.assert_close(scores.double(), exact[:, 0], atol=5e-4, rtol=0.0)


@pytest.mark.parametrize("hidden", [(), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_network_comes_back_bit_for_bit(tmp_path: Path, hidden: tuple[int, ...], dtype: torch.dtype) -> None:
    probe = ProbeNetwork(4, hidden).to(dtype)
    filled(probe)
    save(ProbeNetwork(2), tmp_path / "probe")  # an older one is replaced
    save(probe, tmp_path / "probe")
    again = load(tmp_path / "probe")
    assert (again.dimension, again.hidden) == (4, hidden)
    for name, tensor in probe.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor)
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {SHAPE_FILE, WEIGHTS_FILE}


def test_a_write_that_fails_leaves_the_older_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(ProbeNetwork(2), tmp_path)
    older = (tmp_path / WEIGHTS_FILE).read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qprobe.files.os.fsync", disk_full)
    with pytest.raises(OSError, match="space"):
        save(ProbeNetwork(3), tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == older
    assert {path.name for path in tmp_path.iterdir()} == {SHAPE_FILE, WEIGHTS_FILE}


def test_missing_and_foreign_files_are_refused_by_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"network\.json"):
        load(tmp_path / "nowhere")
    save(ProbeNetwork(4), tmp_path)
    shape, weights = tmp_path / SHAPE_FILE, tmp_path / WEIGHTS_FILE
    good = shape.read_text()
    for bad in (
        "[]",
        "null",
        "{",
        '{"dimension": 4}',
        '{"dimension": 0, "hidden": []}',
        '{"dimension": 4, "hidden": [true]}',
    ):
        shape.write_text(bad)
        with pytest.raises(ValueError, match="describe"):
            load(tmp_path)
    shape.write_text(json.dumps({"dimension": 10**15, "hidden": []}))  # refused before anything of that size is made
    with pytest.raises(ValueError, match="weights"):
        load(tmp_path)
    shape.write_text(good)
    save_file({"weights.0": torch.zeros(1, 4, dtype=torch.int32), "biases.0": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="floating"):
        load(tmp_path)
    weights.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"network\.safetensors"):
        load(tmp_path)


def test_bad_shapes_are_refused_by_a_sentence() -> None:
    with pytest.raises(ValueError, match="features"):
        ProbeNetwork(4)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="number"):
        ProbeNetwork(4, (0,))
    with pytest.raises(ValueError, match="seeds"):
        StackedNetworks(4, seeds=[])
    with pytest.raises(ValueError, match="shape"):
        StackedNetworks(4, seeds=[0, 1], mean=torch.zeros(4))
    with pytest.raises(ValueError, match="scale"):
        StackedNetworks(4, seeds=[0], scale=torch.zeros(1, 4))
    stack = StackedNetworks(4, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"give \(N, 4\), or \(2, N, 4\)"):
        stack(torch.zeros(3, 5, 4))
    with pytest.raises(IndexError, match="network"):
        stack.network(2)
