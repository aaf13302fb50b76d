"""Perturbations against the formulas of S2AP and AWP."""

from __future__ import annotations

import math

import pytest
import torch

import pl_prune as plp
from pl_prune.adversarial.perturb import check_perturbation, perturbation

GAMMA = 0.01


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


SHAPES = {"a": (4, 3), "b": (5, 2, 3, 3), "c": (7, 1)}
RATES = {"a": 0.1, "b": 0.001, "c": 0.1}


def norm(t: torch.Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in t.flatten()))


def test_project_is_a_step_of_the_learning_rate_brought_back_to_its_bound():
    gradients, values = tensors(0), tensors(1)
    total = math.sqrt(sum(norm(g) ** 2 for g in gradients.values()))
    found = perturbation(gradients, values, GAMMA, "project", RATES)
    bounded = 0
    for name, g in gradients.items():
        z = RATES[name] * g / total
        bound = GAMMA * norm(values[name])
        if norm(z) > bound:
            z, bounded = z * bound / norm(z), bounded + 1
        torch.testing.assert_close(found[name], z, rtol=1e-12, atol=0)
    assert 0 < bounded < 3, "the data shows both cases"


def test_scale_is_on_the_sphere_along_each_layers_own_gradient():
    gradients, values = tensors(0), tensors(1)
    for name, z in perturbation(gradients, values, GAMMA, "scale").items():
        assert norm(z) == pytest.approx(GAMMA * norm(values[name]), rel=1e-12)
        cosine = float((z * gradients[name]).sum()) / norm(z) / norm(gradients[name])
        assert cosine == pytest.approx(1, rel=1e-12)


def test_a_perturbation_that_persists_steps_from_where_it_was():
    gradients, values, before = tensors(0), tensors(1, 100), tensors(2, 1e-3)
    total = math.sqrt(sum(norm(g) ** 2 for g in gradients.values()))
    found = perturbation(gradients, values, GAMMA, "project", RATES, before)
    for name, z in found.items():
        torch.testing.assert_close(z, before[name] + RATES[name] * gradients[name] / total, rtol=1e-12, atol=1e-15)
    tight = perturbation(gradients, values, 1e-6, "project", RATES, before)
    for name, z in tight.items():
        assert norm(z) == pytest.approx(1e-6 * norm(values[name]), rel=1e-9)


@pytest.mark.parametrize("mode", ["project", "scale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_gradients_without_a_direction_move_nothing(mode, bad):
    gradients = tensors(0)
    gradients = {n: torch.zeros_like(g) for n, g in gradients.items()} if not bad else gradients
    gradients["b"][1, 1] = bad
    for z in perturbation(gradients, tensors(1), GAMMA, mode, RATES).values():
        assert not z.any()


@pytest.mark.parametrize(
    "bad", [(-1, "project", 0), (float("nan"), "scale", 0), (True, "scale", 0), (0.1, "both", 0), (0.1, "scale", -1)]
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(plp.PruneError, match="Expected"):
        check_perturbation(*bad)
