"""Ids of every hashable kind become dense numbers; text costs its own length and not the longest one's."""

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from qprobe.probe.ids import dense_ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["b", "a", "b", "c"], [1, 0, 1, 2]),
        (np.array(["b", "a", "b", "c"]), [1, 0, 1, 2]),
        (np.array(["b", "a", "b", "c"], dtype=object), [1, 0, 1, 2]),
        (pd.Series(["b", "a", "b", "c"], index=[3, 3, 0, 1]), [1, 0, 1, 2]),
        (pa.chunked_array([["b", "a"], ["b", "c"]]), [1, 0, 1, 2]),
        (pa.array(["b", "a", "b", "c"]).dictionary_encode(), [1, 0, 1, 2]),
        ([7, -1, 7, 40], [1, 0, 1, 2]),
        (np.array([7, -1, 7, 40], dtype=np.int8), [1, 0, 1, 2]),
        (np.array([0.5, -1, 0.5, 4.0]), [1, 0, 1, 2]),
        (torch.tensor([7, -1, 7, 40]), [1, 0, 1, 2]),
        ([torch.tensor(7), torch.tensor(-1), torch.tensor(7), torch.tensor(40)], [1, 0, 1, 2]),
        (torch.tensor([0.5, -1, 0.5, 4.0], dtype=torch.bfloat16), [1, 0, 1, 2]),
        ([("mbpp", 7), ("mbpp", 2), ("mbpp", 7), ("math", 1)], [2, 1, 2, 0]),
        ([b"b", b"a", b"b", b"c"], [1, 0, 1, 2]),
        # What has no common order is numbered as it comes, and text is not the number that it spells.
        ([1, "1", 1.0, ("1",)], [0, 1, 0, 2]),
        (iter(["b", "a"]), [1, 0]),
        ([], []),
    ],
)
def test_equal_ids_have_one_number_and_numbers_follow_the_order_of_ids(ids: Any, expected: list[int]) -> None:
    codes = dense_ids(ids)
    assert codes.dtype == np.int64
    assert codes.tolist() == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", None], "names"),
        ([1.0, 2.0, float("nan")], "names"),
        (np.array([0.0, np.nan]), "names"),
        (pd.Series(["a", pd.NA], dtype="string"), "names"),
        (pd.Series(pd.to_datetime(["2020-01-01", None])), "names"),
        (pa.array(["a", None]), "names"),
        (["a", ["b"]], "names"),
        ([{}], "names"),
        (np.zeros((3, 1), dtype=int), "names"),
        (np.array("a"), "names"),
        ("abc", "names"),
        ({"a": 1}, "names"),
        ({"a", "b"}, "names"),
        (3, "names"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_column_of_ids_is_a_sentence(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_ids(ids, "names")


def test_one_long_id_does_not_make_the_others_long() -> None:
    ids = ["x" * 20_000, *(f"task {i}" for i in range(500))] * 40
    tracemalloc.start()
    try:
        codes = dense_ids(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(codes)) == 501
    assert peak < 4e6  # fixed-width text would take 20,040 rows x 20,000 characters x 4 bytes, 1.6 GB
