"""Prune neural networks inside the training people already have.

Names are imported when they are first used; `import pl_prune` alone imports neither torch nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_prune.adversarial.attacks import PGD as PGD
    from pl_prune.adversarial.corruptions import corruption_accuracy as corruption_accuracy
    from pl_prune.adversarial.evaluate import robust_accuracy as robust_accuracy
    from pl_prune.adversarial.inputs import NormalizedModel as NormalizedModel
    from pl_prune.adversarial.losses import PGDAT as PGDAT
    from pl_prune.adversarial.losses import TRADES as TRADES
    from pl_prune.adversarial.losses import CrossEntropy as CrossEntropy
    from pl_prune.adversarial.losses import FastAT as FastAT
    from pl_prune.adversarial.losses import RobustLoss as RobustLoss
    from pl_prune.adversarial.scores import HARP as HARP
    from pl_prune.adversarial.scores import HYDRA as HYDRA
    from pl_prune.adversarial.scores import RLTH as RLTH
    from pl_prune.adversarial.scores import ScoreLearner as ScoreLearner
    from pl_prune.callbacks.adversarial import AdversarialTraining as AdversarialTraining
    from pl_prune.callbacks.awp import AWP as AWP
    from pl_prune.callbacks.bn_warmup import BatchNormWarmup as BatchNormWarmup
    from pl_prune.callbacks.channels import Channels as Channels
    from pl_prune.callbacks.dense import Dense as Dense
    from pl_prune.callbacks.gradual import GradualPruning as GradualPruning
    from pl_prune.callbacks.hesso import HESSO as HESSO
    from pl_prune.callbacks.panels import PredictionPanels as PredictionPanels
    from pl_prune.callbacks.prune_at_init import PruneAtInit as PruneAtInit
    from pl_prune.callbacks.record import RunRecord as RunRecord
    from pl_prune.callbacks.report import SparsityReport as SparsityReport
    from pl_prune.callbacks.robustness import RobustnessEvaluation as RobustnessEvaluation
    from pl_prune.callbacks.s2ap import S2AP as S2AP
    from pl_prune.callbacks.score_learning import ScoreLearning as ScoreLearning
    from pl_prune.callbacks.score_sharpness import ScoreSharpness as ScoreSharpness
    from pl_prune.callbacks.structured import StructuredPruning as StructuredPruning
    from pl_prune.cli import PruneCLI as PruneCLI
    from pl_prune.core.allocate import ERK as ERK
    from pl_prune.core.allocate import Allocation as Allocation
    from pl_prune.core.allocate import Global as Global
    from pl_prune.core.allocate import Layerwise as Layerwise
    from pl_prune.core.criterion import Criterion as Criterion
    from pl_prune.core.group_budget import select_units as select_units
    from pl_prune.core.group_criterion import GroupCriterion as GroupCriterion
    from pl_prune.core.groups import Group as Group
    from pl_prune.core.groups import ParameterGroups as ParameterGroups
    from pl_prune.core.masks import MaskSet as MaskSet
    from pl_prune.core.n_of_m import NofM as NofM
    from pl_prune.core.robust import Robust as Robust
    from pl_prune.core.samples import Samples as Samples
    from pl_prune.core.schedule import Cubic as Cubic
    from pl_prune.core.schedule import Exponential as Exponential
    from pl_prune.core.schedule import Linear as Linear
    from pl_prune.core.schedule import OneShot as OneShot
    from pl_prune.core.schedule import Schedule as Schedule
    from pl_prune.core.score import score as score
    from pl_prune.core.score_groups import score_groups as score_groups
    from pl_prune.core.select import Select as Select
    from pl_prune.core.smart_ratio import SmartRatio as SmartRatio
    from pl_prune.core.store import load_masks as load_masks
    from pl_prune.core.store import load_scores as load_scores
    from pl_prune.core.store import read_header as read_header
    from pl_prune.core.store import save_masks as save_masks
    from pl_prune.core.store import save_scores as save_scores
    from pl_prune.core.types import PruneError as PruneError
    from pl_prune.criteria.by_group import ByGroup as ByGroup
    from pl_prune.criteria.expander import BiRegular as BiRegular
    from pl_prune.criteria.expander import XNet as XNet
    from pl_prune.criteria.fisher import FisherDiagonal as FisherDiagonal
    from pl_prune.criteria.fisher import FisherPruning as FisherPruning
    from pl_prune.criteria.fisher import FisherTaylor as FisherTaylor
    from pl_prune.criteria.gauss_newton import GaussNewtonDiagonal as GaussNewtonDiagonal
    from pl_prune.criteria.gauss_newton import GaussNewtonPruning as GaussNewtonPruning
    from pl_prune.criteria.gauss_newton import GaussNewtonTaylor as GaussNewtonTaylor
    from pl_prune.criteria.geometric_median import GeometricMedian as GeometricMedian
    from pl_prune.criteria.gradient import SNIP as SNIP
    from pl_prune.criteria.gradient import GradNorm as GradNorm
    from pl_prune.criteria.grasp import GraSP as GraSP
    from pl_prune.criteria.hutchinson import HutchinsonDiagonal as HutchinsonDiagonal
    from pl_prune.criteria.hutchinson import HutchinsonPruning as HutchinsonPruning
    from pl_prune.criteria.hutchinson import HutchinsonTaylor as HutchinsonTaylor
    from pl_prune.criteria.iterative import FORCE as FORCE
    from pl_prune.criteria.iterative import IterSNIP as IterSNIP
    from pl_prune.criteria.magnitude import Magnitude as Magnitude
    from pl_prune.criteria.projective import PROscore as PROscore
    from pl_prune.criteria.random import Random as Random
    from pl_prune.criteria.synflow import SynFlow as SynFlow
    from pl_prune.criteria.taylor import Taylor as Taylor
    from pl_prune.criteria.yopo import YOPO as YOPO
    from pl_prune.optim.attach import attach_masks as attach_masks
    from pl_prune.optim.attach_hesso import attach_hesso as attach_hesso
    from pl_prune.optim.cric import CRIC as CRIC
    from pl_prune.optim.saliency import Saliency as Saliency
    from pl_prune.optim.zero_shot import cric as cric
    from pl_prune.runs.folder import RunFolder as RunFolder
    from pl_prune.structure.export import export as export
    from pl_prune.structure.manifest import load_shrunk as load_shrunk
    from pl_prune.structure.manifest import save_shrunk as save_shrunk
    from pl_prune.structure.shrink import shrink as shrink
    from pl_prune.structure.trace import trace_groups as trace_groups

__version__ = "0.1.0"

_HOMES = {
    "adversarial.attacks": ["PGD"],
    "adversarial.corruptions": ["corruption_accuracy"],
    "adversarial.evaluate": ["robust_accuracy"],
    "adversarial.inputs": ["NormalizedModel"],
    "adversarial.losses": ["CrossEntropy", "FastAT", "PGDAT", "RobustLoss", "TRADES"],
    "adversarial.scores": ["HARP", "HYDRA", "RLTH", "ScoreLearner"],
    "callbacks.adversarial": ["AdversarialTraining"],
    "callbacks.awp": ["AWP"],
    "callbacks.bn_warmup": ["BatchNormWarmup"],
    "callbacks.channels": ["Channels"],
    "callbacks.dense": ["Dense"],
    "callbacks.gradual": ["GradualPruning"],
    "callbacks.hesso": ["HESSO"],
    "callbacks.panels": ["PredictionPanels"],
    "callbacks.prune_at_init": ["PruneAtInit"],
    "callbacks.record": ["RunRecord"],
    "callbacks.report": ["SparsityReport"],
    "callbacks.robustness": ["RobustnessEvaluation"],
    "callbacks.s2ap": ["S2AP"],
    "callbacks.score_learning": ["ScoreLearning"],
    "callbacks.score_sharpness": ["ScoreSharpness"],
    "callbacks.structured": ["StructuredPruning"],
    "cli": ["PruneCLI"],
    "core.allocate": ["Allocation", "Global", "Layerwise", "ERK"],
    "core.criterion": ["Criterion"],
    "core.group_budget": ["select_units"],
    "core.group_criterion": ["GroupCriterion"],
    "core.groups": ["Group", "ParameterGroups"],
    "core.masks": ["MaskSet"],
    "core.n_of_m": ["NofM"],
    "core.robust": ["Robust"],
    "core.samples": ["Samples"],
    "core.schedule": ["Cubic", "Exponential", "Linear", "OneShot", "Schedule"],
    "core.score": ["score"],
    "core.score_groups": ["score_groups"],
    "core.select": ["Select"],
    "core.smart_ratio": ["SmartRatio"],
    "core.store": ["load_masks", "load_scores", "read_header", "save_masks", "save_scores"],
    "core.types": ["PruneError"],
    "criteria.by_group": ["ByGroup"],
    "criteria.expander": ["BiRegular", "XNet"],
    "criteria.fisher": ["FisherDiagonal", "FisherPruning", "FisherTaylor"],
    "criteria.gauss_newton": ["GaussNewtonDiagonal", "GaussNewtonPruning", "GaussNewtonTaylor"],
    "criteria.geometric_median": ["GeometricMedian"],
    "criteria.gradient": ["GradNorm", "SNIP"],
    "criteria.grasp": ["GraSP"],
    "criteria.hutchinson": ["HutchinsonDiagonal", "HutchinsonPruning", "HutchinsonTaylor"],
    "criteria.iterative": ["IterSNIP", "FORCE"],
    "criteria.magnitude": ["Magnitude"],
    "criteria.projective": ["PROscore"],
    "criteria.random": ["Random"],
    "criteria.synflow": ["SynFlow"],
    "criteria.taylor": ["Taylor"],
    "criteria.yopo": ["YOPO"],
    "optim.attach": ["attach_masks"],
    "optim.attach_hesso": ["attach_hesso"],
    "optim.cric": ["CRIC"],
    "optim.saliency": ["Saliency"],
    "optim.zero_shot": ["cric"],
    "runs.folder": ["RunFolder"],
    "structure.export": ["export"],
    "structure.manifest": ["load_shrunk", "save_shrunk"],
    "structure.shrink": ["shrink"],
    "structure.trace": ["trace_groups"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
