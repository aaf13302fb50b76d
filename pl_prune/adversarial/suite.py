"""The attacks of an evaluation: AutoAttack's, run one after another on what is left, or PGD."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.adversarial.attacks import PGD
from pl_prune.core.archive import installed_version
from pl_prune.core.types import PruneError

PRESETS: Mapping[str, tuple[str, ...]] = {
    "pgd": ("pgd",),
    "fast": ("apgd-ce", "apgd-t"),
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "untargeted": ("apgd-ce", "fab", "square"),
}
_PGD_STEPS = 20
_TARGETED = ("apgd-t", "fab-t")

Attack = Callable[[Tensor, Tensor], Tensor]


def attacks_of(preset: str, model: nn.Module, eps: float, norm: str, classes: int, seed: int) -> dict[str, Attack]:
    """Build the attacks of a preset.

    Args:
        preset: A key of `PRESETS`.
        model: Maps images to logits; its parameters need no gradients.
        eps: Radius.
        norm: "linf" or "l2".
        classes: Number of logits.
        seed: Of the random starts.

    Returns:
        By name, in order: functions of images and labels that return adversarial examples.

    Raises:
        PruneError: If a targeted attack meets fewer than four classes, or no package of attacks is installed.

    Source:
        Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks.
        Divergence: below ten classes the targeted attacks take all the other classes as targets, where AutoAttack fails.
    """
    names = PRESETS[preset]
    if any(name in _TARGETED for name in names) and classes < 4:
        raise PruneError(
            f"Expected at least 4 classes for preset={preset!r}, whose targeted attacks compare four logits; found {classes}. "
            "Use preset='untargeted' (APGD-CE, FAB, Square) or 'pgd'."
        )
    if preset == "pgd":
        attack = PGD(eps, eps / 4, _PGD_STEPS, "l2" if norm == "l2" else "linf")
        return {"pgd": lambda x, y: attack(model, x, y, torch.Generator(x.device).manual_seed(seed))}
    suite = _autoattack(model, eps, norm, seed)
    suite.apgd.loss = "ce"
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, classes - 1)
    suite.fab.targeted = "fab-t" in names
    parts = {
        "apgd-ce": suite.apgd,
        "apgd-t": suite.apgd_targeted,
        "fab": suite.fab,
        "fab-t": suite.fab,
        "square": suite.square,
    }
    for part in parts.values():
        part.seed = seed
    return {name: parts[name].perturb for name in names}


def attack_version(preset: str) -> str:
    """Say which code attacks.

    Args:
        preset: A key of `PRESETS`.

    Returns:
        Name and version.
    """
    if preset == "pgd":
        return f"pgd-{_PGD_STEPS}"
    name: str = _module().__name__
    return f"{name} {installed_version(name)}".strip()


def _module() -> Any:
    for name in ("pyautoattack", "autoattack"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise PruneError(
        "Expected pyautoattack, or autoattack, for this preset; found neither installed. Run pip install 'pl_prune[robust]', "
        "or use preset='pgd'."
    )


def _autoattack(model: nn.Module, eps: float, norm: str, seed: int) -> Any:
    kind = _module().AutoAttack
    settings: dict[str, Any] = {"eps": eps, "norm": {"linf": "Linf", "l2": "L2"}[norm], "seed": seed}
    if "verbose" in inspect.signature(kind).parameters:  # the authors' own, which prints
        settings["verbose"] = False
    return kind(model, version="standard", device=None, **settings)
