"""`benchmarks/beside_model_pruning.py`: pl_prune's side of each case holds, and every case has an answer for both tools."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:Swapping scheduler",  # StochasticWeightAveraging
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "beside_model_pruning.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script: ModuleType) -> dict[str, dict[str, dict[str, Any]]]:
    return script.measure_all()


HOLDS = {
    "zeros after `fit(ckpt_path=...)`": {"in the checkpoint": 0.5, "after the resume": 0.5, "without a resume": 0.5},
    "strict load of the checkpoint into the plain module": {"": "loads"},
    "zeros of the final model under `EMAWeightAveraging`": {"pruner first": 0.5, "average first": 0.5},
    "zeros of the final model under `StochasticWeightAveraging`": {"pruner first": 0.5, "average first": 0.5},
    "the module's own buffer `attention_mask`": {"in the module": "unchanged", "in the checkpoint": "unchanged"},
    "zeros after 3 epochs of pruning, 0.5 asked for": {"": 0.5},
    "zeros among the biases": {"at first": 0.0, "at the end": 0.0},
    "entries that are zero on one of two DDP ranks alone": {
        "random (one seed)": 0.0,
        "random (a seed per rank)": 0.0,
        "magnitude (a seed per rank)": 0.0,
        "SNIP (a seed per rank)": 0.0,
    },
}


@pytest.mark.parametrize("case", HOLDS)
def test_pl_prune_holds(script, found, case):
    assert found[case][script.OURS] == HOLDS[case]


def test_the_table_has_a_row_for_every_case_and_an_answer_for_both_tools(script, found):
    assert list(found) == list(HOLDS)
    header, rule, *rows = script.table(found)
    assert rule == "| --- | --- | --- |"
    assert len(rows) == 8
    for row in (header, *rows):
        assert all(cell.strip() for cell in row.strip("|").split(" | "))
        assert row.replace("\\|", "").count("|") == 4


def test_a_failure_is_reported_in_one_cell(script):
    def fail(make, folder):
        raise KeyError("a|b\nc")

    found = script.by_setting(fail, {"as is": None})
    assert found == {"(as is)": r"KeyError: 'a|b\nc'"}
    assert script.cell(found) == r"(as is): KeyError: 'a\|b\nc'"
