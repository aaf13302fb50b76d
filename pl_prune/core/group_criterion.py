"""The interface of a criterion of groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.probe import Probe
from pl_prune.core.types import check_choice

Members: TypeAlias = Literal["weights", "all"]


class GroupCriterion(ABC):
    """Score every unit of every group; higher = keep.

    A group criterion is a frozen dataclass whose fields are its hyper-parameters. It never sees a target, a rank or a mask.

    Attributes:
        needs_data: Whether a batch is needed.
        needs_loss: Whether the loss of the batches is needed.
    """

    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_choice(f"{type(self).__name__}.{name}", getattr(self, name), get_args(kind))

    @abstractmethod
    def __call__(self, probe: Probe, groups: ParameterGroups) -> GroupScores:
        """Score the units.

        Args:
            probe: The model, every parameter with an "out" slice and, where there is data, its loss.
            groups: The groups.

        Returns:
            (size,) by root.
        """


def out_names(groups: ParameterGroups, members: Members = "all") -> list[str]:
    """Name the parameters that produce the units of groups.

    Args:
        groups: The groups.
        members: "weights" for weights of layers alone, "all" for biases and norms too.

    Returns:
        Names of parameters with "out" slices.
    """
    names = dict.fromkeys(m.name for group in groups for m in group.members if m.kind == "out")
    return [name for name in names if members == "all" or len(groups.shapes[name]) > 1]


def narrowed(probe: Probe, names: Iterable[str]) -> Probe:
    """Return a probe of some of the parameters.

    Args:
        probe: A probe.
        names: Which of its parameters.

    Returns:
        A probe of the same model and data, which knows nothing yet.
    """
    params = {name: probe.params[name] for name in names}
    return Probe(probe.model, params, probe._loss, probe.batches, probe.track)
