"""The results of a run's tested pools: made once from the probes of its procedures, and found again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path

import numpy as np

from qprobe.baselines import Fitted
from qprobe.embedding import LIKELIHOOD, GivesLikelihoods
from qprobe.evaluation import candidates, controls, fitted, sweep
from qprobe.evaluation.evaluate import evaluate
from qprobe.evaluation.methods import PaperProbes
from qprobe.evaluation.tested import Tested
from qprobe.files import fingerprint
from qprobe.pipeline.probes import clusters_of, procedures
from qprobe.pipeline.setup import Setup
from qprobe.probe.solvers import NothingToLearn
from qprobe.report.results import Results
from qprobe.run.joined import join
from qprobe.run.pools import Pool, Split


def make(setup: Setup, pool: Pool) -> None:
    """Evaluate a pool, unless its results are there."""
    path, reward, baselines = _path(setup, pool.split), setup.reward_of(pool.split), setup.every_baseline()
    if _found(setup, pool) is not None and candidates.path_of(path).exists():
        return
    made = procedures(setup)
    joined, scores, paper = setup.rows(pool, setup.probe_layer), made.scores(pool), made.paper
    of_fitted, lacking = _fitted(setup, pool)
    results = evaluate(
        joined,
        scores,
        setup.settings,
        k=setup.k_of(pool),
        seed=setup.seed,
        title=setup.title,
        protocol=_protocol(setup, pool.split),
        pool=pool.split.name,
        greedy=_greedy_rewards(setup, pool.split, joined.task_ids),
        rivals=baselines.rivals(pool, reward),
        controls=_controls(setup, pool),
        rankings=baselines.rankings(pool) | of_fitted,
        training_rewards=_training_rewards(setup, pool),
        folds=_folds(setup, pool),
        paper_probes=PaperProbes(paper.scores(pool).by_share[1.0], paper.settings) if paper else None,
        apart=setup.apart.get(pool.split.name),
        published=setup.paper.get(pool.split.name),
        made_from=_identity(setup, pool),
    )
    said = [*lacking, *baselines.notes(pool, setup.k_of(pool))]
    results = dataclasses.replace(results, notes=[*results.notes, *said])
    candidates.write(pool, reward, joined, scores.by_share[1.0], results, path)
    results.write(path)


def read(setup: Setup, pool: Pool) -> Results:
    """What was evaluated on a pool.

    Raises:
        FileNotFoundError: it was not evaluated yet, or with other settings than these.
    """
    found = _found(setup, pool)
    if found is None:
        path = _path(setup, pool.split)
        why = "was made with other settings or other tables" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {why}: run the stage evaluate first.")
    return found


def _path(setup: Setup, split: Split) -> Path:
    return setup.outputs_at / "results" / f"{split.name}.json"


def _found(setup: Setup, pool: Pool) -> Results | None:
    """The results of a pool, where they were made from the same inputs."""
    path = _path(setup, pool.split)
    if not path.exists():
        return None
    found = Results.read(path)
    return found if found.made_from == _identity(setup, pool) else None


def _identity(setup: Setup, pool: Pool) -> str:
    made = procedures(setup)
    trained_on, name, reward = setup.trained_on(pool), pool.split.name, setup.reward_of(pool.split)
    greedy = setup.pool(pool.split, "greedy", setup.greedy) if setup.greedy else None
    inputs = {
        "title": setup.title,
        "sweep": made.own[0].inputs(trained_on),
        "features": made.own[0].features_identity(pool),
        "rewards": pool.rewards(reward).state,
        "greedy": greedy.rewards(reward).state if greedy else None,
        "settings": dataclasses.asdict(setup.settings),
        "paper": setup.paper.get(name),
        "apart": {why: sorted(ids) for why, ids in setup.apart.get(name, {}).items()},
        "version": importlib.metadata.version("qprobe"),
    }
    if model := setup.reads(pool):
        inputs["likelihoods"] = pool.likelihoods(model).identity
    if made.auto:
        inputs["auto"] = [made.auto.inputs(trained_on), made.auto.features_identity(pool)]
    if made.paper:
        inputs["authors"] = [made.paper.inputs(trained_on), dataclasses.asdict(made.paper.settings)]
    if setup.baselines:
        every = setup.every_baseline()
        inputs["baselines"] = every.identity(pool, reward)
        inputs["fitted"] = [
            [
                member.identity(),
                [
                    [at.features(setup.embedder, layer).identity for layer in _layers(setup, member)]
                    for at in (trained_on, pool)
                ],
            ]
            for member in every.fitted
        ]
    return fingerprint(inputs | clusters_of(pool))


def _untrained(setup: Setup, pool: Pool) -> controls.Scores:
    """Scores of the controls that need no training; those that read features read the highest layer."""
    made = controls.scores(setup.rows(pool, setup.probe_layer), setup.settings, setup.seed)
    if isinstance(setup.embedder, GivesLikelihoods) and setup.embedder.likelihood:
        made |= controls.of_columns(setup.rows(pool, LIKELIHOOD), setup.settings, setup.embedder.column_names())
    return made


def _controls(setup: Setup, pool: Pool) -> controls.Scores:
    """Scores of the pool's rows that no probe of the table made."""
    joined, made = setup.rows(pool, setup.probe_layer), _untrained(setup, pool)
    ours = procedures(setup).ours
    if "shuffled_labels" in setup.settings.controls and ours is None:
        made["shuffled labels"] = None  # they are trained as the losses of the table are, and there are none
    elif "shuffled_labels" in setup.settings.controls and ours:
        trained_on = setup.rows(setup.trained_on(pool), setup.probe_layer)
        made |= controls.shuffled_labels(
            trained_on, joined, ours.maker, setup.training, ours.settings, k=setup.k, seed=setup.seed
        )
    return made


def _fitted(setup: Setup, pool: Pool) -> tuple[controls.Scores, list[str]]:
    """Scores of the baselines that are fitted, None where there was nothing to fit on; and sentences on these."""
    made: controls.Scores = {}
    notes = []
    trained_on, tested = (functools.partial(setup.rows, at) for at in (setup.trained_on(pool), pool))
    folded = setup.training_split is None
    for member in setup.every_baseline().fitted:
        layers = _layers(setup, member)
        try:
            made[member.method] = fitted.scores(
                member.fit, trained_on, tested, layers, setup.settings, setup.seed, folded=folded
            )
        except NothingToLearn as error:
            made[member.method] = None
            notes.append(str(error))
    return made, notes


def _layers(setup: Setup, member: Fitted) -> list[int]:
    return sorted(setup.embedder.layers) if member.every_layer else [setup.probe_layer]


def _training_rewards(setup: Setup, pool: Pool) -> dict[str, float] | None:
    """Control -> what it earns on the training set; None where there is none but the tested prompts."""
    trained_on = setup.trained_on(pool)
    if trained_on.name == pool.name:
        return None
    joined = setup.rows(trained_on, setup.probe_layer)
    training = Tested(joined, setup.settings, min(setup.k_of(pool), trained_on.smallest), setup.seed)
    known = _untrained(setup, trained_on)
    return {name: float(training.best_of(q).mean()) for name, q in known.items() if q is not None}


def _folds(setup: Setup, pool: Pool) -> np.ndarray | None:
    """(P,) folds, where the tested prompts are cross-validated: those of the first seed."""
    if setup.training_split is not None:
        return None
    first = sweep.probe_seed(setup.seed, 0)
    return sweep.fold_of(len(pool.task_ids), setup.settings.folds, first, pool.clusters)


def _greedy_rewards(setup: Setup, split: Split, task_ids: list[str]) -> np.ndarray | None:
    """(P,) rewards of greedy decoding; None where it is not part of the run."""
    if setup.greedy is None:
        return None
    joined = join(setup.pool(split, "greedy", setup.greedy), setup.reward_of(split))
    assert joined.task_ids == task_ids  # both pools are cut from the same split
    return joined.rewards


def _protocol(setup: Setup, split: Split) -> str:
    trained_on = setup.training_split
    if trained_on is None:
        return f"{setup.settings.folds}-fold cross-validation over prompts"
    if split is trained_on:
        return f"trained on {split.name} itself: how the probes fit, not what they earn"
    return f"trained on {trained_on.name}, tested here"
