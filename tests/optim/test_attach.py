from __future__ import annotations

import pytest
import torch
from fingerprint import bits, fingerprint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune import MaskSet
from pl_prune.optim.attach import Enforcement

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD one by one": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "Adam maximizing": lambda p: torch.optim.Adam(p, 0.01, maximize=True, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "AdamW for each": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def masks(model, sparsity=0.5):
    return plp.Global()(plp.score(model, plp.Random(), select=plp.Select(output_layer=True)), sparsity)


def loss(model):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    return nn.functional.cross_entropy(model(x), y)


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(closure)


def zeros(model, keep):
    return {name: (dict(model.named_parameters())[name] == 0).tolist() for name in keep}


def pruned(keep):
    return {name: (~mask).tolist() for name, mask in keep.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_hold_after_every_step_and_the_rest_learns(optimizer):
    model = network()
    keep = masks(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(2):
        step(model, optimizer)  # momentum from before the masks must not move what they prune
    plp.attach_masks(optimizer, model, keep)
    assert zeros(model, keep) == pruned(keep)
    for _ in range(4):
        before = model[0].weight.detach().clone()
        step(model, optimizer)
        assert zeros(model, keep) == pruned(keep)
        assert (model[0].weight != before).sum() > keep["0.weight"].sum() // 2
        assert (model[0].weight.grad[~keep["0.weight"]] == 0).all()
        for name, mask in keep.items():
            for value in optimizer.state.get(model.get_parameter(name), {}).values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert (value[~mask] == 0).all()
                    assert (value[mask] != 0).any()


def test_it_equals_multiplying_the_weights_by_the_masks():
    def train(attached):
        model = network()
        keep = masks(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if attached:
            plp.attach_masks(optimizer, model, keep)
        for _ in range(5):
            if attached:
                step(model, optimizer)
                continue
            params = {n: p * keep[n] if n in keep else p for n, p in model.named_parameters()}
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
            logits = torch.func.functional_call(model, params, (x,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, torch.arange(8) % 3).backward()
            optimizer.step()
        return [(p * keep[n] if n in keep else p).detach() for n, p in model.named_parameters()]

    torch.testing.assert_close(train(True), train(False), rtol=1e-6, atol=1e-7)


def test_clipping_sees_masked_gradients():
    model = network()
    keep = masks(model, 0.9)
    plp.attach_masks(torch.optim.SGD(model.parameters(), 0.1), model, keep)
    loss(model).backward()
    expected = torch.cat([(p.grad * keep[n] if n in keep else p.grad).flatten() for n, p in model.named_parameters()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(norm) == pytest.approx(float(expected.norm()))
    assert all((p.grad[~keep[n]] == 0).all() for n, p in model.named_parameters() if n in keep)


def test_accumulated_gradients_stay_masked():
    model = network()
    keep = masks(model)
    plp.attach_masks(torch.optim.SGD(model.parameters(), 0.1), model, keep)
    for count in (1, 2):
        loss(model.eval()).backward()
        grad = model[0].weight.grad
        assert (grad[~keep["0.weight"]] == 0).all()
        if count == 1:
            once = grad.clone()
    torch.testing.assert_close(grad, 2 * once)


def test_gradients_that_are_nan_leave_zeros_where_weights_are_pruned():
    model = network()
    keep = masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plp.attach_masks(optimizer, model, keep)
    (loss(model) * torch.nan).backward()
    optimizer.step()
    assert model[0].weight[keep["0.weight"]].isnan().all()
    assert (model[0].weight[~keep["0.weight"]] == 0).all()


def test_without_gradient_hooks_gradients_are_left_alone():
    model = network()
    keep = masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    enforcement = Enforcement({n: p for n, p in model.named_parameters() if n in keep}, keep)
    enforcement.attach([optimizer], gradient_hooks=False)
    loss(model).backward()
    assert (model[0].weight.grad[~keep["0.weight"]] != 0).any()
    enforcement.zero_grads()
    assert (model[0].weight.grad[~keep["0.weight"]] == 0).all()
    loss(model).backward()
    optimizer.step()
    assert zeros(model, keep) == pruned(keep)


def test_two_optimizers():
    model = network()
    keep = masks(model)
    optimizers = [
        torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9),
        torch.optim.AdamW(model[3].parameters(), 0.1),
    ]
    enforcement = Enforcement({n: p for n, p in model.named_parameters() if n in keep}, keep)
    enforcement.attach(optimizers)
    for _ in range(3):
        for optimizer in optimizers:
            step(model, optimizer)
            assert zeros(model, keep) == pruned(keep)


def test_a_step_that_a_grad_scaler_skips():
    model = network()
    keep = masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    plp.attach_masks(optimizer, model, keep)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        before = bits(model[0].weight)
        optimizer.zero_grad()
        scaler.scale(loss(model) * (torch.inf if overflow else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert zeros(model, keep) == pruned(keep)
        assert (bits(model[0].weight) == before) is overflow


def test_detach_ends_it_and_may_be_called_twice():
    model = network()
    keep = masks(model)
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    enforcement = plp.attach_masks(optimizer, model, keep)
    enforcement.detach()
    enforcement.detach()
    after = fingerprint(model)
    assert {k: v for k, v in after.items() if "hooks" in k} == {k: v for k, v in before.items() if "hooks" in k}
    assert zeros(model, keep) == pruned(keep)
    step(model, optimizer)
    assert zeros(model, keep) != pruned(keep)


def test_parameters_stay_the_same_objects_and_state_loads_strictly():
    model = network()
    objects = {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    plp.attach_masks(optimizer, model, masks(model))
    step(model, optimizer)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert network().load_state_dict(model.state_dict(), strict=True).missing_keys == []


def test_an_optimizer_of_another_model():
    model = network()
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    with expect_refusal("optimizer that steps the pruned parameters", "none of them", "this model's parameters"):
        plp.attach_masks(optimizer, model, masks(model))
    assert not optimizer._optimizer_step_post_hooks


def test_masks_of_another_model():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = fingerprint(model)
    with expect_refusal("0.weight: mask (2, 2), parameter (6, 4); 9.weight: no such parameter", "this architecture"):
        plp.attach_masks(
            optimizer, model, MaskSet({"0.weight": torch.ones(2, 2).bool(), "9.weight": torch.ones(1).bool()})
        )
    assert fingerprint(model) == before


def test_masks_of_nothing():
    model = network()
    with expect_refusal("mask"):
        plp.attach_masks(torch.optim.SGD(model.parameters(), 0.1), model, MaskSet({}))


def test_masks_on_a_frozen_parameter():
    model = network()
    keep = masks(model)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    plp.attach_masks(optimizer, model, keep)
    step(model, optimizer)
    assert zeros(model, keep) == pruned(keep)
