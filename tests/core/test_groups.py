from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.groups import Group, Member, ParameterGroups

SHAPES = {
    "a.weight": (6, 3),
    "a.bias": (6,),
    "n.weight": (6,),
    "n.mean": (6,),
    "b.weight": (4, 12),
    "b.bias": (4,),
    "c.weight": (2, 4),
}


def example() -> ParameterGroups:
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    four = torch.cat([2 * pairs, 2 * pairs + 1], 1)
    one = torch.arange(4)[:, None]
    return ParameterGroups(
        [
            Group(
                "a",
                3,
                (
                    Member("a.weight", 0, pairs),
                    Member("a.bias", 0, pairs),
                    Member("n.weight", 0, pairs),
                    Member("b.weight", 1, four, "in"),
                    Member("n.mean", 0, pairs, "stat"),
                ),
            ),
            Group("b", 4, (Member("b.weight", 0, one), Member("b.bias", 0, one), Member("c.weight", 1, one, "in"))),
        ],
        SHAPES,
        {"a.weight": 18, "b.weight": 48 * 5, "c.weight": 8},
        {"c": "it reaches the output of the model"},
    )


KEEP = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True, True, False])}


def entries(groups, root, unit, kinds=("out",)):
    """Every entry of a unit, as (name, place), by walking through all places of all parameters."""
    found = set()
    for member in groups[root].members:
        if member.kind in kinds:
            rows = set(member.index[unit].tolist())
            for place in itertools.product(*map(range, SHAPES[member.name])):
                if place[member.dim] in rows:
                    found.add((member.name, place))
    return found


@pytest.mark.parametrize("inputs", [False, True])
def test_expand_masks_the_slices_of_removed_units_and_nothing_else(inputs):
    groups = example()
    masks = groups.expand(KEEP, inputs=inputs)
    gone = set()
    for root, kept in KEEP.items():
        for unit in range(groups[root].size):
            if not kept[unit]:
                gone |= entries(groups, root, unit, ("out", "in") if inputs else ("out",))
    found = {(n, tuple(p)) for n, mask in masks.items() for p in (~mask).nonzero().tolist()}
    assert found == gone
    assert set(masks) == {"a.weight", "a.bias", "n.weight", "b.weight", "b.bias"} | ({"c.weight"} if inputs else set())


def test_collapse_is_the_inverse_of_expand():
    groups = example()
    back = groups.collapse(groups.expand(KEEP))
    assert all(torch.equal(back[root], kept) for root, kept in KEEP.items())
    assert groups.collapse({}).sparsity() == 0.0


def test_one_living_entry_keeps_a_unit_alive():
    groups = example()
    masks = dict(groups.expand(KEEP))
    masks["n.weight"][4] = True
    assert groups.collapse(masks)["a"].tolist() == [True, True, True]


@pytest.mark.parametrize("how", ["sum", "mean", "max", "l2"])
def test_reduce_equals_a_loop_over_entries(how):
    groups = example()
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items() if n != "a.bias"}
    units = groups.reduce(scores, how)
    for group in groups:
        for unit in range(group.size):
            values = torch.stack([scores[n][p] for n, p in entries(groups, group.root, unit) if n in scores])
            expected = {"sum": values.sum(), "mean": values.mean(), "max": values.max(), "l2": values.norm()}[how]
            torch.testing.assert_close(units[group.root][unit], expected)
    assert len(units) == 2


def test_allocations_work_on_units_as_on_weights():
    groups = example()
    scores = groups.reduce({n: torch.arange(torch.Size(s).numel()).view(s).float() for n, s in SHAPES.items()})
    keep = plp.Global(min_per_layer=1)(scores, 3 / 7)
    assert sum(int(k.sum()) for k in keep.values()) == 4
    assert groups.expand(keep).sparsity() > 0


def test_cost_and_positions_count_what_slicing_leaves():
    groups = example()
    left = {"a.weight": 4 * 3, "a.bias": 4, "n.weight": 4, "b.weight": 2 * 8, "b.bias": 2, "c.weight": 2 * 2}
    assert groups.cost(KEEP) == (sum(left.values()), 4 * 3 + 2 * 8 * 5 + 2 * 2)
    assert groups.cost({}) == (18 + 6 + 6 + 48 + 4 + 8, 18 + 48 * 5 + 8)
    positions = groups.positions(KEEP)
    assert positions["b.weight"][1].tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    assert positions["n.mean"][0].tolist() == [0, 2, 3, 5]


def test_plain_data():
    groups = example()
    again = pickle.loads(pickle.dumps(groups))
    assert again.expand(KEEP) == groups.expand(KEEP)
    restored = ParameterGroups.from_state_dict(groups.state_dict())
    assert restored.expand(KEEP, inputs=True) == groups.expand(KEEP, inputs=True)
    assert restored.report(KEEP) == groups.report(KEEP)
    assert groups.subset(["b"]).sizes == {"b": 4}
    assert groups.subset(["b"]).cost({}) == groups.cost({})
    assert [g.root for g in groups] == ["a", "b"] == [groups[0].root, groups[1].root]


def test_the_report_names_layers_units_reasons_and_what_is_left():
    lines = example().report(KEEP)
    for part in ("2/3", "2/4", "c: it reaches the output of the model", "7 units in 2 groups", "42 of 90 parameters"):
        assert part in lines, lines


def test_bad_input_is_refused():
    groups = example()
    with expect_refusal("'z'", "Known roots"):
        groups.expand({"z": torch.ones(3, dtype=torch.bool)})
    with expect_refusal("3 booleans", "'a'", "float32"):
        groups.expand({"a": torch.ones(3)})
    with expect_refusal("found none", "'a'"):
        groups.reduce({"b.weight": torch.ones(4, 12)})
    with expect_refusal("(6, 3)", "a.weight"):
        groups.reduce({"a.weight": torch.ones(3, 6)})
    with expect_refusal("how", "'median'"):
        groups.reduce({}, "median")
    with expect_refusal("damaged"):
        ParameterGroups.from_state_dict({"groups": [{"root": "a"}]})
    with expect_refusal("2 roots"):
        ParameterGroups([groups[0], groups[0]], SHAPES)
    with expect_refusal("shape for every member"):
        ParameterGroups([groups[0]], {})
