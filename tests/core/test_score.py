from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fingerprint import fingerprint
from refusal import expect_refusal
from torch import nn

import pl_prune as plp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.arange(n) % 3) for n in (4, 2)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Renamed(plp.Criterion):
    name: str = "0.weight"
    shape: tuple[int, ...] = (5, 4)
    value: float = 1.0

    def __call__(self, probe):
        return {self.name: torch.full(self.shape, self.value)}


def test_a_criterion_of_the_users_own():
    scores = plp.score(network(), Renamed(), batches(), loss)
    assert {name: s.tolist() for name, s in scores.items()} == {"0.weight": [[1.0] * 4] * 5}


@pytest.mark.parametrize(
    ("criterion", "parts"),
    [
        (
            Renamed("1.weight"),
            ("Renamed to score every prunable parameter", "('1.weight', (5, 4))", "('0.weight', (5, 4))"),
        ),
        (Renamed(shape=(4, 5)), ("Renamed to score", "('0.weight', (4, 5))", "bug of the criterion")),
        (Renamed(value=torch.nan), ("finite scores", "NaN or infinity in 0.weight")),
    ],
    ids=["name", "shape", "nan"],
)
def test_a_criterion_that_breaks_its_contract(criterion, parts):
    model = network()
    before = fingerprint(model)
    with expect_refusal(*parts):
        plp.score(model, criterion, batches(), loss)
    assert fingerprint(model) == before


def test_any_iterable_of_batches():
    listed = plp.score(network(), plp.SNIP(), batches(), loss)
    streamed = plp.score(network(), plp.SNIP(), iter(batches()), loss)
    assert torch.equal(listed["0.weight"], streamed["0.weight"])


def test_the_model_is_scored_in_evaluation_mode():
    train, evaluation = network().train(), network().eval()
    scores = [plp.score(model, plp.GradNorm(), batches(), loss)["0.weight"] for model in (train, evaluation)]
    assert torch.equal(*scores)
    assert train.training
    assert not evaluation.training


def test_scores_without_gradients_around():
    expected = plp.score(network(), plp.SNIP(), batches(), loss)["0.weight"]
    with torch.no_grad():
        assert torch.equal(plp.score(network(), plp.SNIP(), batches(), loss)["0.weight"], expected)


def test_the_output_layer_is_the_last_one_that_the_loss_runs():
    model = nn.ModuleDict({"head": nn.Linear(5, 3), "body": nn.Linear(4, 5)})

    def run(m, b):
        return nn.functional.cross_entropy(m["head"](m["body"](b[0])), b[1])

    assert list(plp.score(model, plp.SNIP(), batches(), run)) == ["body.weight"]
    assert list(plp.score(model, plp.Magnitude(), batches(), run)) == ["body.weight"]
    assert list(plp.score(model, plp.Magnitude())) == ["head.weight"]


def test_a_selection_is_passed_on():
    select = plp.Select(include=["3"], output_layer=True)
    assert list(plp.score(network(), plp.SNIP(), batches(), loss, select)) == ["3.weight"]


@pytest.mark.parametrize(
    ("given", "loss_fn", "found"),
    [(None, loss, "0 batches"), ([], loss, "0 batches"), (batches(), None, "2 batches and loss_fn=None")],
    ids=["none", "empty", "no loss"],
)
def test_missing_data(given, loss_fn, found):
    with expect_refusal("batches and a loss function, which SNIP needs", found, "Pass both"):
        plp.score(network(), plp.SNIP(), given, loss_fn)


def test_weights_that_are_not_finite():
    model = network()
    with torch.no_grad():
        model[0].weight[1, 2] = torch.inf
    with expect_refusal("finite scores", "0.weight", "weights that are not finite"):
        plp.score(model, plp.Magnitude())


class Padded(nn.Conv2d):
    """Pads its input itself, as some networks ported from other frameworks do."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_fisher_of_layers_that_do_more_than_their_class():
    torch.manual_seed(0)
    net = nn.Sequential(Padded(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    x, y = torch.randn(4, 3, 4, 4, dtype=torch.float64), torch.arange(4)
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    alone = [torch.autograd.grad(loss(net, (x[i : i + 1], y[i : i + 1])), net[0].weight)[0] ** 2 for i in range(4)]
    found = plp.score(net, plp.FisherDiagonal(), [(x, y)], loss)
    torch.testing.assert_close(found["0.weight"], sum(alone) / 4)


class Remembering(nn.Module):
    """Carries a hidden state from batch to batch, and counts them."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.hidden, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), None, 0

    def forward(self, x):
        self.calls += 1
        self.hidden = torch.tanh(self.body(x)) + (0 if self.hidden is None else self.hidden)
        return self.head(self.hidden)


def test_no_batch_sees_what_another_left_in_the_module():
    torch.manual_seed(0)
    net, x, y = Remembering().double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    whole = plp.score(net, plp.SNIP(), [(x, y)], loss)
    parts = plp.score(net, plp.SNIP(), [(x[:2], y[:2]), (x[2:], y[2:])], loss)
    torch.testing.assert_close(whole, parts)
    assert net.hidden is None
    assert net.calls == 0


class Keeping(nn.Module):
    """Keeps a hidden state in one of many ways."""

    def __init__(self, way):
        super().__init__()
        self.body, self.head, self.way = nn.Linear(4, 4), nn.Linear(4, 2), way
        self.list, self.dict, self.tensor = [], {}, torch.zeros(4, dtype=torch.float64)
        self.register_buffer("rebound", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("written", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        before = {
            "list": self.list[-1] if self.list else 0, "dict": self.dict.get("h", 0), "tensor": self.tensor.clone(),
            "rebound": self.rebound, "written": self.written.clone(),
        }[self.way]  # fmt: skip
        hidden = torch.tanh(self.body(x)) + before
        kept = hidden.detach().mean(0)
        self.list.append(kept)
        self.dict["h"] = kept
        self.tensor.copy_(kept)
        self.written.copy_(kept)
        self.rebound = kept
        return self.head(hidden)


@pytest.mark.parametrize("way", ["list", "dict", "tensor", "rebound", "written"])
def test_a_hidden_state_of_any_kind_does_not_leak_from_batch_to_batch(way):
    torch.manual_seed(0)
    net, x, y = Keeping(way).double(), torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 2
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    whole = plp.score(net, plp.SNIP(), [(x, y)], loss)
    parts = plp.score(net, plp.SNIP(), [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    torch.testing.assert_close(whole, parts)
    assert not net.list
    assert not net.written.any()
