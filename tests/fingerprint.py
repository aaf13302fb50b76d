"""Everything that scoring must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def bits(tensor: Tensor | None) -> Any:
    """Return a tensor's dtype, shape and bytes: unlike `==`, it tells 0.0 from -0.0 and finds NaN equal to itself."""
    if tensor is None:
        return None
    return tensor.dtype, tuple(tensor.shape), tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what a model and the process hold, in a form that `==` compares exactly."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    seen: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "random": random.getstate(),
        "numpy": (numpy_state["key"].tobytes(), numpy_state["pos"]),
        "flags": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default dtype": torch.get_default_dtype(),
    }
    for name, module in model.named_modules():
        seen[f"{name}: mode"] = module.training
        seen[f"{name}: attributes"] = sorted(module.__dict__)
        seen[f"{name}: hooks"] = {key: list(held) for key, held in module.__dict__.items() if key.endswith("_hooks")}
    for name, parameter in model.named_parameters():
        seen[f"{name}: value"] = id(parameter), parameter.requires_grad, bits(parameter)
        seen[f"{name}: grad"] = id(parameter.grad), bits(parameter.grad)
        seen[f"{name}: hooks"] = [list(getattr(parameter, h) or ()) for h in PARAMETER_HOOKS]
    for name, buffer in model.named_buffers():
        seen[f"{name}: buffer"] = id(buffer), bits(buffer)
    return seen


PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
