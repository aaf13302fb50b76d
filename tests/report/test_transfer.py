from __future__ import annotations

from statistics import mean

import pytest

from pl_prune.report.transfer import Training, transfer_cells, transfer_content, transfer_rows, worst
from pl_prune.report.transfer_picture import transfer_picture


def trainings(criterion, dataset, sparsity, risks, same=False):
    """Make trainings of known risks: seed -> own, reused, again, cross."""
    return [
        Training(criterion, dataset, sparsity, seed, arm, risk, "m" if same else arm)
        for seed, four in risks.items()
        for arm, risk in zip(("own", "reused", "again", "cross"), four, strict=True)
    ]


RUNS = [
    *trainings("SNIP", "C100", 0.9, {1: (30.0, 32.0, 30.5, 33.0), 2: (31.0, 31.5, 30.0, 31.0)}),
    *trainings("YOPO", "C100", 0.9, {1: (29.0, 29.0, 29.5, 29.0), 2: (28.0, 28.0, 28.5, 29.0)}, same=True),
    *trainings("YOPO", "C100", 0.95, {1: (40.0, 40.0, 41.0, 45.0)}, same=True),
]


def test_indices_are_the_differences_of_the_definitions():
    snip, yopo, high = transfer_cells(RUNS)
    assert snip.dti == [32.0 - 30.0, 31.5 - 31.0]
    assert snip.i3 == [30.0 - 33.0, 31.0 - 31.0]
    assert snip.floor == [0.5, -1.0]
    assert snip.noise() == pytest.approx(((0.5**2 + 1.0) / 2) ** 0.5)
    assert snip.risk == 30.5
    assert not snip.same_masks
    assert yopo.dti == [0.0, 0.0]
    assert yopo.same_masks
    assert (high.sparsity, high.seeds, high.i3) == (0.95, [1], [-5.0])


def test_a_seed_without_all_four_trainings_is_left_out():
    (cell,) = transfer_cells(RUNS[:7])
    assert cell.seeds == [1]
    assert transfer_cells(RUNS[:3]) == []


def test_the_worst_index_keeps_its_sign():
    cells = transfer_cells(RUNS)
    assert worst(cells, lambda cell: cell.i3) == {"SNIP": mean([-3.0, 0.0]), "YOPO": -5.0}


def test_an_index_that_is_not_a_number_is_the_worst_wherever_it_stands():
    odd = trainings("YOPO", "C10", 0.9, {1: (float("nan"), 1.0, 1.0, 1.0)})
    for runs in ([*odd, *RUNS], [*RUNS, *odd]):
        found = worst(transfer_cells(runs), lambda cell: cell.i3)
        assert found["YOPO"] != found["YOPO"]
        assert found["SNIP"] == -1.5


def test_the_table_says_which_masks_are_the_same():
    rows = transfer_rows(transfer_cells(RUNS))
    assert rows[0][-3:] == ["DTI", "I3", "noise"]
    assert {len(row) for row in rows} == {8}
    assert [row[5].endswith("=") for row in rows[1:]] == [False, True, True]
    assert rows[3][3:7] == ["1", "40.00", "+0.00 =", "-5.00"]


def test_plain_data_hold_every_value():
    told = transfer_content(transfer_cells(RUNS))
    assert told["cells"][0]["dti"] == [2.0, 0.5]
    assert told["worst_dti"] == {"SNIP": 1.25, "YOPO": 0.0}


def test_the_picture_names_criteria_and_data():
    picture = transfer_picture(transfer_cells(RUNS))
    assert picture.png.startswith(b"\x89PNG")
    for word in ("SNIP", "YOPO", "C100, 0.95", "DTI"):
        assert word in picture.svg
