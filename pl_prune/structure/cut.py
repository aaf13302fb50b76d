"""Cuts as plain data: what to slice off a network, and doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pl_prune.core.groups import Group, ParameterGroups
from pl_prune.structure.attention import SlicedAttention

_HEADS = frozenset([
    "num_heads",
    "heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "num_key_value_heads",
    "num_kv_heads",
])
_INNER = frozenset(["all_head_size", "attn_dim", "inner_dim", "split_size"])  # of all heads together
_WIDTHS = _INNER | {"hidden_dim", "embed_dim", "hidden_size", "d_model", "width", "dim", "num_features"}
_WIDTHS |= {"embedding_dim", "channels"}


@dataclass
class Cuts:
    """What is left of a network, and how its modules are to be told.

    Args:
        positions: Kept positions by tensor name and dimension.
        attributes: New values of the modules' attributes, by module name.
        attentions: Names of the attention modules to replace by plain ones.
        biases: Names of the biases to add.
    """

    positions: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """Return what JSON can write."""
        plain = asdict(self)
        plain["positions"] = {n: {str(d): p for d, p in dims.items()} for n, dims in self.positions.items()}
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Cuts:
        """Rebuild cuts from `to_plain`."""
        positions = {n: {int(d): list(p) for d, p in dims.items()} for n, dims in plain["positions"].items()}
        return cls(positions, dict(plain["attributes"]), list(plain["attentions"]), list(plain["biases"]))

    def after(self, first: Cuts) -> Cuts:
        """Return these cuts and those that were made before as one."""
        joined = {n: dict(dims) for n, dims in first.positions.items()}
        for name, dims in self.positions.items():
            for dim, kept in dims.items():
                old = joined.setdefault(name, {}).get(dim)
                joined[name][dim] = kept if old is None else [old[i] for i in kept]
        attributes = {n: dict(a) for n, a in first.attributes.items()}
        for name, values in self.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Cuts(
            joined,
            attributes,
            list(dict.fromkeys(first.attentions + self.attentions)),
            list(dict.fromkeys(first.biases + self.biases)),
        )


def plan(model: nn.Module, groups: ParameterGroups, keep: Mapping[str, Tensor]) -> Cuts:
    """Say what the removal of units means for tensors and modules.

    Args:
        model: The whole network.
        groups: Its groups.
        keep: Which units stay, by root.

    Returns:
        The cuts.
    """
    cuts = Cuts({
        name: {dim: kept.tolist() for dim, kept in dims.items()} for name, dims in groups.positions(keep).items()
    })
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and any(
            owner(n) in (name, f"{name}.out_proj") for n in cuts.positions
        ):
            cuts.attentions.append(name)
    for root, kept in keep.items():
        if not bool(kept.all()):
            for name, values in _of_ancestors(modules, groups[root], int(kept.sum())).items():
                cuts.attributes.setdefault(name, {}).update(values)
    names = {
        id(t): n for n, t in [*model.named_buffers(), *model.named_parameters()]
    }  # a tied tensor has its first name
    for name, module in modules.items():
        shapes = {}
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                shapes[key] = list(tensor.shape)
                for dim, positions in cuts.positions.get(names[id(tensor)], {}).items():
                    shapes[key][dim] = len(positions)
        if values := _of_module(module, shapes):
            cuts.attributes.setdefault(name, {}).update(values)
    return cuts


def apply(model: nn.Module, cuts: Cuts) -> None:
    """Slice a network in place.

    Args:
        model: The whole network; parameters that lose something become new objects.
        cuts: What is left.
    """
    for name in cuts.attentions:
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlicedAttention.of(module))
    for name in cuts.biases:
        module = model.get_submodule(owner(name))
        if module.bias is None:
            weight = module.weight
            count = weight.shape[1] * module.groups if isinstance(module, _ConvTransposeNd) else weight.shape[0]  # type: ignore[union-attr, index, operator]
            zeros = torch.zeros(count, dtype=weight.dtype, device=weight.device)  # type: ignore[arg-type]
            module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)  # type: ignore[union-attr, arg-type]
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    replace(model, {name: _sliced(tensors[name], dims) for name, dims in cuts.positions.items()})
    for name, values in cuts.attributes.items():
        module = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, tuple(value) if isinstance(value, list) else value)


def owner(name: str) -> str:
    """Return the name of the module that holds a tensor.

    Args:
        name: Of the tensor.

    Returns:
        The module's name, "" for the model itself.
    """
    return name.rpartition(".")[0]


def replace(model: nn.Module, news: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of others, wherever modules hold those.

    Args:
        model: The network.
        news: What takes the place of its parameters and buffers, by their names.
    """
    tensors, places = {**dict(model.named_buffers()), **dict(model.named_parameters())}, _places(model)
    for name, new in news.items():
        for own, key in places[id(tensors[name])]:
            own[key] = new


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Find which modules hold a tensor; several do where it is tied."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                places.setdefault(id(tensor), []).append((own, key))
    return places


def _sliced(old: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    new = old.detach()
    for dim, kept in dims.items():
        new = new.index_select(dim, torch.tensor(kept, dtype=torch.int64, device=new.device))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.ndim)
    if layout is not None and not old.is_contiguous() and old.is_contiguous(memory_format=layout):
        new = new.contiguous(memory_format=layout)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _of_module(module: nn.Module, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the attributes of a module that have to change for its tensors to have these shapes."""
    weight = shapes.get("weight")
    values: dict[str, Any] = {}
    if isinstance(module, _ConvNd) and weight is not None:
        transposed = isinstance(module, _ConvTransposeNd)
        count, depthwise = module.groups, module.groups > 1 and module.groups == module.in_channels
        if depthwise:
            count = weight[0] if transposed else weight[0] * module.groups // module.out_channels
        inner, outer = (weight[0], weight[1] * count) if transposed else (weight[1] * count, weight[0])
        values = {"groups": count, "in_channels": inner, "out_channels": outer}
    elif isinstance(module, nn.Linear) and weight is not None:
        values = {"in_features": weight[1], "out_features": weight[0]}
    elif isinstance(module, _NormBase):
        sizes = [shapes[n][0] for n in ("weight", "running_mean") if n in shapes]
        values = {"num_features": sizes[0]} if sizes else {}
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        values = {"num_channels": weight[0], "num_groups": weight[0] * module.num_groups // module.num_channels}
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        values = {"normalized_shape": list(weight)}
    elif isinstance(module, nn.Embedding) and weight is not None:
        values = {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    elif isinstance(module, nn.PReLU) and weight is not None:
        values = {"num_parameters": weight[0]}
    elif type(module).__name__ == "Conv1D" and weight is not None:  # of transformers: a Linear, transposed
        values = {"nx": weight[0], "nf": weight[1]}
    elif not isinstance(module, (nn.MultiheadAttention, SlicedAttention)):
        pairs = {(a, b) for n, shape in shapes.items() for a, b in zip(getattr(module, n).shape, shape, strict=True)}
        changed = {a: b for a, b in pairs if a != b and sum(first == a for first, _ in pairs) == 1}
        values = {k: changed[v] for k, v in vars(module).items() if type(v) is int and v in changed}
    return {
        key: value
        for key, value in values.items()
        if (list(getattr(module, key)) if isinstance(value, list) else getattr(module, key)) != value
    }


def _of_ancestors(modules: Mapping[str, nn.Module], group: Group, kept: int) -> dict[str, dict[str, int]]:
    """Return numbers of heads and widths that the modules around a group's layers keep as attributes."""
    outs = [m for m in group.members if m.kind == "out"]
    paths = [owner(m.name).split(".") for m in outs]
    common = 0
    while all(len(p) > common for p in paths) and len({p[common] for p in paths}) == 1:
        common += 1
    if any(len(p) == common for p in paths) and not isinstance(
        modules[".".join(paths[0][:common])], nn.MultiheadAttention
    ):
        common = max(common - 1, 0)
    widths = {group.size * m.index.shape[1]: kept * m.index.shape[1] for m in group.members if m.kind != "stat"}
    heads = any(m.index.shape[1] > 1 for m in outs)
    found: dict[str, dict[str, int]] = {}
    for path in paths:
        for depth in range(common, len(path) + 1):
            name = ".".join(path[:depth])
            for key, value in vars(modules[name]).items():
                if not isinstance(value, int) or isinstance(value, bool):
                    continue
                if heads and key in _HEADS and value % group.size == 0:
                    found.setdefault(name, {})[key] = value // group.size * kept
                elif key in (_INNER if heads else _WIDTHS) and value in widths:
                    found.setdefault(name, {})[key] = widths[value]
    return found
