"""Layers and shapes compared on one embedding: each has its row, and what is said of controls follows from the intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from qprobe_preference import comparison
from qprobe_preference.comparison import Variant
from qprobe_preference.policy import Experiment

Make = Callable[..., Experiment]


def variants(layers: Any, hidden: Any, layer: Any = None, widths: list[int] | None = None) -> list[Variant]:
    compare = {"layers": layers, "hidden": hidden}
    return comparison.variants({"compare": compare, "layer": layer, "probe": {"hidden": widths or []}})


def test_variants_are_all_layers_by_all_shapes() -> None:
    every = variants([6, 12], [[], [256]])
    assert every == [Variant(6, ()), Variant(6, (256,)), Variant(12, ()), Variant(12, (256,))]
    assert variants([6], []) == [Variant(6, None)]
    assert variants([], [], 9, [3]) == []
    assert variants([6, 12], [[], [3]], 12, [3]) == [Variant(layer, shape) for layer in (6, 12) for shape in ((), (3,))]


@pytest.mark.parametrize(
    ("compared", "key"),
    [
        ((3, []), r"compare\.layers"),
        (([], [256]), r"compare\.hidden"),
        (([6, 12], [], 9), "layer is 9"),
        (([6, 12], [], "best"), "layer is best"),
        (([], [[], [256]], None, [3]), r"probe\.hidden is \[3\]"),
    ],
)
def test_what_cannot_be_compared_or_would_not_be_is_refused(compared: tuple[Any, ...], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        variants(*compared)


def test_a_variant_that_chooses_its_layer_says_so(planted: Make) -> None:
    pipeline = planted().pipeline
    one = Variant(None, ()).of(pipeline)
    assert (one.layer, one.probe_layers) == ("best", [1, 2])
    assert one.outputs is not None
    assert one.outputs.name == "layer=best.linear"
    assert Variant(None, ()).of(dataclasses.replace(pipeline, layer=None)).layer == 2
    assert Variant(1, (8,)).of(pipeline).probe_layers == [1]


@pytest.mark.parametrize(
    ("controls", "layer", "said"),
    [
        ((), 1, "No control was run"),
        (("length",), 1, "Every probe beats"),
        (("length",), 2, "Layer 2, linear: Q-probe L_QP does not beat the best control, longest (characters)"),
    ],
)
def test_what_is_said_of_controls_follows_from_the_intervals(
    controls: tuple[str, ...], layer: int, said: str, planted: Make
) -> None:
    """Layer 1 carries the signal, layer 2 is noise."""
    pipeline = planted().pipeline
    settings = dataclasses.replace(pipeline.settings, controls=controls, k=2, folds=3)
    assert pipeline.training_split is not None
    pairs = dataclasses.replace(
        pipeline, tests=[pipeline.training_split], training_split=None, settings=settings, layer=layer
    )
    pairs.execute(["sample", "reward", "embed"])
    comparison.execute(pairs, [Variant(layer, ())], ["train", "evaluate"])
    text = comparison.write(pairs, [Variant(layer, ())])
    assert said in text
    assert sum(word in text for word in ("No control was", "Every probe beats", "does not beat")) == 1
