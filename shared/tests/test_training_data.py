"""Rows in pieces: what is read by pieces is what is there, nothing is copied whole, and what are no rows is refused."""

import dataclasses
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trained import parameters, planted, quick, train_one

from qprobe.probe import losses
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import Data, data, score_rows
from qprobe.probe.training.data import RowReader, statistics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_gathered_as_the_numbers_they_are(dtype: torch.dtype) -> None:
    features = normal(50, 3).to(dtype)
    before = features.clone()
    read = RowReader(features)
    for rows in ([4, 7, 7, 49], [1], list(range(50)), [], [3, 2]):
        found = read(torch.tensor(rows, dtype=torch.int64))
        assert found.dtype == torch.float32
        assert torch.equal(found, before[rows].float())
        found.fill_(-1.0)  # the reader's memory, not the features'
    assert torch.equal(features, before)


def test_some_rows_score_as_they_do_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS_AT_A_TIME", 7)
    network, features = ProbeNetwork(4), normal(40, 4).half()
    torch.nn.init.ones_(network.weights[0])
    everything = score_rows(network, features)
    torch.testing.assert_close(everything, features.float().sum(1))
    rows = torch.tensor([5, 39, 0, *range(10, 30)])
    torch.testing.assert_close(score_rows(network, features, rows), everything[rows])


@pytest.mark.parametrize("offset", [0.0, 2e4])
def test_statistics_are_those_of_each_probes_own_rows(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS_AT_A_TIME", 16)  # several pieces, the last one short
    groups = torch.arange(90) % 10
    features = normal(90, 3) + offset
    features[:, 2] = 5.0
    fitted = torch.stack([torch.arange(10) < 4, torch.arange(10) > 2, torch.arange(10) < 4])
    mean, scale = statistics(Data(features, torch.zeros(90), groups), fitted)
    for m in range(3):
        own = features[fitted[m][groups]].double().numpy()
        np.testing.assert_allclose(mean[m].numpy(), own.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(scale[m, :2].numpy(), own.std(0)[:2], rtol=1e-5)
    assert scale[:, 2].tolist() == [1.0, 1.0, 1.0]


def test_values_that_are_not_finite_are_counted_in_pieces() -> None:
    values = torch.zeros(10_000, 2, dtype=torch.float16)
    values[[5_000, 9_999], [0, 1]] = torch.inf
    with pytest.raises(ValueError, match="features"):
        losses.check_finite(values, "features")


def test_numpy_sees_no_copy_of_mapped_features(tmp_path: Path) -> None:
    # torch's own allocations are not traced; what numpy would copy on the way in is.
    array = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float16, (20_000, 256))
    tracemalloc.start()
    made = Data(torch.from_numpy(array), torch.zeros(20_000), torch.arange(20_000) // 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 10
    assert made.features.data_ptr() == array.ctypes.data


FIT = """
import sys, threading
from pathlib import Path
import numpy as np
import torch
from qprobe import QProbe

def anonymous():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
small, prompts = np.random.default_rng(0).normal(size=(2000, 1024)).astype(np.float16), np.arange(2000) // 100
options = dict(loss="policy_gradient", steps=12, minimum_mixed=3)
QProbe(**options).fit(small, small[:, 0] > 0, prompts)  # what libraries take on first use does not count
features = np.load(sys.argv[1], mmap_mode="r")
rewards, prompts = features[:, 0] > 0, np.arange(len(features)) // 100
before, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
probe = QProbe(**options).fit(features, rewards, prompts)
probe.score(features)
done.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the Linux kernel")
def test_fitting_features_of_a_file_takes_a_part_of_their_size(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    features = np.lib.format.open_memmap(path, "w+", np.float16, (80_000, 1024))
    for start in range(0, len(features), 8000):
        features[start : start + 8000] = np.random.default_rng(start).normal(size=(8000, 1024))
    features.flush()
    child = subprocess.run([sys.executable, "-c", FIT, str(path)], capture_output=True, text=True, check=True)
    assert float(child.stdout) < features.nbytes / 2**20 / 3  # of 156 MiB


def test_float16_features_are_read_as_the_numbers_they_are() -> None:
    data = planted([4] * 30)
    half = dataclasses.replace(data, features=data.features.half())
    whole = dataclasses.replace(data, features=data.features.half().float())
    settings = quick(held_out=0.4, minimum_mixed=3)
    found, expected = (train_one(rows, "policy_gradient", settings) for rows in (half, whole))
    assert torch.equal(parameters(found.network), parameters(expected.network))
    assert found.network.weights[0].dtype == torch.float32
    assert torch.equal(score_rows(found.network, half.features), score_rows(expected.network, whole.features))


@pytest.mark.parametrize("value", [0.0, 3.7, 2e4])
def test_a_constant_feature_does_no_harm(value: float) -> None:
    data = planted([5] * 30)
    widened = dataclasses.replace(data, features=torch.cat([data.features, torch.full((150, 1), value)], 1))
    found, without = (train_one(rows, "reward_mse", quick(weight_decay=0.0)) for rows in (widened, data))
    torch.testing.assert_close(
        score_rows(found.network, widened.features), score_rows(without.network, data.features), rtol=1e-3, atol=1e-3
    )


DATA = planted([4] * 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Data(DATA.features * torch.nan, DATA.rewards, DATA.groups), "features"),
        (lambda: Data(DATA.features, DATA.rewards / 0, DATA.groups), "infinity"),
        (lambda: Data(DATA.features, DATA.rewards[:-1], DATA.groups), "rewards"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups[:-1]), "groups"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups * 2), "groups"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups - 1), "int64"),
        (lambda: Data(DATA.features[0], DATA.rewards, DATA.groups), "features"),
        (lambda: Data(DATA.features[:0], DATA.rewards[:0], DATA.groups[:0]), "row"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups, torch.arange(9)), "entries"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
