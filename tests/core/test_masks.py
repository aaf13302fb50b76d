from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from fingerprint import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune import MaskSet

SHAPES = [(0,), (1,), (7,), (8,), (9,), (2, 3), (3, 1, 5), (2, 2, 2, 2)]


@st.composite
def booleans(draw, names="abc"):
    keep = {}
    for name in names[: draw(st.integers(0, len(names)))]:
        shape = draw(st.sampled_from(SHAPES))
        size = torch.Size(shape).numel()
        keep[name] = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).bool().view(shape)
    return keep


def example():
    return {"a": torch.tensor([[True, False, True], [False, False, True]]), "b": torch.tensor([False, True])}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(booleans())
def test_state_is_packed_as_numpy_packs(keep):
    state = MaskSet(keep).state_dict()
    assert state["shapes"] == {name: list(mask.shape) for name, mask in keep.items()}
    assert list(state["bits"]) == list(keep)
    for name, mask in keep.items():
        packed = np.packbits(mask.numpy().reshape(-1), bitorder="little")
        assert state["bits"][name].dtype == torch.uint8
        assert state["bits"][name].tolist() == packed.tolist()
    back = MaskSet.from_state_dict(state)
    assert list(back) == list(keep)
    assert {name: mask.tolist() for name, mask in back.items()} == {name: mask.tolist() for name, mask in keep.items()}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(booleans(), booleans())
def test_counting_against_numpy(keep, other):
    masks = MaskSet(keep)
    arrays = {name: mask.numpy() for name, mask in keep.items()}
    total, kept = sum(a.size for a in arrays.values()), sum(int(a.sum()) for a in arrays.values())
    assert masks.counts() == {name: (int(a.sum()), a.size) for name, a in arrays.items()}
    assert masks.sparsity() == ((total - kept) / total if total else 0.0)
    for name, a in arrays.items():
        assert masks.sparsity(name) == ((a.size - a.sum()) / a.size if a.size else 0.0)
    flipped = MaskSet({
        name: torch.from_numpy(a ^ (np.arange(a.size).reshape(a.shape) == 0)) for name, a in arrays.items()
    })
    assert masks.hamming(flipped) == (sum(a.size > 0 for a in arrays.values()) / total if total else 0.0)
    assert masks.hamming(masks) == 0.0
    same = {name: mask.tolist() for name, mask in keep.items()} == {name: m.tolist() for name, m in other.items()}
    same = same and masks.shapes() == MaskSet(other).shapes()
    assert (masks == MaskSet(other)) is same
    assert (masks.digest() == MaskSet(other).digest()) is same


def test_it_is_a_mapping_in_the_order_given():
    masks = MaskSet(dict(reversed(example().items())))
    assert isinstance(masks, Mapping)
    assert list(masks) == ["b", "a"]
    assert len(masks) == 2
    assert "c" not in masks
    assert masks.shapes() == {"b": (2,), "a": (2, 3)}
    assert repr(masks) == "MaskSet(2 parameters, sparsity=0.5000)"
    with pytest.raises(KeyError):
        masks["c"]


def test_nothing_handed_in_or_out_is_a_way_in():
    given_ = example()
    masks = MaskSet(given_)
    given_["a"].fill_(False)
    given_["new"] = torch.ones(1).bool()
    masks["a"].fill_(False)
    masks.counts()["a"] = (0, 0)
    masks.shapes()["a"] = ()
    masks.state_dict()["bits"]["a"].fill_(0)
    assert masks == MaskSet(example())
    with pytest.raises(TypeError, match="item assignment"):
        masks["a"] = torch.zeros(2, 3).bool()


def test_apply_zeroes_in_place_and_leaves_the_rest_bit_for_bit():
    weights = torch.tensor([[torch.nan, torch.nan, -0.0], [torch.inf, -torch.inf, 1e-45]])
    params = {"a": nn.Parameter(weights.clone()), "b": nn.Parameter(torch.ones(2)), "c": nn.Parameter(torch.ones(3))}
    where = {name: p.data_ptr() for name, p in params.items()}
    MaskSet(example()).apply_(params)
    assert bits(params["a"]) == bits(torch.tensor([[torch.nan, 0.0, -0.0], [0.0, 0.0, 1e-45]]))
    assert params["b"].tolist() == [0.0, 1.0]
    assert params["c"].tolist() == [1.0, 1.0, 1.0]
    assert {name: p.data_ptr() for name, p in params.items()} == where
    assert all(p.requires_grad and p.grad is None for p in params.values())


def test_mask_grads_zeroes_gradients_alone():
    params = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(2))}
    params["a"].grad = torch.full((2, 3), torch.nan)
    MaskSet(example()).mask_grads_(params)
    assert (params["a"].grad == 0).tolist() == (~example()["a"]).tolist()
    assert params["b"].grad is None
    assert params["a"].tolist() == [[1.0] * 3] * 2


def test_ones_like_and_from_zeros():
    params = {"a": nn.Parameter(torch.tensor([0.0, -0.0, 1e-45, torch.nan])), "b": torch.zeros(2, 0)}
    assert MaskSet.ones_like(params).counts() == {"a": (4, 4), "b": (0, 0)}
    assert MaskSet.from_zeros(params)["a"].tolist() == [False, False, True, True]


def test_intersect_keeps_what_both_keep():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    left, right = MaskSet({"x": a, "left": a}), MaskSet({"x": b, "right": b})
    assert left.intersect(right) == MaskSet({"x": a & b, "left": a, "right": b})
    assert left == MaskSet({"x": a, "left": a})
    with expect_refusal("one shape for 'x'", "(4,)", "(2, 2)", "one architecture"):
        left.intersect(MaskSet({"x": b.view(2, 2)}))


def test_equality_and_hash_see_names_shapes_and_bits():
    masks = MaskSet(example())
    assert hash(masks) == hash(MaskSet(example()))
    assert masks != example()
    for other in (
        {"a": example()["a"]},
        {"a": example()["a"], "c": example()["b"]},
        {"a": example()["a"].view(3, 2), "b": example()["b"]},
        {"a": ~example()["a"], "b": example()["b"]},
    ):
        assert masks != MaskSet(other)
        assert masks.digest() != MaskSet(other).digest()


def test_it_travels():
    masks = MaskSet(example())
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    assert MaskSet.from_state_dict(torch.load(file, weights_only=True)) == masks
    assert pickle.loads(pickle.dumps(masks)) == masks
    assert copy.deepcopy(masks) == masks
    assert masks.to("cpu") is masks
    assert masks.to("meta").shapes() == masks.shapes()


def test_a_mask_of_another_memory_layout():
    mask = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    masks = MaskSet({"a": mask.to(memory_format=torch.channels_last)})
    assert masks == MaskSet({"a": mask})
    assert masks.digest() == MaskSet({"a": mask}).digest()
    assert MaskSet.from_state_dict(masks.state_dict())["a"].tolist() == mask.tolist()


@pytest.mark.parametrize(("bad", "found"), [(torch.ones(2), "torch.float32"), ([True], "list"), (None, "NoneType")])
def test_what_is_no_mask(bad, found):
    with expect_refusal("boolean mask for 'layer'", f"found {found}", "`tensor.bool()`"):
        MaskSet({"fine": torch.ones(1).bool(), "layer": bad})


@pytest.mark.parametrize(
    "use", [MaskSet.check_fits, MaskSet.apply_, MaskSet.mask_grads_], ids=["check_fits", "apply_", "mask_grads_"]
)
def test_masks_that_do_not_fit(use):
    params = {"a": nn.Parameter(torch.ones(3, 2)), "x": nn.Parameter(torch.ones(2))}
    with expect_refusal("a: mask (2, 3), parameter (3, 2); b: no such parameter", "made for this architecture"):
        use(MaskSet(example()), params)
    assert params["a"].tolist() == [[1.0, 1.0]] * 3


def test_a_long_list_of_misfits_is_cut():
    with expect_refusal("l4: no such parameter and 2 more"):
        MaskSet({f"l{i}": torch.ones(1).bool() for i in range(7)}).check_fits({})


def test_hamming_needs_the_same_names_and_shapes():
    for other in ({"a": example()["a"]}, {"a": example()["a"], "b": torch.ones(3).bool()}):
        with expect_refusal("same names and shapes", "('b', (2,))"):
            MaskSet(example()).hamming(MaskSet(other))


def damaged(**changes):
    state = MaskSet({"a": torch.ones(4, 4).bool(), "b": torch.ones(3).bool()}).state_dict()
    for key, change in changes.items():
        state[key] = {**state[key], **change}
    return state


def without(key, name):
    state = damaged()
    del state[key][name]
    return state


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        {"shapes": {}},
        {"shapes": None, "bits": {}},
        without("bits", "a"),
        without("shapes", "b"),
        damaged(bits={"a": torch.zeros(1, dtype=torch.uint8)}),
        damaged(bits={"a": torch.zeros(3, dtype=torch.uint8)}),
        damaged(bits={"a": torch.zeros(2, dtype=torch.int8)}),
        damaged(bits={"a": torch.zeros(1, 2, dtype=torch.uint8)}),
        damaged(bits={"a": [255, 255]}),
        damaged(bits={"a": None}),
        damaged(shapes={"a": [4, 5]}),
        damaged(shapes={"a": [-4, -4]}),
        damaged(shapes={"a": "44"}),
        damaged(shapes={"a": None}),
        damaged(shapes={"a": [4.0, 4.0]}),
    ],
    ids=lambda s: "state",
)
def test_damaged_state(state):
    with expect_refusal("`MaskSet.state_dict` wrote", "damaged or foreign state", "another copy"):
        MaskSet.from_state_dict(state)


def test_the_undamaged_state_of_these_tests_is_fine():
    assert MaskSet.from_state_dict(damaged()).counts() == {"a": (16, 16), "b": (3, 3)}


def test_masks_from_an_allocation_fit_their_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = plp.Global()(plp.score(model, plp.Magnitude()), 0.5)
    masks.apply_(dict(model.named_parameters()))
    assert MaskSet.from_zeros({"0.weight": model[0].weight}) == masks
    assert masks.sparsity() == 0.5


def test_shuffled_masks_keep_as_many_entries_of_each_layer_elsewhere():
    torch.manual_seed(0)
    masks = MaskSet({"a": torch.rand(40, 30) > 0.8, "b": torch.rand(4, 3, 3, 3) > 0.5, "c": torch.zeros(0) > 0})
    shuffled = masks.shuffled(seed=1)
    assert shuffled.counts() == masks.counts()
    assert shuffled.shapes() == masks.shapes()
    assert shuffled == masks.shuffled(seed=1) != masks.shuffled(seed=2)
    kept = masks.counts()["a"][0]
    both = int((masks["a"] & shuffled["a"]).sum())
    assert abs(both - kept**2 / 1200) < 5 * (kept**2 / 1200) ** 0.5  # what chance gives
