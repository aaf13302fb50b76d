from __future__ import annotations

import pytest
import torch
from fingerprint import fingerprint
from refusal import expect_refusal
from torch import nn
from torch.nn.utils import parametrizations, prune

import pl_prune as plp
from pl_prune import Select

EVERYTHING = Select(output_layer=True)


class Zoo(nn.Module):
    """One layer of each kind, defined in another order than it could run."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)
        self.up1, self.up2, self.up3 = (
            kind(2, 2, 1) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        )
        self.packed = nn.MultiheadAttention(4, 2)
        self.split = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True)
        self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.LayerNorm([2, 2]), nn.GroupNorm(1, 2), nn.RMSNorm(2)])
        self.embedding, self.bag = nn.Embedding(4, 2), nn.EmbeddingBag(4, 2)
        self.bilinear, self.lstm, self.prelu = nn.Bilinear(2, 2, 2), nn.LSTM(2, 2), nn.PReLU()
        self.position = nn.Parameter(torch.ones(2, 2))
        self.linear = nn.Linear(2, 2)


class Steps(nn.Module):
    """Runs its layers in the order given."""

    def __init__(self, *order):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.order = order

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def selected(select, model):
    return list(select(model, lambda: model(torch.ones(2, 4))))


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def test_types_decide_and_order_is_that_of_named_parameters():
    model = Zoo()
    found = EVERYTHING(model)
    assert list(found) == [
        *(f"{layer}.weight" for layer in ("conv1", "conv2", "conv3", "up1", "up2", "up3")),
        "packed.in_proj_weight",
        "packed.out_proj.weight",
        *(f"split.{kind}_proj_weight" for kind in "qkv"),
        "split.out_proj.weight",
        "linear.weight",
    ]
    live = dict(model.named_parameters())
    assert all(live[name] is parameter for name, parameter in found.items())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("Linear", ["linear.weight"]),
        ("Conv2d", ["conv2.weight"]),
        ("ConvTranspose3d", ["up3.weight"]),
        (
            "MultiheadAttention",
            ["packed.in_proj_weight", "packed.out_proj.weight"]
            + [f"split.{kind}_proj_weight" for kind in "qkv"]
            + ["split.out_proj.weight"],
        ),
    ],
)
def test_types_asked_for(kind, names):
    assert list(Select(types=(kind,), output_layer=True)(Zoo())) == names


def test_subclasses_and_misleading_names_count():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({
        "norm": Mine(2, 2),
        "bias": nn.Conv1d(1, 1, 1),
        "fc": nn.Linear(2, 2),
        "bn": nn.Linear(2, 2),
    })
    assert list(EVERYTHING(model)) == ["norm.weight", "bias.weight", "fc.weight", "bn.weight"]


def test_a_layer_by_itself():
    layer = nn.Linear(3, 2)
    assert list(EVERYTHING(layer)) == ["weight"]
    with expect_refusal("none in Linear: weight is the output layer", "output_layer=True"):
        Select()(layer)


@pytest.mark.parametrize(
    ("order", "output", "first"), [("abc", "c", "a"), ("cba", "a", "c"), ("bca", "a", "b"), ("ab", "b", "a")]
)
def test_ends_are_those_of_execution(order, output, first):
    model = Steps(*order)
    assert selected(Select(), model) == [f"{name}.weight" for name in "abc" if name != output]
    assert selected(Select(first_layer=False), model) == [f"{n}.weight" for n in "abc" if n not in (output, first)]


def test_ends_of_a_network_that_reuses_its_first_layer():
    model = Steps("a", "b", "a", "c")
    assert selected(Select(), model) == ["a.weight", "b.weight"]
    assert selected(Select(first_layer=False), model) == ["b.weight"]


def test_without_a_run_the_order_is_that_of_definition():
    assert list(Select()(Steps("c", "b", "a"))) == ["a.weight", "b.weight"]
    assert list(Select(first_layer=False)(Steps("c", "b", "a"))) == ["b.weight"]


def test_looking_at_the_execution_leaves_no_trace():
    model = Steps("a", "c", "a", "b")
    before = fingerprint(model)
    assert selected(Select(), model) == ["a.weight", "c.weight"]
    with pytest.raises(RuntimeError, match="mat1"):
        Select()(model, lambda: model(torch.ones(1, 5)))
    assert fingerprint(model) == before


def test_patterns():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2))
    every = ["0.0.weight", "0.2.weight", "0.4.weight", "2.weight"]
    assert list(Select()(model)) == every
    assert list(Select(include=["0.?"])(model)) == every[:3]
    assert list(Select(include=["0.0", "2.weight"])(model)) == [every[0], every[3]]
    assert list(Select(include=["*weight"], exclude=["0.*"])(model)) == every[3:]
    assert list(Select(exclude=["0.[02]"])(model)) == every[2:]
    assert list(Select(exclude=["1", "*.bias", "2"])(model)) == every[:3]
    assert list(Select(include=["3"], output_layer=True)(model)) == ["3.weight"]


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "closest"),
    [("encoder.layr", "encoder.layer"), ("decoder.wieght", "decoder.weight"), ("Decoder", "decoder")],
)
def test_a_pattern_that_matches_nothing(field, pattern, closest):
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.Linear(2, 2)}), "decoder": nn.Linear(2, 2)})
    with expect_refusal("every pattern to match", f"nothing for {pattern!r}", f"closest name is {closest!r}"):
        Select(**{field: ["*weight", pattern]}, output_layer=True)(model)


def test_include_of_what_is_never_prunable():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with expect_refusal("nothing for '1'", "closest name"):
        Select(include=["1"])(model)


def test_a_type_that_is_none_of_ours():
    with expect_refusal("Linear, Conv1d", "found 'Conv2D'", "closest name is 'Conv2d'"):
        Select(types=("Conv2D",))


def test_frozen_parameters_are_passed_over():
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert list(Select()(model)) == ["2.weight"]
    with expect_refusal("0.weight is frozen (requires_grad=False)", "2.weight is excluded"):
        Select(exclude=["2"])(model)


def test_nothing_to_prune_tells_why():
    with expect_refusal("at least one prunable layer", "Linear, Conv1d", "none in Sequential", "Change the model"):
        Select()(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    with expect_refusal("0.weight is not included", "2.weight is the first layer: set first_layer=True", "4.weight is"):
        model = Steps("c", "b", "a")
        renamed = nn.ModuleDict({"0": model.a, "2": model.c, "4": model.b})
        Select(include=["2", "4"], exclude=["4"], first_layer=False)(renamed, lambda: model(torch.ones(1, 4)))


def test_tied_linear_layers_appear_once():
    model = mlp()
    model[2].weight = model[0].weight
    assert list(Select()(model)) == ["0.weight"]


def test_a_tensor_tied_to_what_must_stay_dense_stays_dense():
    tied_to_output = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    tied_to_output[2].weight = tied_to_output[0].weight
    assert list(Select()(tied_to_output)) == ["1.weight"]
    tied_to_excluded = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    tied_to_excluded[1].weight = tied_to_excluded[0].weight
    assert list(Select(exclude=["0"])(tied_to_excluded)) == ["2.weight"]
    assert list(Select(exclude=["1"])(tied_to_excluded)) == ["2.weight"]


def test_a_head_tied_to_an_embedding_is_never_prunable():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    assert list(EVERYTHING(model)) == ["1.weight"]


WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "nn.utils.prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_weight_behind_a_parametrization(wrap):
    model = mlp()
    wrap(model[2])
    with expect_refusal("weight of '2.weight' to be a plain parameter", "parametrization", "exclude the layer"):
        Select()(model)
    assert list(Select(exclude=["2"])(model)) == ["0.weight"]


def test_attention_behind_a_parametrization():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    parametrizations.weight_norm(model[1], "in_proj_weight")
    with expect_refusal("1.in_proj_weight", "parametrization"):
        EVERYTHING(model)


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))


def lazy_norm():
    return nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))


def test_a_lazy_layer():
    with expect_refusal("materialised weights", "lazy '0.weight'", "Run one batch"):
        Select()(lazy())


@pytest.mark.parametrize("make", [lazy, lazy_norm])
@pytest.mark.parametrize("criterion", [plp.Magnitude(), plp.SNIP()], ids=["Magnitude", "SNIP"])
def test_a_lazy_layer_is_refused_before_data_is_run(make, criterion):
    model = make()
    batches = [(torch.ones(2, 4), torch.tensor([0, 1]))]
    with expect_refusal("lazy", "Run one batch"):
        plp.score(model, criterion, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    assert nn.parameter.is_lazy(
        next(p for m in (model[0], model[1]) for p in m.parameters() if nn.parameter.is_lazy(p))
    )
    assert model(batches[0][0]).shape == (2, 3)


def test_only_adapters_are_taken_for_adapters():
    model = nn.ModuleDict({"flora_encoder": nn.Linear(4, 4), "lora_A": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert list(Select()(model)) == ["flora_encoder.weight"]
