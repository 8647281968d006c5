"""Arrays of a user's own as tensors: of a type that probes read, without a copy where there need be none."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def floats(values: ArrayLike | Tensor, name: str) -> Tensor:
    """A tensor of float16, bfloat16 or float32, on the CPU.

    Args:
        values: numbers; those that are of another type become float32.
        name: what they are called in messages.

    Raises:
        ValueError: no numbers, complex ones, or float64 that float32 cannot hold: too large, or rows that it would make alike.
    """
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        try:
            with warnings.catch_warnings():
                # Arrow, pandas and np.load(mmap_mode="r") give memory that may not be written to. Nothing writes to it here,
                # and a copy could be larger than memory.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                tensor = torch.from_numpy(np.require(values, requirements=["C"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be read as numbers ({error}): give an array of one float type.") from error
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    if tensor.is_complex():
        raise ValueError(f"{name} is {tensor.dtype}: give real numbers.")
    return _narrowed(tensor, name) if tensor.dtype == torch.float64 else tensor.float()


def _narrowed(values: Tensor, name: str) -> Tensor:
    """float64 as float32; raises ValueError where that overflows, or makes all rows alike that were not."""
    narrow = values.float()
    if len(values) == 0:
        return narrow
    if bool((torch.isinf(narrow) & torch.isfinite(values)).any()):
        raise ValueError(f"{name} holds {float(values.abs().max()):g}, beyond float32: divide all by a constant first.")
    differs, still = (part.max(0).values > part.min(0).values for part in (values, narrow))
    if bool(differs.any()) and not bool(still.any()):
        raise ValueError(
            f"{name}: its rows differ by less than float32 can hold (float64 was given); subtract the mean of every column "
            "and divide by its standard deviation first."
        )
    return narrow
