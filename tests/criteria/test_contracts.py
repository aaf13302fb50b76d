"""What every criterion, allocation and schedule of the package promises; new classes are found by themselves."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import pickle
import pkgutil
import random

import numpy as np
import pytest
import torch
from fingerprint import bits, fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CUTS, PROBLEMS
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
import pl_prune.core
import pl_prune.criteria
from pl_prune import MaskSet
from pl_prune.core.types import prune_count

EXAMPLES = {"final": 0.8, "start": 2, "end": 20}
FAST = settings(max_examples=30, deadline=None, derandomize=True)


def concrete(base):
    """Find every subclass in the package, exported or not."""
    for package in (pl_prune.core, pl_prune.criteria):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in plp.__all__:
        getattr(plp, name)

    def below(cls):
        return {cls, *itertools.chain.from_iterable(map(below, cls.__subclasses__()))}

    found = [c for c in below(base) if c.__module__.startswith("pl_prune.") and not inspect.isabstract(c)]
    return sorted(found, key=lambda c: c.__name__)


def build(cls, **chosen):
    """Make an instance; fields without a default are taken from EXAMPLES."""
    needed = {
        f.name: EXAMPLES[f.name]
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    return cls(**{**needed, **chosen})


CRITERIA, ALLOCATIONS, SCHEDULES = map(concrete, (plp.Criterion, plp.Allocation, plp.Schedule))
every_class = pytest.mark.parametrize("cls", [*CRITERIA, *ALLOCATIONS, *SCHEDULES], ids=lambda c: c.__name__)
every_criterion = pytest.mark.parametrize("criterion", list(map(build, CRITERIA)), ids=lambda c: type(c).__name__)
every_problem = pytest.mark.parametrize("kind", PROBLEMS)
FREE = [cls for cls in ALLOCATIONS if cls is not plp.NofM]  # it fixes the sparsity: tests/core/test_n_of_m.py
every_allocation = pytest.mark.parametrize("cls", FREE, ids=lambda c: c.__name__)
every_schedule = pytest.mark.parametrize("schedule", list(map(build, SCHEDULES)), ids=lambda s: type(s).__name__)


def test_the_classes_are_found():
    assert {plp.Random, plp.Magnitude, plp.GradNorm, plp.SNIP} <= set(CRITERIA)
    assert {plp.Global, plp.Layerwise, plp.ERK} <= set(ALLOCATIONS)
    assert {plp.OneShot} <= set(SCHEDULES)


@every_class
def test_a_class_is_exported_documented_and_a_frozen_dataclass(cls):
    assert cls.__name__ in plp.__all__
    assert getattr(plp, cls.__name__) is cls
    assert "__dataclass_fields__" in vars(cls)
    assert vars(cls)["__dataclass_params__"].frozen
    assert not vars(cls)["__doc__"].startswith(f"{cls.__name__}(")  # what dataclass writes by itself
    instance = build(cls)
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in "".join(base.__doc__ or "" for base in cls.__mro__)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, None)


@every_class
def test_a_class_is_a_value(cls):
    instance = build(cls)
    assert instance == build(cls)
    assert hash(instance) == hash(build(cls))
    back = pickle.loads(pickle.dumps(instance))
    assert back == instance
    assert type(back) is cls


def scores_of(criterion, problem, *cut):
    return plp.score(problem.model, criterion, problem.batches(*cut or (3, 3, 1)), problem.loss)


@every_criterion
@every_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_have_the_form_of_the_parameters(criterion, kind, dtype):
    problem = PROBLEMS[kind](dtype)
    scores = scores_of(criterion, problem)
    params = plp.Select()(problem.model)
    assert {name: s.shape for name, s in scores.items()} == {name: p.shape for name, p in params.items()}
    assert list(scores) == list(params)
    for name, score in scores.items():
        assert score.dtype in (torch.float32, torch.float64), name
        assert score.isfinite().all(), name
        assert score.device == params[name].device
        assert not score.requires_grad
        assert len(score.unique()) > 1, name


@every_criterion
@every_problem
def test_scores_are_deterministic_and_fresh(criterion, kind):
    problem = PROBLEMS[kind](torch.float32)
    first = {name: bits(s) for name, s in scores_of(criterion, problem).items()}
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    for score in scores_of(criterion, problem).values():
        score.fill_(7)
    again = scores_of(pickle.loads(pickle.dumps(criterion)), problem)
    assert {name: bits(s) for name, s in again.items()} == first


@every_criterion
@every_problem
def test_scores_do_not_depend_on_the_cut_into_batches(criterion, kind):
    problem = PROBLEMS[kind]()
    whole = scores_of(criterion, problem, 7)
    for cut in CUTS[1:3]:
        for name, score in scores_of(criterion, problem, *cut).items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(score, whole[name], rtol=1e-8, atol=1e-10 * scale)


@every_criterion
@every_problem
def test_scores_do_not_depend_on_the_mode_or_on_what_is_frozen(criterion, kind):
    expected = scores_of(criterion, PROBLEMS[kind]())
    problem = PROBLEMS[kind]()
    problem.model.eval()
    problem.model[-1].requires_grad_(False)
    for name, score in scores_of(criterion, problem).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=0)


class StepError(Exception):
    pass


class Fuse(nn.ReLU):
    """Counts its runs, and blows at one of them."""

    def __init__(self, blows_at=None):
        super().__init__()
        self.runs, self.blows_at = itertools.count(), blows_at

    def forward(self, x):
        if next(self.runs) == self.blows_at:
            raise StepError("boom")
        return super().forward(x)


def careless(problem):
    """Make a loss that tramples on what it can reach without changing its value."""

    def loss(model, batch):
        torch.rand(1), random.random(), np.random.rand()
        model[0].register_forward_hook(lambda *_: None)
        model[0].extra = 1
        model[-1].train(not model[-1].training)
        model[-1].bias.grad = torch.ones_like(model[-1].bias)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked += 1
        return problem.loss(model, batch)

    return loss


@every_criterion
@every_problem
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_scoring_leaves_no_trace(criterion, kind, mode):
    problem = PROBLEMS[kind](torch.float32)
    problem.model.train(mode != "eval")
    problem.model[1].train(mode == "train")
    problem.model[0].weight.grad = torch.full_like(problem.model[0].weight, 2.0)
    before, data = fingerprint(problem.model), (bits(problem.x), bits(problem.y))
    plp.score(problem.model, criterion, problem.batches(4, 3), careless(problem))
    assert fingerprint(problem.model) == before
    assert (bits(problem.x), bits(problem.y)) == data


@every_criterion
@every_problem
def test_scoring_leaves_no_trace_after_an_exception(criterion, kind):
    problem = PROBLEMS[kind](torch.float32)
    problem.model[2 if kind == "convnet" else 1] = counter = Fuse()
    problem.model[0].weight.grad = torch.full_like(problem.model[0].weight, 2.0)
    plp.score(problem.model, criterion, problem.batches(4, 3), careless(problem))
    runs = next(counter.runs)
    for run in sorted({0, runs // 2, runs - 1}):
        problem.model[2 if kind == "convnet" else 1] = Fuse(run)
        before = fingerprint(problem.model)
        with pytest.raises((StepError, plp.PruneError), match="boom"):
            plp.score(problem.model, criterion, problem.batches(4, 3), careless(problem))
        assert fingerprint(problem.model) == before


@every_criterion
@every_problem
def test_data_is_asked_for_where_it_is_needed_and_only_there(criterion, kind):
    problem = PROBLEMS[kind]()
    given = {"batches": problem.batches(4, 3), "loss_fn": problem.loss}
    needed = {name for name, asked in (("batches", criterion.needs_data), ("loss_fn", criterion.needs_loss)) if asked}
    expected = {name: bits(s) for name, s in plp.score(problem.model, criterion, **given).items()}
    for names in map(set, itertools.chain.from_iterable(itertools.combinations(given, n) for n in range(3))):
        some = {name: given[name] for name in names}
        if needed <= names:
            found = plp.score(problem.model, criterion, **some)
            assert {name: bits(s) for name, s in found.items()} == expected
        else:
            with expect_refusal(f"which {type(criterion).__name__} needs", "Pass both"):
                plp.score(problem.model, criterion, **some)


@every_criterion
def test_scores_feed_every_allocation(criterion):
    problem = PROBLEMS["convnet"](torch.float32)
    scores = scores_of(criterion, problem)
    before = {name: bits(s) for name, s in scores.items()}
    total = sum(s.numel() for s in scores.values())
    for cls in FREE:
        masks = build(cls)(scores, 0.6)
        assert sum(kept for kept, _ in masks.counts().values()) == total - prune_count(0.6, total)
    assert {name: bits(s) for name, s in scores.items()} == before


levels = st.one_of(st.integers(0, 999).map(lambda i: i / 1000), st.floats(0, 1, exclude_max=True))


@st.composite
def score_sets(draw):
    shapes = draw(
        st.one_of(
            st.just([(6,), (6,), (2,)]),
            st.lists(st.sampled_from([(1,), (3, 4), (4, 2), (2, 3, 2), (3, 2, 1, 2)]), min_size=1, max_size=4),
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    entry = draw(
        st.sampled_from([
            st.just(1.0),
            st.sampled_from([0.0, -0.0, 1e-45, -1e-45]),
            st.sampled_from([-1.0, 0.0, -0.0, 1.0, 3e38]),
            st.floats(-100, 100, width=32),
        ])
    )
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return {
        f"l{i}": torch.tensor(draw(st.lists(entry, min_size=n, max_size=n)), dtype=dtype).view(shape)
        for i, (shape, n) in enumerate(zip(shapes, sizes, strict=True))
    }


def kept_of(masks):
    return sum(kept for kept, _ in masks.counts().values())


@every_allocation
@FAST
@given(score_sets(), levels)
def test_the_count_is_exact_and_the_best_of_each_layer_stay(cls, scores, sparsity):
    before = [bits(s) for s in scores.values()]
    total = sum(s.numel() for s in scores.values())
    masks = build(cls)(scores, sparsity)
    assert isinstance(masks, MaskSet)
    assert list(masks) == list(scores)
    assert masks.shapes() == {name: tuple(s.shape) for name, s in scores.items()}
    assert kept_of(masks) == total - prune_count(sparsity, total)
    assert build(cls)(scores, sparsity) == masks
    assert [bits(s) for s in scores.values()] == before
    for name, mask in masks.items():
        ranked = sorted((-score, i) for i, score in enumerate(scores[name].reshape(-1).tolist()))
        kept = mask.reshape(-1).nonzero()[:, 0].tolist()
        assert kept == sorted(i for _, i in ranked[: len(kept)])


@every_allocation
@FAST
@given(score_sets(), st.lists(levels, min_size=2, max_size=4))
def test_masks_over_growing_sparsity_are_nested(cls, scores, sparsities):
    masks = [build(cls)(scores, s) for s in sorted(sparsities)]
    for denser, sparser in itertools.pairwise(masks):
        assert denser.intersect(sparser) == sparser


@every_allocation
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.0, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_go_by_index(cls, value, dtype):
    scores = {name: torch.full((n,), value, dtype=dtype) for name, n in (("a", 6), ("b", 6), ("c", 2))}
    for pruned in range(14):
        masks = build(cls)(scores, pruned / 14)
        assert kept_of(masks) == 14 - pruned
        for mask in masks.values():
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@every_allocation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_their_layer(cls, bad):
    scores = {name: torch.rand(3, 4) for name in ("first", "second", "third")}
    scores["second"][2, 3] = bad
    with expect_refusal("NaN or infinity in second."):
        build(cls)(scores, 0.5)


@every_allocation
@FAST
@given(score_sets(), levels, st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_floors_hold_with_the_exact_count(cls, scores, sparsity, rows, cols, per_layer):
    total = sum(s.numel() for s in scores.values())
    allocation = build(cls, min_keep_rows=rows, min_keep_cols=cols, min_per_layer=per_layer)
    try:
        masks = allocation(scores, sparsity)
    except plp.PruneError:
        with pytest.raises(plp.PruneError, match="Expected the floors"):
            allocation(scores, sparsity)
        sparsity = 0.0
        masks = allocation(scores, sparsity)
    assert kept_of(masks) == total - prune_count(sparsity, total)
    for mask in masks.values():
        assert mask.sum() >= min(per_layer, mask.numel())
        if mask.ndim > 1:
            for dim, floor in ((0, rows), (1, cols)):
                slices = mask.movedim(dim, 0).flatten(1)
                assert (slices.sum(1) >= min(floor, slices.shape[1])).all()


@every_allocation
@pytest.mark.parametrize("floor", [{"min_keep_rows": 2}, {"min_keep_cols": 2}, {"min_per_layer": 9}])
def test_floors_that_cannot_hold(cls, floor):
    (name, value), scores = next(iter(floor.items())), {"w": torch.rand(4, 4), "v": torch.rand(4, 4)}
    with expect_refusal(
        f"{name}={value}", "the 3 of 32 entries that sparsity 0.9 leaves", "Lower the sparsity", "floors"
    ):
        build(cls, **floor)(scores, 0.9)


@every_allocation
@FAST
@given(score_sets(), st.integers(0, 100), st.randoms(use_true_random=False))
def test_only_what_is_within_is_kept(cls, scores, percent, dice):
    within = MaskSet({
        name: torch.tensor([dice.random() < 0.7 for _ in range(s.numel())]).bool().view(s.shape)
        for name, s in scores.items()
    })
    total, available = sum(s.numel() for s in scores.values()), kept_of(within)
    keep = available * percent // 100
    sparsity = (total - keep) / total
    if keep == 0:
        sparsity = (total - 0.25) / total
    masks = build(cls)(scores, sparsity, within)
    assert kept_of(masks) == keep
    assert masks.intersect(within) == masks
    if available < total:
        with expect_refusal(f"{available + 1} entries to keep", f"only {available} in `within`"):
            build(cls)(scores, (total - available - 1) / total, within)


@every_allocation
def test_within_may_follow_its_own_masks(cls):
    scores = {"a": torch.rand(6, 5), "b": torch.rand(4, 6), "c": torch.rand(3)}
    masks = build(cls)(scores, 0.2)
    for sparsity in (0.4, 0.6, 0.9):
        masks = build(cls)(scores, sparsity, masks)
        assert masks == build(cls)(scores, sparsity)


@every_schedule
def test_a_schedule_climbs_to_its_end(schedule):
    steps = range(schedule.last + 50)
    due = [step for step in steps if schedule.due(step)]
    assert {type(schedule.due(step)) for step in steps} == {bool}
    assert due
    levels = [schedule.sparsity(step) for step in steps]
    assert all(isinstance(s, float) and 0 <= s < 1 for s in levels)
    assert levels == sorted(levels)
    assert levels[due[-1]] == levels[-1] == schedule.final
    assert [schedule.sparsity(step) for step in steps] == levels


@pytest.mark.parametrize("cls", SCHEDULES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("final", [1.0, -0.1, True, "0.5", float("nan")])
def test_a_schedule_ends_at_a_sparsity(cls, final):
    with expect_refusal("sparsity in [0, 1)", f"found {final!r}"):
        build(cls, final=final)
