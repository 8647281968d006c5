"""A server from a policy: who draws its candidates, and the process that answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.models.keys import Key
from qprobe.models.openai_client import ApiSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler
from qprobe.serving.policy import Policy

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qprobe.serving.draws import Source
    from qprobe.serving.settings import ServeSettings

# The environment variable of the token that a server wants; where it is empty all are let in.
TOKEN = "QPROBE_SERVE_TOKEN"
_HERE = ("127.0.0.1", "localhost", "::1")


def application(
    policy: Policy,
    settings: ServeSettings,
    upstream: ApiSettings | None = None,
    *,
    feedback: Path | None = None,
    texts: bool = False,
    probe: Path | None = None,
) -> FastAPI:
    """The application that serves a policy.

    Args:
        upstream: a server that draws in the place of the policy's own sampler, with the same model.
        feedback: folder for replies and what users say of them; None keeps nothing.
        texts: whether prompts and answers are kept there too.
        probe: the folder of the policy's probe, watched for a new one.

    Raises:
        ModuleNotFoundError: the extra `serve` (or `openai`, for an upstream) is not installed.
        ValueError: a sampler that cannot serve, or keys that cannot be sent.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The package {error.name} is not installed: run `pip install 'qprobe[serve]'`."
        ) from error
    from qprobe.serving.app import app
    from qprobe.serving.feedback import FeedbackLog
    from qprobe.serving.metrics import Metrics
    from qprobe.serving.service import Service

    source, key = _source(policy, upstream)
    token = Key.of(TOKEN)
    for used in (token, *([] if key is None else [key])):
        if (why := used.fault()) is not None:
            raise ValueError(why)
    log = None if feedback is None else FeedbackLog(feedback, texts)
    return app(Service(policy, source, settings, Metrics(), log, probe), key, token)


def _source(policy: Policy, upstream: ApiSettings | None) -> tuple[Source, Key | None]:
    from qprobe.serving.draws import OwnModel
    from qprobe.serving.upstream import Upstream

    sampler = policy.sampler
    if upstream is None and isinstance(sampler, HFSampler):
        return OwnModel(sampler), None
    if upstream is None and not isinstance(sampler, OpenAISampler):
        raise ValueError(
            "The probe's sampler cannot serve in this process: give --upstream, a server of its model (vLLM's, or an API), or "
            "take sampler.backend=hf."
        )
    try:
        import openai  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The openai package is not installed: run `pip install 'qprobe[openai]'`.") from error
    if upstream is None:
        assert isinstance(sampler, OpenAISampler)
        made = Upstream(sampler.api, sampler.extra_body, stop_limit=sampler.stop_limit)
        return made, Key.of(sampler.api.api_key_variable)
    return Upstream(upstream), Key.of(upstream.api_key_variable)


def serve(made: FastAPI, host: str, port: int) -> None:
    """Serve an application until stopped.

    Raises:
        Exception: what kept it from loading its model.
    """
    import uvicorn

    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"Serving at {where}; stop with Ctrl-C.", file=sys.stderr)
    if host not in _HERE and not os.environ.get(TOKEN, "").strip():
        said = f"Whoever reaches {host} may ask, on this machine's costs: {TOKEN} sets a token that requests must bear."
        print(said, file=sys.stderr)
    plain: Any = {"access_log": False, "log_level": "warning", "timeout_graceful_shutdown": 10}
    server = uvicorn.Server(uvicorn.Config(made, host=host, port=port, **plain))
    made.state.stop = lambda: setattr(server, "should_exit", True)
    server.run()
    if (failure := made.state.service.failure) is not None:
        raise failure
