"""Masked equals shrunk over networks that other people wrote; the large ones are in benchmarks/structured_zoo.py."""

from __future__ import annotations

import pytest
import torch
from test_exact import assert_told, masked, remove_some

import pl_prune as plp
from pl_prune.models import ResNet, ViT
from pl_prune.structure.probe import randomised

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = {"input_ids": torch.arange(16).view(2, 8)}
SMALL = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 30}


def torchvision(name):
    return pytest.importorskip("torchvision").models.get_model(name, weights=None, num_classes=5), IMAGE


def timm():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return pytest.importorskip("timm").models.VisionTransformer(**options, init_values=1e-5), IMAGE


def bert():
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)), TOKENS


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=3)), TOKENS


# name -> network and inputs, its groups and units
CASES = {
    "mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), 27, 4872),
    "shufflenet_v2_x0_5": (lambda: torchvision("shufflenet_v2_x0_5"), 20, 1927),
    "squeezenet1_1": (lambda: torchvision("squeezenet1_1"), 25, 64 + 18 * (16 + 32 + 48 + 64)),
    "ResNet-20": (lambda: (ResNet(20), IMAGE), 12, 448),
    "ViT": (lambda: (ViT(2, 24, 3), IMAGE), 4, 2 * (3 + 48)),
    "timm ViT": (timm, 4, 2 * (3 + 96)),
    "BERT": (bert, 5, 2 * (6 + 30) + 24),
    "Llama": (llama, 4, 2 * (3 + 30)),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_shrunk(name):
    torch.manual_seed(0)
    build, count, units = CASES[name]
    model, inputs = build()
    model = randomised(model).eval()
    groups = plp.trace_groups(model, inputs)
    assert (len(groups), sum(groups.sizes.values())) == (count, units)
    keep = remove_some(groups)
    masks = groups.expand(keep)
    small = plp.shrink(model, masks, inputs, groups)  # raises beyond 1e-12
    run = (lambda m: m(**inputs).logits) if isinstance(inputs, dict) else (lambda m: m(inputs))
    with torch.no_grad():
        expected, found = run(masked(model, masks)), run(small)
    assert (found - expected).abs().max() <= (1e-6 if name == "Llama" else 1e-12) * expected.abs().max()
    assert sum(p.numel() for p in small.parameters()) == groups.cost(keep)[0] < groups.cost({})[0]
    assert_told(small)
