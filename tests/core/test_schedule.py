from __future__ import annotations

import itertools

import pytest
from refusal import expect_refusal

import pl_prune as plp


@pytest.mark.parametrize("start", [0, 1, 7])
def test_one_shot_changes_once(start):
    schedule = plp.OneShot(final=0.9, start=start)
    assert [schedule.sparsity(step) for step in range(12)] == [0.0] * start + [0.9] * (12 - start)
    assert [step for step in range(12) if schedule.due(step)] == [start]


def test_start_before_training():
    for start in (-1, 0.5, True):
        with expect_refusal("schedule.start", "0 or more", f"found {start}"):
            plp.OneShot(0.5, start=start)


@pytest.mark.parametrize(
    ("cls", "between"),
    [
        (plp.Cubic, lambda p: 0.9 + (0.1 - 0.9) * (1 - p) ** 3),
        (plp.Linear, lambda p: 0.1 + 0.8 * p),
        (plp.Exponential, lambda p: 1 - 0.9 * (0.1 / 0.9) ** p),
    ],
)
def test_gradual_schedules_follow_their_formulas(cls, between):
    schedule = cls(final=0.9, start=10, end=75, every=20, initial=0.1)
    assert [step for step in range(200) if schedule.due(step)] == [10, 30, 50, 70, 75]
    for step in range(200):
        changed = max((s for s in (10, 30, 50, 70) if s <= step), default=None)
        expected = 0.9 if step >= 75 else 0.0 if changed is None else between((changed - 10) / 65)
        assert schedule.sparsity(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.sparsity(75) == 0.9


def test_exponential_rounds_prune_the_same_fraction_of_what_is_left():
    schedule = plp.Exponential(final=1 - 0.8**5, end=50, every=10)
    left = [1 - schedule.sparsity(step) for step in range(0, 51, 10)]
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([0.8] * 5)


def test_the_interface_cannot_be_used_by_itself():
    with pytest.raises(TypeError, match="abstract"):
        plp.Schedule()
