"""Settings of torch and numpy that a program has for its whole process, and that must not reach into training and scoring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def own_state() -> Iterator[None]:
    """Gradients on, float32 and the CPU as defaults, no autocast, numpy's own warnings; afterwards all is as it was.

    Also a decorator. Tensors that the caller made under `inference_mode` stay what they are: whoever differentiates with
    respect to what they go into copies them. The default type is the process's, so where it is not float32, other threads
    see float32 meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        # The others cost something in every call of torch, or are the process's own, so they are touched where they differ.
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        yield
