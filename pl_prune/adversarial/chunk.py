"""One chunk of an evaluation: checked, attacked, and kept in a file of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_prune.adversarial.attacks import check_eps
from pl_prune.adversarial.inputs import check_inputs, logits_of
from pl_prune.adversarial.statistics import write_flags
from pl_prune.adversarial.suite import PRESETS, attacks_of
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError, check_choice, check_count

_SLACK = 1e-5  # what single precision may add to a radius


@dataclass(frozen=True)
class Protocol:
    """How robustness is measured. A chunk is attacked as one batch with a seed of its own, so it decides the result, as the seed does.

    Args:
        eps: Radius of the attacks on images in [0, 1]; 0 for no attack.
        preset: "standard" is AutoAttack; "fast" its APGD-CE and targeted APGD; "untargeted" APGD-CE, FAB and Square, for
            two or three classes; "pgd" 20 projected gradient steps, an optimistic measure for use while training.
        norm: "linf" or "l2".
        seed: Of the attacks' random starts.
        chunk_size: Images attacked at a time.
    """

    eps: float = 8 / 255
    preset: Literal["fast", "standard", "untargeted", "pgd"] = "fast"
    norm: Literal["linf", "l2"] = "linf"
    seed: int = 0
    chunk_size: int = 250

    def __post_init__(self) -> None:
        if self.eps != 0:
            check_eps(self.eps, self.norm)
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("preset", self.preset, list(PRESETS))
        check_count("chunk_size", self.chunk_size)


class _InSinglePrecision(nn.Module):
    """A model as attacks want it: single precision in and out, and logits that they may write into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.to(self.kind)).float()
        return logits.clone()


@contextmanager
def unseen(model: nn.Module) -> Iterator[nn.Module]:
    """Prepare a model to be attacked, and leave no trace of it.

    Args:
        model: The model.

    Yields:
        What to attack: in evaluation mode, without gradients of parameters, autocast or TF32.
    """
    with (
        untouched(model),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # FAB calls backward
        yield _InSinglePrecision(model).eval()


class Judge:
    """Attack one chunk after another.

    Args:
        model: The model.
        run: What `unseen` made of it.
        protocol: How.
        settings: The same in plain containers, with the version of the attacks.
        folder: Keeps one file for each finished chunk, in a folder for each model, protocol and number of images.
        count: The number of images in all.
    """

    def __init__(
        self,
        model: nn.Module,
        run: nn.Module,
        protocol: Protocol,
        settings: dict[str, Any],
        folder: Path | None,
        count: int,
    ) -> None:
        self.model, self.run, self.protocol = model, run, protocol
        weights = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in model.state_dict().items():
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(_bytes(tensor))
        self.weights = weights.hexdigest()
        self.folder = folder / f"{self.weights[:12]}_{count}" if folder else None

    def __call__(self, number: int, x: Any, y: Any) -> dict[str, Any]:
        """Attack a chunk, or read its file where there is one.

        Args:
            number: Its number.
            x: Its images (N, C, H, W).
            y: Their labels (N,).

        Returns:
            "images" (a digest), "logits" of the first image, "correct" and, of each attack, "survived", as strings of 0 and 1.

        Raises:
            PruneError: If images, labels, model or file cannot be used.
        """
        highest = check_inputs(x, y)
        if x.ndim != 4:
            raise PruneError(
                f"Expected images (N, C, H, W); found shape {tuple(x.shape)}. Reshape them, and let the model flatten them."
            )
        images = hashlib.sha256(_bytes(x) + _bytes(y)).hexdigest()
        key = hashlib.sha256(f"{self.weights} {images} {number}".encode()).hexdigest()
        file = self.folder / f"chunk_{number:05}.json" if self.folder else None
        device = next((p.device for p in self.model.parameters()), x.device)
        if x.dtype.itemsize < 4:  # a radius means little in half precision
            x = x.float()
        x = x.to(device)
        if file is not None and file.exists():
            with torch.no_grad():
                return _read(file, key, self.run(x[:1])[0])
        chunk = {"key": key, "images": images, **self._attack(number, x, y.to(device), highest)}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}.part")
            part.write_text(json.dumps(chunk))
            part.replace(file)
        return chunk

    def _attack(self, number: int, x: Tensor, y: Tensor, highest: int) -> dict[str, Any]:
        protocol = self.protocol
        with torch.no_grad():
            logits = self._checked_logits(x, highest)
            alive = logits.argmax(1) == y
            correct, survived = alive.tolist(), {}
            if protocol.eps:
                seed = protocol.seed * 1_000_003 + number
                classes = logits.shape[1]
                attacks = attacks_of(protocol.preset, self.run, protocol.eps, protocol.norm, classes, seed)
                for name, attack in attacks.items():
                    if bool(alive.any()):
                        left = alive.nonzero()[:, 0]
                        moved = attack(x[left].clone(), y[left].clone()).detach().to(x.dtype)
                        _check_in_reach(name, moved, x[left], protocol)
                        alive = alive.clone()
                        alive[left] = self.run(moved).argmax(1) == y[left]
                    survived[name] = write_flags(tuple(alive.tolist()))
        return {"logits": logits[0].tolist(), "correct": write_flags(tuple(correct)), "survived": survived}

    def _checked_logits(self, x: Tensor, highest: int) -> Tensor:
        kind = type(self.model).__name__
        logits_of(self.model, x[:1].to(next((p.dtype for p in self.model.parameters()), x.dtype)), highest)
        logits: Tensor = self.run(x)
        again = self.run(x)
        half = self.run(x[: (len(x) + 1) // 2])
        scale = float(logits.abs().max()) + 1e-12
        if not bool(logits.isfinite().all()):
            raise PruneError(
                f"Expected finite logits; found NaN or infinity from {kind}. Look at its weights, or at diverged training."
            )
        if float((logits - again).abs().max()) > 1e-4 * scale:
            raise PruneError(
                f"Expected {kind} to be the same function each time in evaluation mode; found that two passes over the same images "
                "differ. Switch its randomness off in eval(): attacks on a random model say little."
            )
        if float((logits[: len(half)] - half).abs().max()) > 1e-3 * scale:
            raise PruneError(
                f"Expected {kind} to classify each image on its own; found that logits depend on the other images of the batch. "
                "Use batch norms that track running statistics, in eval()."
            )
        sums = logits.sum(1)
        if logits.shape[1] > 1 and float(logits.min()) >= -1e-5 and float((sums - 1).abs().max()) < 1e-5:
            raise PruneError(
                f"Expected logits; found that {kind} returns probabilities, whose gradients vanish where it is sure. "
                "Return what goes into the softmax."
            )
        return logits


def _check_in_reach(name: str, moved: Tensor, x: Tensor, protocol: Protocol) -> None:
    away = (moved - x).flatten(1)
    reach = float(away.abs().max() if protocol.norm == "linf" else away.norm(dim=1).max())
    if not (reach <= protocol.eps * (1 + 1e-4) + _SLACK and float(moved.min()) >= 0 and float(moved.max()) <= 1):
        raise PruneError(
            f"Expected {name} to stay within eps {protocol.eps:.4g} and in [0, 1]; found a perturbation of {reach:.4g}. "
            "Report this as a bug of the attack."
        )


def _read(file: Path, key: str, logits: Tensor) -> dict[str, Any]:
    """Read a chunk; weights do not tell what a model does with them, so its logits are compared too."""
    try:
        chunk: dict[str, Any] = json.loads(file.read_text())
        found = "one of other images"
        if chunk["key"] == key:
            then = torch.tensor(chunk["logits"], dtype=logits.dtype, device=logits.device)
            slack = 2e-2 * float(then.abs().max()) + 1e-6  # another device, or another number of images at a time
            if then.shape == logits.shape and float((then - logits).abs().max()) <= slack:
                return chunk
            found = "one of another model with the same weights"
    except (ValueError, KeyError, TypeError) as error:
        found = f"something else ({error!r})"
    raise PruneError(
        f"Expected a chunk of this evaluation in {str(file)!r}; found {found}. Choose another folder, or delete that one."
    )


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
