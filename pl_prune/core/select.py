"""`Select`: which parameters are prunable."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_prune.core.types import Params, PruneError, plain

_TYPES: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.MultiheadAttention,
    )
}
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Select:
    """Choose the prunable parameters by module type: weights of linear, convolution and attention layers.

    Norms, biases and embeddings are never prunable; frozen parameters are passed over unless asked for, and so are
    LoRA adapters; a tied tensor appears once, under its first name, and not at all if it is also that of an embedding, a
    norm, an excluded or the output layer. Patterns are matched without the `_orig_mod.` of compiled modules.

    Args:
        include: Shell patterns (`fnmatch`) on parameter or module names; None means all.
        exclude: Shell patterns of what to leave dense.
        types: Class names, among Linear, Conv1d to Conv3d, ConvTranspose1d to 3d and MultiheadAttention; subclasses
            count.
        output_layer: Whether the output layer (the last Linear or Conv executed) is prunable.
        first_layer: Whether the first Linear or Conv executed is prunable.
        frozen: Whether parameters that do not train (requires_grad=False) are prunable: those of a backbone that
            thaws later, say.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> list(Select()(model)), list(Select(output_layer=True)(model))
    (['0.weight'], ['0.weight', '2.weight'])
    """

    include: list[str] | None = None
    exclude: list[str] | None = None
    types: tuple[str, ...] = tuple(_TYPES)
    output_layer: bool = False
    first_layer: bool = True
    frozen: bool = False

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "types"):
            if isinstance(getattr(self, field), str):
                raise PruneError(
                    f"Expected {field} to be a list of names; found the string {getattr(self, field)!r}. Put it in a list."
                )
        for kind in self.types:
            if kind not in _TYPES:
                raise PruneError(
                    f"Expected module types among {', '.join(_TYPES)}; found {kind!r}.{_closest(kind, list(_TYPES))}"
                )

    def __call__(self, model: nn.Module, run: Callable[[], object] | None = None) -> Params:
        """Return the prunable parameters.

        Args:
            model: Any module.
            run: Runs one forward pass, from which the order of execution is read. None: the order of definition.

        Returns:
            Parameters by name, in `named_parameters()` order.

        Raises:
            PruneError: If nothing is prunable, a pattern matches nothing, or a prunable layer's weight is not a plain
                parameter.
        """
        layers = list(_weights(model))
        first, last = _ends(model, run)
        matched_by_include = self._matching(self.include, model, layers)
        matched_by_exclude = self._matching(self.exclude, model, layers)

        kinds = tuple(_TYPES[kind] for kind in self.types)
        reasons: dict[str, str] = {}
        chosen: set[int] = set()
        dense: set[int] = {id(p) for p in _never(model)}
        for name, owner, parameter in layers:
            if not isinstance(owner, kinds):
                reasons[name] = "is not of the types asked for"
            elif self.include is not None and name not in matched_by_include:
                reasons[name] = "is not included"
            elif name in matched_by_exclude:
                reasons[name] = "is excluded"
                dense.add(id(parameter))
            elif _holder(model, name) is last and not self.output_layer:
                reasons[name] = "is the output layer: set output_layer=True to prune it"
                dense.add(id(parameter))
            elif _holder(model, name) is first and not self.first_layer:
                reasons[name] = "is the first layer: set first_layer=True to prune it"
                dense.add(id(parameter))
            elif parameter is None:
                raise PruneError(
                    f"Expected the weight of {name!r} to be a plain parameter; found it behind a parametrization "
                    "(weight_norm, spectral_norm, nn.utils.prune). Remove that, or exclude the layer."
                )
            elif is_lazy(parameter):
                raise PruneError(
                    f"Expected materialised weights; found the lazy {name!r}. Run one batch through the model first."
                )
            elif not parameter.requires_grad and not self.frozen:
                reasons[name] = "is frozen (requires_grad=False): set frozen=True to prune it"
            elif any(part.startswith("lora_") for part in name.split(".")) and name not in matched_by_include:
                reasons[name] = "is a LoRA adapter: name it in `include` to prune it"
            else:
                chosen.add(id(parameter))
        params = {name: p for name, p in model.named_parameters() if id(p) in chosen - dense}
        if not params:
            why = "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:5])
            raise PruneError(
                f"Expected at least one prunable layer ({', '.join(self.types)}); "
                f"found none in {type(model).__name__}{': ' + why if why else ''}. Change the model or the selection."
            )
        return params

    def _matching(
        self, patterns: list[str] | None, model: nn.Module, layers: list[tuple[str, nn.Module, Tensor | None]]
    ) -> set[str]:
        matched: set[str] = set()
        known = [n for n, _, _ in layers]
        anything = known + [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
        for pattern in patterns or []:
            hits = {n for n in known if _matches(n, pattern) or _matches(n.rpartition(".")[0], pattern)}
            if not hits and (patterns is self.include or not any(_matches(n, pattern) for n in anything)):
                names = [plain(n) for n in known] + [plain(n).rpartition(".")[0] for n in known]
                raise PruneError(
                    f"Expected every pattern to match a prunable layer; found nothing for {pattern!r}.{_closest(pattern, names)}"
                )
            matched |= hits
        return matched


def _ends(model: nn.Module, run: Callable[[], object] | None) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the first and the last linear or convolution module, in order of execution where it can be seen."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, *_: object) -> None:
        calls.append(module)

    defined = [m for m in model.modules() if is_layer(m)]
    if run is not None:
        hooks = [m.register_forward_hook(note) for m in defined]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
    order = calls or defined
    return (order[0], order[-1]) if order else (None, None)


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is a linear or convolution layer.

    Args:
        module: Any module.

    Returns:
        True for Linear, Conv and ConvTranspose and their subclasses.
    """
    return isinstance(module, tuple(_TYPES.values())) and not isinstance(module, nn.MultiheadAttention)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """Yield (parameter name, module whose type counts, parameter or None) of every layer that could be pruned."""
    inside_attention = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            for attribute in _ATTENTION:
                if getattr(module, attribute, None) is not None:
                    yield dot + attribute, module, module._parameters.get(attribute)
        elif is_layer(module):
            yield f"{dot}weight", inside_attention.get(module, module), module._parameters.get("weight")


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _never(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that an embedding or a norm holds, perhaps tied to a prunable layer."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)):
            yield from (p for p in module._parameters.values() if p is not None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(plain(name), plain(pattern))


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, [k for k in known if k], n=1, cutoff=0.0)
    return f" The closest name is {close[0]!r}." if close else ""
