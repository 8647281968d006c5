"""The probe as a network: one score for each embedding, linear by default; many probes side by side; save and load.

The output layer starts at zero, so an untrained probe scores every completion 0 and its policy is the base policy. That
start is neutral for every loss, and no direction of the features keeps noise that the data never spoke about. It is no
dead point: at equal scores the policy is uniform in each group and the gradient of L_PG is the covariance of reward and
features, not 0. Hidden layers start as torch's linear layers do, at random, for units that start alike stay alike.
A linear probe therefore has no random start at all: its seeds differ by the data that they see.
"""

import json
import math
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from qprobe.files import write_whole

SHAPE_FILE = "network.json"
WEIGHTS_FILE = "network.safetensors"


class ProbeNetwork(nn.Module):
    """Q(x, a) from the embedding of prompt and completion: w.x + b, or a ReLU network.

    Args:
        dimension: D, width of the embedding, >= 1.
        hidden: widths of the hidden layers; none makes the probe linear.
        generator: source of the hidden layers' start, on the CPU; None takes a fresh one with seed 0.

    Raises:
        ValueError: a width is not a positive integer.

    Source: Q = theta . phi + bias of Q-Probe (arXiv 2402.14688).
    """

    def __init__(self, dimension: int, hidden: tuple[int, ...] = (), generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dimension = dimension
        self.hidden = tuple(hidden)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        widths = list(pairwise(_widths(dimension, hidden)))
        self.weights = nn.ParameterList(torch.zeros(outputs, inputs) for inputs, outputs in widths)
        self.biases = nn.ParameterList(torch.zeros(outputs) for _, outputs in widths)
        with torch.no_grad():
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                bound = 1 / math.sqrt(weight.shape[1])
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Score embeddings.

        Args:
            features: (..., D) float; other float types are converted to the weights' own.

        Returns:
            (...) float.

        Raises:
            ValueError: the features are not D wide.
        """
        _check_width(features, self.dimension)
        x = features.to(self.weights[0].dtype)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(F.relu(x) if i else x, weight, bias)
        return x.squeeze(-1)


class StackedNetworks(nn.Module):
    """M networks of one shape that train together; every parameter has a leading axis M.

    Each network may standardise the features by its own statistics, (x - mean) / scale. They are folded into the first
    layer on every call, so the features are read once for all networks and no (M, N, D) copy of them is made.

    Args:
        dimension: D, width of the embedding, >= 1.
        hidden: widths of the hidden layers; none makes the probes linear.
        seeds: M integers; network m starts as `ProbeNetwork(dimension, hidden, Generator().manual_seed(seeds[m]))`.
        mean: (M, D) float, or None for 0.
        scale: (M, D) float > 0, or None for 1.

    Raises:
        ValueError: there is no seed, or mean or scale have another shape or a scale that is not positive.
    """

    weights: nn.ParameterList
    biases: nn.ParameterList
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        dimension: int,
        hidden: tuple[int, ...] = (),
        *,
        seeds: Sequence[int],
        mean: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not seeds:
            raise ValueError("seeds is empty: give one seed for each network that is to be trained")
        starts = [ProbeNetwork(dimension, hidden, torch.Generator().manual_seed(seed)) for seed in seeds]
        self.dimension = dimension
        self.hidden = tuple(hidden)
        for name in ("weights", "biases"):
            stacks = [torch.stack(layer).detach() for layer in zip(*(getattr(n, name) for n in starts), strict=True)]
            setattr(self, name, nn.ParameterList(stacks))
        shape = (len(seeds), dimension)
        self.register_buffer("mean", torch.zeros(shape) if mean is None else mean.detach().clone().float())
        self.register_buffer("scale", torch.ones(shape) if scale is None else scale.detach().clone().float())
        for name, statistic in (("mean", self.mean), ("scale", self.scale)):
            if statistic.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(statistic.shape)}: {len(seeds)} networks on {dimension} features "
                    f"need {shape}"
                )
        if not bool((self.scale > 0).all()):
            raise ValueError("scale holds a value that is not above 0: give constant features the scale 1")

    def forward(self, features: Tensor) -> Tensor:
        """Score embeddings with every network.

        Args:
            features: (N, D) float for all networks alike, or (M, N, D) float, each network's own.

        Returns:
            (N, M) float.

        Raises:
            ValueError: the features are not D wide, or of neither shape.
        """
        _check_width(features, self.dimension)
        weight, bias = _fold(self.weights[0], self.biases[0], self.mean, self.scale)
        networks, width, _ = weight.shape
        x = features.to(weight.dtype)
        if x.ndim == 2:
            # With the few weights on the left the product takes two thirds of the time of x @ W.T on a CPU.
            x = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), x.T).T.reshape(-1, networks, width)
        elif x.ndim == 3 and x.shape[0] == networks:
            x = torch.einsum("mnd,mhd->nmh", x, weight) + bias
        else:
            raise ValueError(
                f"features has shape {tuple(x.shape)}: give (N, {self.dimension}), or ({networks}, N, {self.dimension}) "
                "for one block of rows per network"
            )
        for weight, bias in islice(zip(self.weights, self.biases, strict=True), 1, None):
            x = torch.einsum("nmi,moi->nmo", F.relu(x), weight) + bias
        return x.squeeze(-1)

    @torch.no_grad()
    def network(self, m: int) -> ProbeNetwork:
        """Copy one network out, its standardisation folded into the first layer.

        Args:
            m: which network, 0..M-1.

        Returns:
            A network on plain features; w.x + b for a linear one.

        Raises:
            IndexError: there is no network m.
        """
        if not 0 <= m < len(self.mean):
            raise IndexError(f"there is no network {m}: they are numbered 0 to {len(self.mean) - 1}")
        weight, bias = _fold(self.weights[0], self.biases[0], self.mean, self.scale)
        probe = ProbeNetwork(self.dimension, self.hidden).to(weight.device, weight.dtype)
        for own, stacked in zip(probe.weights, (weight, *islice(self.weights, 1, None)), strict=True):
            own.copy_(stacked[m])
        for own, stacked in zip(probe.biases, (bias, *islice(self.biases, 1, None)), strict=True):
            own.copy_(stacked[m])
        return probe


def is_finite(network: ProbeNetwork) -> bool:
    """Whether all weights are finite numbers."""
    return all(bool(torch.isfinite(p.detach()).all()) for p in network.parameters())


def save(network: ProbeNetwork, folder: str | Path) -> None:
    """Write a network as `network.safetensors` and `network.json`; each file appears whole or not at all.

    Args:
        network: the network.
        folder: where to; made if it is not there.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a weight is NaN or infinite.
    """
    if not is_finite(network):
        raise ValueError("The probe has weights that are NaN or infinite: it is not saved; train it again.")
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    shape = {"dimension": network.dimension, "hidden": list(network.hidden)}
    write_whole(folder / WEIGHTS_FILE, tensors_to_bytes(tensors))
    write_whole(folder / SHAPE_FILE, (json.dumps(shape, indent=2) + "\n").encode())


def load(folder: str | Path) -> ProbeNetwork:
    """Read a network that `save` wrote.

    Args:
        folder: where it was saved.

    Returns:
        The network, on the CPU, bit for bit as it was saved.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what `save` writes, or the two do not belong together.
    """
    folder = Path(folder)
    for name in (SHAPE_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved probe network: {name} is missing")
    dimension, hidden = _read_shape(folder / SHAPE_FILE)
    try:
        tensors: dict[str, Tensor] = tensors_from_bytes((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is not a safetensors file ({error}): save the probe anew") from error
    expected: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(pairwise(_widths(dimension, hidden))):
        expected |= {f"weights.{i}": (outputs, inputs), f"biases.{i}": (outputs,)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds {found}, but {SHAPE_FILE} beside it asks for {expected}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not tensors["weights.0"].is_floating_point():
        raise ValueError(f"{folder / WEIGHTS_FILE} holds {dtypes}: a probe's weights are of one floating-point type")
    network = ProbeNetwork(dimension, hidden).to(tensors["weights.0"].dtype)
    network.load_state_dict(tensors)
    if not is_finite(network):
        raise ValueError(f"{folder / WEIGHTS_FILE} holds weights that are NaN or infinite: train the probe again")
    return network


def _read_shape(path: Path) -> tuple[int, tuple[int, ...]]:
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
        if set(shape) != {"dimension", "hidden"}:
            raise ValueError(f"its keys are {sorted(shape)}")
        dimension, hidden = shape["dimension"], tuple(shape["hidden"])
        _widths(dimension, hidden)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} does not describe a probe network ({error}): it holds a dimension and a list of hidden widths"
        ) from error
    return dimension, hidden


def _widths(dimension: int, hidden: tuple[int, ...]) -> tuple[int, ...]:
    widths = (dimension, *hidden, 1)
    for width in widths:
        if type(width) is not int or width < 1:
            raise ValueError(
                f"dimension={dimension}, hidden={hidden}: every width must be a whole number of at least 1"
            )
    return widths


def _fold(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, H, D) and biases (M, H) that read plain features instead of (x - mean) / scale."""
    folded = weight / scale[:, None]
    return folded, bias - (folded @ mean[:, :, None]).squeeze(-1)


def _check_width(features: Tensor, dimension: int) -> None:
    if features.ndim == 0 or features.shape[-1] != dimension:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, the probe reads {dimension} features: "
            "embed with the model and layer that the probe was trained on"
        )
