from __future__ import annotations

import pytest
from refusal import expect_refusal

import pl_prune as plp


@pytest.mark.parametrize("start", [0, 1, 7])
def test_one_shot_changes_once(start):
    schedule = plp.OneShot(final=0.9, start=start)
    assert [schedule.sparsity(step) for step in range(12)] == [0.0] * start + [0.9] * (12 - start)
    assert [step for step in range(12) if schedule.due(step)] == [start]


def test_start_before_training():
    with expect_refusal("start of 0 or more", "found -1"):
        plp.OneShot(0.5, start=-1)


def test_the_interface_cannot_be_used_by_itself():
    with pytest.raises(TypeError, match="abstract"):
        plp.Schedule()
