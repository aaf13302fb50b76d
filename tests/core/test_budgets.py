"""Masks of many budgets at once are the masks of each, and nested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.budgets import nested_masks

SPARSITIES = [0.0, 0.3, 0.31, 0.5, 0.9, 0.95, 0.999]


def make(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 4, 3, 3), "b": (10, 6), "c": (5,), "d": (0, 3)}
    draw = {
        "normal": lambda shape: torch.randn(shape, generator=generator),
        "ties": lambda shape: torch.randint(-1, 3, shape, generator=generator).float(),
        "equal": lambda shape: torch.full(shape, 0.5),
        "double": lambda shape: torch.randn(shape, generator=generator).double() * 1e-300,
    }[kind]
    return {name: draw(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "allocation",
    [plp.Global(), plp.Layerwise(), plp.ERK(), plp.Global(min_per_layer=2), plp.ERK(min_keep_rows=1)],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "double"])
def test_they_are_the_masks_of_each_budget_and_nested(allocation, kind):
    scores = make(kind)
    sparsities = [s for s in SPARSITIES if s < 0.95 or allocation in (plp.Global(), plp.Layerwise(), plp.ERK())]
    sparsities = [s for s in sparsities if s < 0.9 or not allocation.min_keep_rows]
    found = nested_masks(allocation, scores, sparsities)
    assert list(found) == sparsities
    wider = None
    for sparsity, masks in found.items():
        assert masks == allocation(scores, sparsity)
        assert wider is None or masks.intersect(wider) == masks
        wider = masks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=6), st.sampled_from(["normal", "ties"]), st.integers(0, 99))
def test_any_sparsities_in_any_order(sparsities, kind, seed):
    scores = make(kind, seed)
    for sparsity, masks in nested_masks(plp.Global(), scores, sparsities).items():
        assert masks == plp.Global()(scores, sparsity)


def test_bad_budgets_are_refused():
    with expect_refusal("at least one sparsity", "none"):
        nested_masks(plp.Global(), make("normal"), [])
    with expect_refusal("[0, 1)", "95"):
        nested_masks(plp.Global(), make("normal"), [0.5, 95])
    with expect_refusal("finite", "a"):
        nested_masks(plp.Global(), {"a": torch.tensor([float("nan")])}, [0.5])
    with expect_refusal("floors"):
        nested_masks(plp.Global(min_per_layer=2), make("normal"), [0.5, 0.999])
