"""Prune neural networks inside the training people already have.

Names are imported when they are first used; `import pl_prune` alone imports neither torch nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_prune.callbacks.bn_warmup import BatchNormWarmup as BatchNormWarmup
    from pl_prune.callbacks.dense import Dense as Dense
    from pl_prune.callbacks.gradual import GradualPruning as GradualPruning
    from pl_prune.callbacks.prune_at_init import PruneAtInit as PruneAtInit
    from pl_prune.callbacks.record import RunRecord as RunRecord
    from pl_prune.callbacks.report import SparsityReport as SparsityReport
    from pl_prune.cli import PruneCLI as PruneCLI
    from pl_prune.core.allocate import ERK as ERK
    from pl_prune.core.allocate import Allocation as Allocation
    from pl_prune.core.allocate import Global as Global
    from pl_prune.core.allocate import Layerwise as Layerwise
    from pl_prune.core.criterion import Criterion as Criterion
    from pl_prune.core.masks import MaskSet as MaskSet
    from pl_prune.core.samples import Samples as Samples
    from pl_prune.core.schedule import Cubic as Cubic
    from pl_prune.core.schedule import Exponential as Exponential
    from pl_prune.core.schedule import Linear as Linear
    from pl_prune.core.schedule import OneShot as OneShot
    from pl_prune.core.schedule import Schedule as Schedule
    from pl_prune.core.score import score as score
    from pl_prune.core.select import Select as Select
    from pl_prune.core.types import PruneError as PruneError
    from pl_prune.criteria.fisher import FisherDiagonal as FisherDiagonal
    from pl_prune.criteria.fisher import FisherPruning as FisherPruning
    from pl_prune.criteria.fisher import FisherTaylor as FisherTaylor
    from pl_prune.criteria.gauss_newton import GaussNewtonDiagonal as GaussNewtonDiagonal
    from pl_prune.criteria.gauss_newton import GaussNewtonPruning as GaussNewtonPruning
    from pl_prune.criteria.gauss_newton import GaussNewtonTaylor as GaussNewtonTaylor
    from pl_prune.criteria.gradient import SNIP as SNIP
    from pl_prune.criteria.gradient import GradNorm as GradNorm
    from pl_prune.criteria.grasp import GraSP as GraSP
    from pl_prune.criteria.hutchinson import HutchinsonDiagonal as HutchinsonDiagonal
    from pl_prune.criteria.hutchinson import HutchinsonPruning as HutchinsonPruning
    from pl_prune.criteria.hutchinson import HutchinsonTaylor as HutchinsonTaylor
    from pl_prune.criteria.magnitude import Magnitude as Magnitude
    from pl_prune.criteria.random import Random as Random
    from pl_prune.criteria.synflow import SynFlow as SynFlow
    from pl_prune.optim.attach import attach_masks as attach_masks
    from pl_prune.runs.folder import RunFolder as RunFolder

__version__ = "0.1.0"

_HOMES = {
    "callbacks.bn_warmup": ["BatchNormWarmup"],
    "callbacks.dense": ["Dense"],
    "callbacks.gradual": ["GradualPruning"],
    "callbacks.prune_at_init": ["PruneAtInit"],
    "callbacks.record": ["RunRecord"],
    "callbacks.report": ["SparsityReport"],
    "cli": ["PruneCLI"],
    "core.allocate": ["Allocation", "Global", "Layerwise", "ERK"],
    "core.criterion": ["Criterion"],
    "core.masks": ["MaskSet"],
    "core.samples": ["Samples"],
    "core.schedule": ["Cubic", "Exponential", "Linear", "OneShot", "Schedule"],
    "core.score": ["score"],
    "core.select": ["Select"],
    "core.types": ["PruneError"],
    "criteria.fisher": ["FisherDiagonal", "FisherPruning", "FisherTaylor"],
    "criteria.gauss_newton": ["GaussNewtonDiagonal", "GaussNewtonPruning", "GaussNewtonTaylor"],
    "criteria.gradient": ["GradNorm", "SNIP"],
    "criteria.grasp": ["GraSP"],
    "criteria.hutchinson": ["HutchinsonDiagonal", "HutchinsonPruning", "HutchinsonTaylor"],
    "criteria.magnitude": ["Magnitude"],
    "criteria.random": ["Random"],
    "criteria.synflow": ["SynFlow"],
    "optim.attach": ["attach_masks"],
    "runs.folder": ["RunFolder"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
