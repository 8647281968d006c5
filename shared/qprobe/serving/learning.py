"""A new probe from a server's feedback, which takes the old one's place only where held-out feedback shows no loss.

What is learnt from: preferences and rewards of several candidates, compared within their request; single rewards of answers,
compared within their prompt (where it came several times), each weighted by the inverse of the probability that its answer was
chosen with, for answers that the old probe likes are seen more often than they come.

What both probes are worth on held-out requests is estimated alike: where candidates have rewards (a preferred one 1, the others
0), what the policy expects, sum of pi(a) r(a); where the answer alone has one, (pi_new - pi_old)(a) / p(a) times r - b, b being
the mean reward of the requests that were learnt from. Prompts are left out whole, in folds; the kept probe is fitted on all.

Source: inverse propensity weights (Horvitz & Thompson 1952), self-normalised and capped (Swaminathan & Joachims 2015).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from qprobe.probe import selection
from qprobe.probe.blocks import AUTO_LOSSES
from qprobe.probe.calibration import calibrate
from qprobe.probe.estimator import QProbe
from qprobe.probe.intervals import Interval, bootstrap_mean
from qprobe.probe.losses import AUTO
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.solvers import NothingToLearn, Rows, Solution, solve
from qprobe.probe.solvers.work import SolvedLoss
from qprobe.serving.feedback import PROBE, Tables
from qprobe.store.parts import inputs_of, read_part
from qprobe.store.table import embeddings_of

Floats = NDArray[np.float64]
# Below it nothing is held out: half of a difference would be chance (as in training, `probe.training`).
FEWEST_MIXED = 20
FOLDS = 5
# A single reward weighs at most as many of an answer that was certain.
MOST_WEIGHT = 20.0
IN_USE = "the probe in use"
REPLACED = "replaced"
UNTIL = "feedback_until"  # in a probe's card: the latest feedback that it learnt from


@dataclass(frozen=True)
class Request:
    """A request that had feedback.

    Args:
        prompt: fingerprint.
        kind: reward, rewards or preferred.
        features: (k, D) float32.
        probabilities: (k,) that its candidates were chosen with.
        rewards: by place.
        at: when the feedback came, in seconds since 1970.
    """

    id: str
    prompt: str
    kind: str
    features: NDArray[np.float32]
    probabilities: Floats
    rewards: dict[int, float]
    at: float = 0.0

    def weight(self, place: int) -> float:
        return min(MOST_WEIGHT, 1 / max(self.probabilities[place], 1e-9)) if self.kind == "reward" else 1.0

    def worth(self, new: Floats, old: Floats, usual: float) -> float:
        """Reward that one policy expects above another, by the probabilities of both.

        Args:
            usual: mean reward of answers elsewhere.
        """
        if self.kind != "reward":
            places = list(self.rewards)
            rewards = np.array([self.rewards[place] for place in places])
            parts = [law[places] / max(float(law[places].sum()), 1e-9) for law in (new, old)]
            return float((parts[0] - parts[1]) @ rewards)
        ((place, reward),) = self.rewards.items()
        return float((new - old)[place] * self.weight(place) * (reward - usual))


@dataclass(frozen=True)
class Updated:
    """What came of an update.

    Args:
        probe: that was trained; None where nothing could be learnt.
        better: reward of the new probe's answers above the old one's, on held-out feedback; None where none was trained.
        why: in sentences.
        counts: requests by kind of feedback.
    """

    probe: QProbe | None
    better: Interval | None
    why: str
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def replaces(self) -> bool:
        """Whether the whole interval says that nothing is lost."""
        return self.better is not None and self.better.low >= 0


def read(folder: Path) -> tuple[list[Request], tuple[int, ...], dict[str, Any]]:
    """The requests of a folder that had feedback, the widths of the blocks of their features, and what these are of.

    Raises:
        FileNotFoundError: no server has written there.
    """
    manifest = folder / "replies" / "manifest.json"
    if not manifest.exists():
        raise FileNotFoundError(f"{folder} holds no replies of a server: give the folder of `qprobe serve --feedback`.")
    inputs = inputs_of(manifest)
    tables = Tables(folder, inputs["source"], tuple(inputs["widths"]))
    if not tables.feedback.parts():
        return [], tables.widths, tables.source
    said: dict[str, dict[int, float]] = {}
    kinds: dict[str, str] = {}
    times: dict[str, float] = {}
    for row in tables.feedback.read().to_pylist():
        said.setdefault(row["task_id"], {})[row["sample"]] = row["reward"]
        kinds[row["task_id"]], times[row["task_id"]] = row["kind"], row["at"]
    wanted = pa.array(list(said))  # most replies have no feedback: they may be more than the memory holds
    replies = tables.replies.read(columns=["task_id", "sample", "prompt", "probability"])
    of_request: dict[str, list[dict[str, Any]]] = {}
    for row in replies.filter(pc.is_in(replies["task_id"], wanted)).to_pylist():
        of_request.setdefault(row["task_id"], []).append(row)
    features: dict[tuple[str, int], NDArray[np.float32]] = {}
    for path in tables.features.parts():
        part = read_part(path, None)
        part = part.filter(pc.is_in(part["task_id"], wanted))
        if len(part):
            keys = zip(part["task_id"].to_pylist(), part["sample"].to_pylist(), strict=True)
            features.update(zip(keys, embeddings_of(part), strict=True))
    requests = []
    for id, rows in of_request.items():
        own = np.stack([features[id, row["sample"]] for row in rows])
        probabilities = np.array([row["probability"] for row in rows])
        requests.append(Request(id, rows[0]["prompt"], kinds[id], own, probabilities, said[id], times[id]))
    return requests, tables.widths, tables.source


def learn(requests: Sequence[Request], old: QProbe, widths: Sequence[int], seed: int = 0) -> Updated:
    """Train a probe on all feedback, and compare such probes with the old one on prompts that they did not learn from."""
    kinds = [request.kind for request in requests]
    counts: dict[str, int] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    if not requests:
        return Updated(None, None, "No feedback has come in: there is nothing to learn from.")
    rows, requests_of_row = _rows(requests, old, widths)
    mixed = len(np.unique(rows.groups[rows.mixed]))
    if mixed < FEWEST_MIXED:
        return Updated(None, None, _too_little(mixed, kinds, requests), counts)
    # What the probe in use has learnt from would speak for it, and through its anchor for the new one.
    fresh = np.array([request.at > old.data_.get(UNTIL, 0.0) for request in requests])
    if fresh.sum() < FEWEST_MIXED:
        said = (
            f"Since the last update feedback on {fresh.sum()} requests has come in, and {FEWEST_MIXED} are the fewest."
        )
        return Updated(None, None, said, counts)
    prompts = np.unique([request.prompt for request in requests], return_inverse=True)[1]
    folds = np.random.default_rng(seed).permutation(prompts.max() + 1)[prompts] % FOLDS
    losses: list[SolvedLoss] = ["pairwise_logistic"] if set(kinds) == {"preferred"} else list(AUTO_LOSSES)
    worth = np.zeros(len(requests))
    try:
        for fold in range(FOLDS):
            out = folds == fold
            if (out & fresh).any():
                new = _probe(rows.take(~out[requests_of_row]), losses, old, seed)
                usual = _usual([request for request, left in zip(requests, out, strict=True) if not left])
                for place in np.flatnonzero(out & fresh):
                    laws = [_law(probe, requests[place]) for probe in (new, old)]
                    worth[place] = requests[place].worth(*laws, usual)
        rated = np.array([kind != "preferred" for kind in kinds])[requests_of_row]
        probe = _probe(rows, losses, old, seed, rated)
    except NothingToLearn as error:
        return Updated(None, None, f"Nothing can be learnt: {error}", counts)
    probe.data_[UNTIL] = max(request.at for request in requests)
    better = bootstrap_mean(worth[fresh], prompts[fresh], rng=np.random.default_rng(seed))
    interval = f"{better.value:+.3f} [{better.low:+.3f}, {better.high:+.3f}]"
    said = f"On feedback that neither has learnt from the new probe's answers earn {interval} against those of the probe in use "
    said += f"({len(np.unique(prompts[fresh]))} prompts)."
    return Updated(probe, better, said, counts)


def update(folder: Path, probe: Path | None = None, back: bool = False) -> str:
    """Train on a folder's feedback and put the new probe in the old one's place where nothing is lost; returns what came of it.

    Args:
        probe: the folder of the probe in use; None is the one that was served.
        back: put the probe before the last update in its place again.

    Raises:
        FileNotFoundError, ValueError: no server has written there, or the probe is another one's.
    """
    requests, widths, source = read(folder)
    served = Tables(folder, source, widths).replies.noted(PROBE)
    if probe is None and served is None:
        raise ValueError(f"{folder} does not say which probe was served: give --probe FOLDER.")
    place = probe or Path(served)
    if back:
        return _back(folder, place)
    old = QProbe.from_pretrained(place)
    if old.dimension != sum(widths):
        raise ValueError(
            f"{place} reads {old.dimension} features, and {folder} holds {sum(widths)}: give its own probe."
        )
    found = learn(requests, old, widths)
    counted = ", ".join(f"{count} of {kind}" for kind, count in found.counts.items())
    lines = [f"{len(requests)} requests with feedback{f' ({counted})' if counted else ''}.", found.why]
    if found.replaces:
        assert found.probe is not None  # where there is an interval there is a probe
        kept = _keep(folder, place)
        found.probe.save_pretrained(place)
        lines.append(f"{place} is the new probe; the old one lies in {kept}, and --back puts it in its place again.")
    else:
        lines.append(f"{place} stays as it is.")
    return "\n".join(lines)


def _keep(folder: Path, probe: Path) -> Path:
    """A copy of a probe's folder among those that were replaced."""
    kept = folder / REPLACED / f"{len(list((folder / REPLACED).glob('*'))) + 1:03d}"
    shutil.copytree(probe, kept)
    return kept


def _back(folder: Path, place: Path) -> str:
    kept = sorted((folder / REPLACED).glob("*"))
    if not kept:
        raise ValueError(f"{folder} holds no probe that was replaced.")
    QProbe.from_pretrained(kept[-1]).save_pretrained(place)
    shutil.rmtree(kept[-1])
    return f"{place} is the probe before the last update again."


def _rows(requests: Sequence[Request], old: QProbe, widths: Sequence[int]) -> tuple[Rows, NDArray[np.int64]]:
    """What is learnt from, and the request of every row."""
    features, rewards, groups, clusters, weights, owners = [], [], [], [], [], []
    for number, request in enumerate(requests):
        for place, reward in request.rewards.items():
            features.append(request.features[place])
            rewards.append(reward)
            groups.append(f"prompt {request.prompt}" if request.kind == "reward" else f"request {request.id}")
            clusters.append(request.prompt)
            weights.append(request.weight(place))
            owners.append(number)
    single = np.array([requests[number].kind == "reward" for number in owners])
    weighed = np.array(weights)
    if single.any():
        weighed[single] /= weighed[single].mean()  # self-normalised
    matrix = np.stack(features).astype(np.float32)
    ends = np.cumsum(widths)
    blocks = {
        f"block {n}": matrix[:, end - width : end] for n, (end, width) in enumerate(zip(ends, widths, strict=True))
    }
    anchors = {} if old.network_.hidden else {IN_USE: old.score(matrix).astype(np.float64)}
    numbered = [np.unique(names, return_inverse=True)[1] for names in (groups, clusters)]
    return Rows(blocks, rewards, numbered[0], clusters=numbered[1], weights=weighed, anchors=anchors), np.array(owners)


def _probe(
    rows: Rows, losses: Sequence[SolvedLoss], old: QProbe, seed: int, rated: NDArray[np.bool_] | None = None
) -> QProbe:
    """A probe that is solved on rows, pulled towards the old one where that is linear.

    Args:
        rated: (N,) bool, rows with rewards, which alone say how likely an answer is right: the preferred one of several may be
            wrong. None: it is not asked.
    """
    solution = solve(rows, losses, average=len(losses) > 1, seed=seed)
    weights, bias = _folded(solution, old)
    network = ProbeNetwork(len(weights))
    with torch.no_grad():
        network.weights[0].copy_(torch.from_numpy(weights)[None])
        network.biases[0].fill_(bias)
    probe = QProbe(loss=AUTO if len(losses) > 1 else losses[0], k=old.k, seed=seed)
    probe.network_, probe.beta_ = network, solution.beta
    probe.calibration_ = None
    if rated is not None and rated.any():
        probe.calibration_ = calibrate(rows.take(rated), solution.left_out[rated])
    probe.source, probe.use = old.source, old.use
    choice = solution.choice
    probe.training_ = {
        "solver": "feedback",
        "chosen_on_held_out_prompts": choice is not None,
        "held_out_mixed_prompts": 0 if choice is None else choice.prompts,
        "note": f"Trained on feedback. {solution.sentence()}",
    }
    probe.data_ = {"rows": len(rows), "prompts": int(rows.clusters.max()) + 1}
    return probe


def _folded(solution: Solution, old: QProbe) -> tuple[Floats, float]:
    """Weights and bias of plain features: an anchor that is the old probe is linear in them too."""
    weights, bias = np.concatenate(list(solution.coefficients.values())), solution.bias
    if solution.anchor:
        own = old.network_.weights[0].detach().double().numpy()[0]
        weights = weights + solution.anchor_weight * own
        bias += solution.anchor_weight * float(old.network_.biases[0].detach())
    return weights, bias


def _law(probe: QProbe, request: Request) -> Floats:
    scores = torch.from_numpy(probe.score(request.features)).double()
    return np.asarray(selection.selection_weights(scores, probe.beta_).numpy())


def _usual(requests: Sequence[Request]) -> float:
    """Mean reward of single answers, as they came."""
    rewards = [reward for request in requests if request.kind == "reward" for reward in request.rewards.values()]
    return float(np.mean(rewards)) if rewards else 0.0


def _too_little(mixed: int, kinds: Sequence[str], requests: Sequence[Request]) -> str:
    said = f"Nothing can be learnt yet: feedback differs within {mixed} prompts or requests, and {FEWEST_MIXED} are the fewest."
    if "reward" not in kinds:
        return said
    sure = all(request.probabilities[place] > 0.999 for request in requests for place in request.rewards)
    said += " One rewarded answer a prompt says nothing of its other candidates: ask users which of several they prefer, or let"
    said += " prompts come again."
    return f"{said} All answers were chosen with certainty, too: serve with --explore above 0." if sure else said
