"""Cut a LightningModule in place, before anything is built on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError
from pl_prune.structure.cut import Cuts, apply
from pl_prune.structure.manifest import CUTS, note_cuts


class _Whole:
    """What a module is before it is cut.

    Args:
        model: The module.
        cuts: What will be sliced off.
    """

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        self._places = [
            (place, dict(place)) for m in model.modules() for place in (m._parameters, m._buffers, m._modules)
        ]
        named = {name: model.get_submodule(name) for name in cuts.attributes}
        self._attributes = [
            (module, {k: getattr(module, k) for k in cuts.attributes[name]}) for name, module in named.items()
        ]

    def back(self) -> None:
        """Make the module so again."""
        for place, before in self._places:
            place.update(before)
        for module, attributes in self._attributes:
            for key, value in attributes.items():
                setattr(module, key, value)


@contextmanager
def cut_for_now(model: nn.Module, cuts: Cuts) -> Iterator[None]:
    """Run the body with a module that holds copies of what is left of its tensors; optimizers and DDP know nothing of it.

    Args:
        model: The whole module.
        cuts: What is left.

    Yields:
        None.
    """
    whole = _Whole(model, cuts)
    try:
        apply(model, cuts)
        yield
    finally:
        whole.back()


class CutModule:
    """A module whose units have been sliced off, and the way back.

    Parameter objects stay: their data are replaced, so that an optimizer built on them goes on to step them.

    Args:
        model: The whole module.
        cuts: What is left; nothing is changed if it cannot be applied.
        buffers: Tensors of it, each with the values that it had before this began.
    """

    def __init__(self, model: nn.Module, cuts: Cuts, buffers: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._parameters = {name: (p, p.data) for name, p in model.named_parameters()}
        self._whole = _Whole(model, cuts)
        self._buffers = list(buffers)
        self._model, self._noted = model, vars(model).get(CUTS)
        try:
            note_cuts(model, model, cuts)
            apply(model, cuts)
            for name, p in list(model.named_parameters(remove_duplicate=False)):
                old = self._parameters.get(name, (p, None))[0]
                if old is not p:
                    _set(old, p.data)
                    parent, _, key = name.rpartition(".")
                    model.get_submodule(parent)._parameters[key] = old
        except BaseException:
            self.undo()
            raise

        self._names = [name for name, _ in model.named_parameters()]

    def check_names(self, model: nn.Module) -> None:
        """Raise if layers were built since the module was cut.

        Args:
            model: The module.

        Raises:
            PruneError: If it has other parameters now.
        """
        if odd := sorted({name for name, _ in model.named_parameters()} ^ set(self._names))[:4]:
            raise PruneError(
                f"Expected the layers of {type(model).__name__} to be there in `setup`, to be cut; found others since: {odd}. "
                "Build them in __init__, or set shrink=False."
            )

    @torch.no_grad()
    def undo(self) -> None:
        """Make the module whole again, with the weights and statistics that it had."""
        self._whole.back()
        vars(self._model).pop(CUTS, None)
        if self._noted is not None:
            vars(self._model)[CUTS] = self._noted
        for p, data in self._parameters.values():
            if p.data is not data:
                _set(p, data)
        for tensor, value in self._buffers:
            tensor.copy_(value)


def _set(p: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; another type in between makes autograd forget the old shape."""
    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, device=p.device)
    p.data, p.grad = data, None


@torch.no_grad()
def slice_states(optimizers: Iterable[Optimizer], model: nn.Module, cuts: Cuts) -> None:
    """Slice what optimizers built on the whole module keep by parameter from their construction on (Adagrad's sums).

    Args:
        optimizers: The optimizers.
        model: The sliced module.
        cuts: What is left.
    """
    live = dict(model.named_parameters())
    for optimizer in optimizers:
        for name, dims in cuts.positions.items():
            state = optimizer.state.get(live[name], {}) if name in live else {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != live[name].shape:
                    for dim, kept in dims.items():
                        value = value.index_select(dim, torch.tensor(kept, device=value.device))
                    state[key] = value


def kept_units(groups: ParameterGroups, cuts: Cuts) -> MaskSet:
    """Say which units cuts leave.

    Args:
        groups: The groups of the whole network.
        cuts: What is left of it.

    Returns:
        (size,) of bool by root.
    """
    keep = {}
    for group in groups:
        member = next(m for m in group.members if m.kind == "out")
        size = groups.shapes[member.name][member.dim]
        here = torch.zeros(size, dtype=torch.bool)
        here[torch.tensor(cuts.positions.get(member.name, {}).get(member.dim, range(size)), dtype=torch.int64)] = True
        keep[group.root] = here[member.index].all(1)
    return MaskSet(keep)


def check_optimized(optimizers: Iterable[Optimizer], model: nn.Module, cuts: Cuts) -> None:
    """Raise unless every sliced parameter that learns is in an optimizer.

    Args:
        optimizers: The optimizers.
        model: The sliced module.
        cuts: What is left.

    Raises:
        PruneError: If one is not.
    """
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = [n for n, p in model.named_parameters() if n in cuts.positions and p.requires_grad and id(p) not in stepped]
    if lost:
        raise PruneError(
            f"Expected every sliced parameter in an optimizer; found {len(lost)} in none ({', '.join(lost[:4])}). "
            "Let configure_optimizers take the parameters of the module as it is then, or freeze these layers."
        )


def refuse_cut(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Raise where a module cannot be cut in `setup`.

    Args:
        trainer: A trainer about to fit.
        pl_module: Its module.
        callback: Who wants to cut it.

    Raises:
        PruneError: If processes are spawned, layers are built later, another callback cuts too, or something has copied the
            module already.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise PruneError(
            f"Expected processes that keep the smaller network; found {type(trainer.strategy.launcher).__name__}, which spawns or "
            "forks them and returns weights of the whole one. Train with strategy='ddp', or set shrink=False."
        )
    for hook in ("configure_model", "configure_sharded_model"):
        if is_overridden(hook, pl_module):
            raise PruneError(
                f"Expected the layers of {type(pl_module).__name__} to be there in `setup`; found {hook}, which builds them later. "
                "Build them in __init__, or set shrink=False."
            )
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    if [other for other in callbacks if isinstance(other, type(callback)) and other.shrink][1:]:  # type: ignore[attr-defined]
        raise PruneError(
            f"Expected one {type(callback).__name__} that cuts the network; found several. Name the shares of layers by `ratios` of one."
        )
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(getattr(other, "_average_model", None), nn.Module):
            raise PruneError(
                f"Expected the network to be cut before it is copied; found that {type(other).__name__} comes first. "
                f"Put {type(callback).__name__} before it in the list of callbacks."
            )


def saved_cuts(trainer: Trainer, state_key: str) -> tuple[ParameterGroups, Cuts] | None:
    """Read what the network of a checkpoint that is about to be loaded has lost.

    Args:
        trainer: A trainer that loads one.
        state_key: Whose state says so.

    Returns:
        The groups of the whole network and its cuts; None where the checkpoint holds none.
    """
    checkpoint: Mapping[str, Any] = trainer._checkpoint_connector._loaded_checkpoint
    state = (checkpoint.get("callbacks") or {}).get(state_key) or {}
    return (
        (ParameterGroups.from_state_dict(state["groups"]), Cuts.from_plain(state["cuts"])) if "cuts" in state else None
    )


def check_whole(trainer: Trainer, pl_module: LightningModule, groups: ParameterGroups) -> None:
    """Raise unless a module is what that of a checkpoint was before it was cut.

    Args:
        trainer: A trainer that loads the checkpoint.
        pl_module: The module.
        groups: The groups of the whole network there.

    Raises:
        PruneError: If a parameter is missing or has another shape.
    """
    here = {name: tuple(t.shape) for name, t in [*pl_module.named_buffers(), *pl_module.named_parameters()]}
    odd = [f"{n} is {here.get(n, 'missing')} here, {s} there" for n, s in groups.shapes.items() if here.get(n) != s]
    if odd:
        raise PruneError(
            f"Expected the {type(pl_module).__name__} whose units were sliced off in the run of {str(trainer.ckpt_path)!r}; found "
            f"another: {'; '.join(odd[:3])}. Build the module with the same arguments as there."
        )


def refuse_foreign(trainer: Trainer, state_key: str) -> None:
    """Raise because a checkpoint of another network is about to be loaded into one that has been cut and trained.

    Args:
        trainer: The trainer.
        state_key: Whose cuts differ.

    Raises:
        PruneError: Always.
    """
    raise PruneError(
        f"Expected a checkpoint of the network that {state_key!r} has cut here; found another in {str(trainer.ckpt_path)!r}. "
        "Load it into a module built anew."
    )
