"""The commands `qprobe serve` and `qprobe update`: their words, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.settings import UsageError

if TYPE_CHECKING:
    from qprobe.models.openai_client import ApiSettings
    from qprobe.serving.policy import Policy


def add(argument: Callable[..., Any]) -> None:
    """Add the words of `qprobe serve` to its parser."""
    argument("--probe", required=True, help="a folder such as runs/NAME/probes/prompts/auto")
    argument("--host", default="127.0.0.1", help="address to listen at; 127.0.0.1 (this machine alone) if not said")
    argument("--port", type=int, default=8000, help="8000 if not said")
    argument("--upstream", metavar="URL", help="a server that draws in the place of the probe's own sampler (vLLM's)")
    argument("--upstream-model", metavar="NAME", help="the model there; the probe's own by its name if not said")
    argument("--n", type=int, help="candidates of a request that does not say; as in training if not said")
    argument("--beta", type=float, help="temperature of the choice, 0 takes the best; the probe's own if not said")
    argument(
        "--feedback", metavar="FOLDER", type=Path, help="takes what users say of answers, for `qprobe update FOLDER`"
    )
    argument("--keep-texts", action="store_true", help="of --feedback: prompts and answers are kept too")
    argument("--explore", type=float, help="of --feedback: share of requests answered by lot (0.1)")
    argument("--most-in-work", type=int, default=128, help="requests at once; more get 429 (128)")
    argument("--candidate-seconds", type=float, default=120.0, help="after which a candidate is left (120)")
    argument("--request-seconds", type=float, default=180.0, help="after which a request is given up (180)")
    argument(
        "--when-scoring-fails",
        choices=("error", "first"),
        default="error",
        help="first: the first candidate, and a header that says so; error if not said",
    )


def add_update(argument: Callable[..., Any]) -> None:
    """Add the words of `qprobe update` to its parser."""
    argument("folder", type=Path, help="of `qprobe serve --feedback`")
    argument("--probe", type=Path, help="the folder of the probe in use; the one that was served if not said")
    argument("--back", action="store_true", help="put the probe before the last update in its place again")


def update(chosen: argparse.Namespace) -> None:
    """Train on feedback, and replace the probe where nothing is lost."""
    from qprobe.serving import learning

    print(learning.update(chosen.folder, chosen.probe, chosen.back))


def serve(chosen: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Serve a saved probe until stopped."""
    from qprobe.cli import composition
    from qprobe.probe.estimator import QProbe
    from qprobe.serving import running
    from qprobe.serving.settings import ServeSettings

    if chosen.feedback is None and (chosen.keep_texts or chosen.explore is not None):
        raise UsageError("--keep-texts and --explore belong to --feedback FOLDER.")
    explore = 0.1 if chosen.explore is None and chosen.feedback is not None else chosen.explore or 0.0
    settings = ServeSettings(
        explore=explore,
        k=chosen.n,
        most_in_work=chosen.most_in_work,
        candidate_seconds=chosen.candidate_seconds,
        request_seconds=chosen.request_seconds,
        when_scoring_fails=chosen.when_scoring_fails,
    )
    policy = composition.policy(QProbe.from_pretrained(chosen.probe), overrides, chosen.beta)
    folder = Path(chosen.probe) if Path(chosen.probe).is_dir() else None
    made = running.application(
        policy,
        settings,
        _upstream(chosen, policy),
        feedback=chosen.feedback,
        texts=chosen.keep_texts,
        probe=folder,
    )
    running.serve(made, chosen.host, chosen.port)


def _upstream(chosen: argparse.Namespace, policy: Policy) -> ApiSettings | None:
    from qprobe.models.openai_client import ApiSettings
    from qprobe.sampling.openai import OpenAISampler

    if chosen.upstream is None:
        if chosen.upstream_model is not None:
            raise ValueError("--upstream-model names a model of --upstream: give both, or neither.")
        return None
    if isinstance(policy.sampler, OpenAISampler):
        raise ValueError(
            "The probe's own sampler is an API already: change it by sampler.api.base_url=URL and sampler.api.model=NAME."
        )
    own = getattr(getattr(policy.sampler, "model", None), "name", "")
    return ApiSettings(model=chosen.upstream_model or own, base_url=chosen.upstream)
