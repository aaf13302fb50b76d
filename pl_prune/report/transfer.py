"""Whether masks move: from data set to data set, and from one initialisation to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from statistics import mean
from typing import Any, Literal

from pl_prune.report.words import spread

Arm = Literal["own", "reused", "again", "cross"]


@dataclass(frozen=True)
class Training:
    """One training of a pruned network, for the indices of transfer.

    Args:
        criterion: What scored.
        dataset: What was trained on.
        sparsity: Of the mask.
        seed: Of the initial weights and, but for `cross`, of the weights that were scored.
        arm: "own": the mask was made on this data set from these weights; "reused": made on the source data set from these
            weights; "again": as "own", with another order of the batches; "cross": the mask of `seed`, made on this
            data set, on the weights of another seed.
        risk: 100 minus the accuracy in percent, or a loss.
        masks: Digest of the mask.
    """

    criterion: str
    dataset: str
    sparsity: float
    seed: int
    arm: Arm
    risk: float
    masks: str = ""


@dataclass(frozen=True)
class TransferCell:
    """The indices of one criterion on one data set at one sparsity; risks are means over seeds.

    Args:
        criterion: What scored.
        dataset: The target.
        sparsity: Of the masks.
        seeds: Those that every arm has.
        risk: Of the data set's own masks.
        dti: Dataset-Transfer Index, a value for each seed: risk with the source's mask minus risk with the own one.
        i3: Initialization-Independence Index, a value for each seed: risk of its own mask on its own weights minus risk of the
            same mask on another seed's weights.
        floor: Noise of training, a value for each seed: risk of the own mask with another order of batches minus that
            with the first order. Indices of this size say nothing.
        same_masks: Whether the source's masks are the own ones, so that the DTI is 0 by construction.
    """

    criterion: str
    dataset: str
    sparsity: float
    seeds: list[int]
    risk: float
    dti: list[float]
    i3: list[float]
    floor: list[float]
    same_masks: bool

    def noise(self) -> float:
        """Return the spread of a difference of two trainings that differ by the order of their batches alone.

        Returns:
            Root of the mean square of `floor`.
        """
        return float(mean(x * x for x in self.floor) ** 0.5)


def risk(metric: float, direction: str) -> float:
    """Turn a metric into a risk.

    Args:
        metric: An accuracy in [0, 1] where it is maximised, else a loss.
        direction: "maximize" or "minimize".

    Returns:
        The error in percent, or the loss.
    """
    return 100 * (1 - metric) if direction == "maximize" else metric


def transfer_cells(trainings: Sequence[Training]) -> list[TransferCell]:
    """Compute the Dataset-Transfer Index and the Initialization-Independence Index.

    Args:
        trainings: Any number; a cell needs its four arms of every seed, and seeds without all four are left out.

    Returns:
        Cells in the order in which their first trainings come; none without a complete seed.

    Source:
        Definitions 1 and 2 of YOPO's paper. Divergences: every index is a difference of two real trainings (the paper's Table 4
        takes the mean accuracy of other seeds for the accuracy on another seed's weights); the mask of a seed is put on
        the next seed's weights, so that every mask and all weights count once; and the noise of training stands beside
        them, without which an index near 0 cannot be told from one that is 0 by construction.

    >>> arms = {"own": 6.0, "reused": 6.5, "again": 6.1, "cross": 6.3}
    >>> runs = [Training("SNIP", "C100", 0.9, 0, arm, risk) for arm, risk in arms.items()]
    >>> (cell,) = transfer_cells(runs)
    >>> [round(x, 3) for x in (*cell.dti, *cell.i3, *cell.floor)]
    [0.5, -0.3, 0.1]
    """
    groups: dict[tuple[str, str, float], dict[int, dict[str, Training]]] = {}
    for one in trainings:
        groups.setdefault((one.criterion, one.dataset, one.sparsity), {}).setdefault(one.seed, {})[one.arm] = one
    cells = []
    for (criterion, dataset, sparsity), seeds in groups.items():
        whole = {seed: arms for seed, arms in sorted(seeds.items()) if len(arms) == 4}
        if not whole:
            continue

        def minus(first: str, second: str, whole: dict[int, dict[str, Training]] = whole) -> list[float]:
            return [arms[first].risk - arms[second].risk for arms in whole.values()]

        cells.append(
            TransferCell(
                criterion,
                dataset,
                sparsity,
                list(whole),
                risk=mean(arms["own"].risk for arms in whole.values()),
                dti=minus("reused", "own"),
                i3=minus("own", "cross"),
                floor=minus("again", "own"),
                same_masks=all(a["own"].masks == a["reused"].masks != "" for a in whole.values()),
            )
        )
    return cells


def worst(cells: Sequence[TransferCell], index: Callable[[TransferCell], list[float]]) -> dict[str, float]:
    """Return the largest mean of an index, by size, for each criterion.

    Args:
        cells: The cells.
        index: Takes the values of a cell.

    Returns:
        Criterion -> the value of the largest size over data sets and sparsities, with its sign; NaN where one is.
    """
    found: dict[str, float] = {}
    for cell in cells:
        value = mean(index(cell))
        if cell.criterion not in found or isnan(value) or abs(value) > abs(found[cell.criterion]):
            found[cell.criterion] = value
    return found


def transfer_rows(cells: Sequence[TransferCell]) -> list[list[str]]:
    """Lay the indices out as a table.

    Args:
        cells: The cells.

    Returns:
        A head, then a row for each cell; `=` stands where source and target masks are the same.
    """
    rows = [["criterion", "data", "sparsity", "seeds", "risk", "DTI", "I3", "noise"]]
    rows += [
        [
            cell.criterion,
            cell.dataset,
            f"{cell.sparsity:g}",
            str(len(cell.seeds)),
            f"{cell.risk:.2f}",
            _spread(cell.dti) + (" =" if cell.same_masks else ""),
            _spread(cell.i3),
            f"{cell.noise():.2f}",
        ]
        for cell in cells
    ]
    return rows


def transfer_content(cells: Sequence[TransferCell]) -> dict[str, Any]:
    """Return the indices as plain data.

    Args:
        cells: The cells.

    Returns:
        The cells, and the worst DTI and I3 of each criterion.
    """
    return {
        "cells": [{**asdict(cell), "noise": cell.noise()} for cell in cells],
        "worst_dti": worst(cells, lambda cell: cell.dti),
        "worst_i3": worst(cells, lambda cell: cell.i3),
    }


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):+.2f}" + (f" ± {spread(values):.2f}" if len(values) > 1 else "")
