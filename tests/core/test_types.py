from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.types import check_scores, check_sparsity, describe, prune_count


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(0, 9999).map(lambda i: i / 10000), st.floats(0, 1, exclude_max=True)), st.integers(0, 10**7)
)
def test_prune_count_rounds_the_decimal_that_was_typed(sparsity, size):
    exact = Decimal(repr(sparsity)) * size
    assert prune_count(sparsity, size) == int(exact.to_integral_value(ROUND_HALF_UP))


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.9, 1000, 900), (0.7, 10, 7), (0.5, 1, 1), (0.29, 100, 29), (0.35, 10, 4), (0, 7, 0), (1e-9, 10**9, 1)],
)
def test_prune_count_where_binary_floats_mislead(sparsity, size, count):
    assert prune_count(sparsity, size) == count


@pytest.mark.parametrize(
    "sparsity", [1, 1.0, 1.5, -0.1, -1, 90, True, False, "0.9", None, float("nan"), float("inf"), [0.5], 0.5j]
)
@pytest.mark.parametrize(
    "use",
    [
        check_sparsity,
        lambda s: prune_count(s, 10),
        lambda s: plp.Global()({"a": torch.rand(4)}, s),
        lambda s: plp.OneShot(s),
    ],
    ids=["check_sparsity", "prune_count", "Global", "OneShot"],
)
def test_sparsity_outside_its_range(use, sparsity):
    with expect_refusal("sparsity in [0, 1)", f"found {sparsity!r}", "Write 90 % as 0.9"):
        use(sparsity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_their_layers(bad):
    scores = {f"layer{i}": torch.zeros(2, 3) for i in range(4)}
    scores["layer1"][1, 2] = bad
    scores["layer3"][0, 0] = bad
    with expect_refusal("NaN or infinity in layer1, layer3.", "weights that are not finite"):
        check_scores(scores)


def test_a_long_list_of_layers_is_cut():
    with expect_refusal("layer0, layer1, layer2, layer3, layer4 and 3 more"):
        check_scores({f"layer{i}": torch.full((2,), torch.nan) for i in range(8)})


def test_scores_of_another_type_name_their_layers():
    with expect_refusal("floating-point", "in ints, bools.", "`.float()`"):
        check_scores({"good": torch.zeros(1), "ints": torch.zeros(1, dtype=torch.int64), "bools": torch.ones(1).bool()})


def test_no_scores_at_all():
    with expect_refusal("at least one parameter", "found none", "`score`"):
        check_scores({})


def test_finite_scores_of_every_kind_pass():
    scores = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-1.0),
        "half": torch.tensor([65504.0]).half(),
        "double": torch.tensor([5e-324, 1.7e308], dtype=torch.float64),
    }
    assert check_scores(scores) is None


def test_describe_writes_what_differs_from_the_defaults():
    @dataclass(frozen=True)
    class Method:
        power: int
        seed: int = 0
        name: str = "x"

    assert describe(Method(2)) == "Method(power=2)"
    assert describe(Method(2, seed=1, name="y")) == "Method(power=2, seed=1, name='y')"
    assert describe(plp.Random()) == "Random()"
