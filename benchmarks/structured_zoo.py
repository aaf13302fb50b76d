"""Masked equals shrunk, over networks that other people wrote.

For each: trace, remove 30 % of the units of every group at random, shrink, compare with the masked network in float64
and float32, write to a file and load it again. Ends with 1 if a network does not agree to 1e-12 and 1e-5 of the largest output,
does not load as it was, or is refused though it is not among those that have to be.

    python benchmarks/structured_zoo.py [NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pl_prune as plp
from pl_prune.models import ResNet as CifarResNet
from pl_prune.models import ViT as SmallViT
from pl_prune.models import WideResNet
from pl_prune.structure.probe import masked_copy, randomised
from pl_prune.structure.running import as_call, disagreement, in_dtype

Case = Callable[[], tuple[nn.Module, Any]]


def torchvision_case(name: str, pixels: int = 64, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options), torch.randn(1, 3, pixels, pixels)

    return make


def timm_case(name: str, pixels: int = 64, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import timm

        return timm.create_model(name, pretrained=False, **options), torch.randn(1, 3, pixels, pixels)

    return make


def detector(name: str) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
        if "ssd" in name:
            model.transform.fixed_size = (64, 64)
        else:
            model.transform.min_size, model.transform.max_size = (64,), 64
        return model, ([torch.rand(3, 64, 64)],)

    return make


def language(kind: str) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        small = {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        if kind == "bert":
            model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
        elif kind == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2))
        elif kind == "qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small, num_key_value_heads=2, head_dim=8))
        else:
            config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
            model = transformers.GPT2LMHeadModel(config)
        return model, {"input_ids": torch.randint(50, (2, 8))}

    return make


def ours(make: Callable[[], nn.Module]) -> Case:
    return lambda: (make(), torch.randn(2, 3, 32, 32))


ZOO: dict[str, Case] = {
    **{
        name: torchvision_case(name)
        for name in (
            "alexnet",
            "vgg11_bn",
            "resnet18",
            "resnet50",
            "resnext50_32x4d",
            "wide_resnet50_2",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "densenet121",
            "googlenet",
            "shufflenet_v2_x1_0",
            "squeezenet1_0",
            "regnet_y_400mf",
            "mnasnet0_5",
            "convnext_tiny",
            "swin_t",
        )
    },
    "inception_v3": torchvision_case("inception_v3", 96),
    "vit_b_16": torchvision_case("vit_b_16", image_size=64),
    "deeplabv3_resnet50": torchvision_case("deeplabv3_resnet50", weights_backbone=None),
    "deeplabv3_resnet50 (aux)": torchvision_case("deeplabv3_resnet50", weights_backbone=None, aux_loss=True),
    "fasterrcnn_resnet50_fpn": detector("fasterrcnn_resnet50_fpn"),
    "retinanet_resnet50_fpn": detector("retinanet_resnet50_fpn"),
    "ssdlite320_mobilenet_v3_large": detector("ssdlite320_mobilenet_v3_large"),
    "ResNet-56 (ours)": ours(lambda: CifarResNet(56)),
    "WideResNet-16-4 (ours)": ours(lambda: WideResNet(16, 4)),
    "ViT (ours)": ours(lambda: SmallViT(4, 96, 6)),
    "timm vit_tiny": timm_case("vit_tiny_patch16_224", img_size=64),
    "timm swin_tiny": timm_case("swin_tiny_patch4_window7_224", 224),
    "timm resnetv2_50 (weight standardisation, GroupNorm)": timm_case("resnetv2_50x1_bit"),
    "timm efficientvit": timm_case("efficientvit_m0", 224),
    "BERT (transformers)": language("bert"),
    "Llama (transformers)": language("llama"),
    "Qwen3 (transformers)": language("qwen3"),
    "GPT-2 (transformers)": language("gpt2"),
}


REFUSED = {"timm resnetv2_50 (weight standardisation, GroupNorm)"}
"""Without a channel that could leave unnoticed: columns of standardised weights count in the scale of the others."""


def random_keep(groups: plp.ParameterGroups, share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        keep[group.root] = torch.ones(group.size, dtype=torch.bool)
        gone = torch.randperm(group.size, generator=generator)[: min(max(round(share * group.size), 1), group.size - 1)]
        keep[group.root][gone] = False
    return keep


def measure(name: str) -> tuple[str, bool]:
    """A row of the table, and whether everything agrees."""
    torch.manual_seed(0)
    model, example = ZOO[name]()
    model.eval()
    start = time.perf_counter()
    groups = plp.trace_groups(model, example)
    traced = time.perf_counter() - start
    keep = random_keep(groups, 0.3)
    masks = groups.expand(keep)
    args, kwargs = as_call(example)
    errors = []
    noisy = randomised(model)
    for dtype in (torch.float64, torch.float32):
        cast = copy.deepcopy(noisy).to(dtype)
        inputs = in_dtype(args, dtype), in_dtype(kwargs, dtype)
        small = plp.shrink(cast, masks, inputs[0] or inputs[1], groups)
        errors.append(disagreement(masked_copy(cast, masks), small, *inputs, tolerance=1e-5))
    with tempfile.TemporaryDirectory() as folder:
        path = plp.save_shrunk(small, Path(folder) / "small")
        torch.manual_seed(1)
        loaded = plp.load_shrunk(ZOO[name]()[0].eval(), path)
        same = disagreement(small, loaded, *inputs, tolerance=0.0) == 0.0
    dense, left = groups.cost({}), groups.cost(keep)
    counted = sum(p.numel() for p in small.parameters())
    assert counted == left[0], (counted, left)
    heads = sum(any(m.index.shape[1] > 1 and m.kind == "out" for m in g.members) for g in groups)
    return (
        f"| {name} | {len(groups)} | {sum(groups.sizes.values())} | {heads} | {len(groups.rejected)} | {left[0] / dense[0]:.2f} | "
        f"{left[1] / dense[1]:.2f} | {errors[0]:.0e} | {errors[1]:.0e} | {'yes' if same else 'NO'} | {traced:.1f} |",
        same and errors[0] <= 1e-12 and errors[1] <= 1e-5,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks; all of them by default")
    names = parser.parse_args().names or list(ZOO)
    warnings.simplefilter("ignore")
    columns = ["network", "groups", "units", "with several slices a unit", "rejected layers", "params", "MACs"]
    columns += ["float64", "float32", "reloads", "trace s"]
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    failed = []
    for name in names:
        try:
            row, agrees = measure(name)
        except Exception as error:
            row = f"| {name} | {type(error).__name__}: {str(error)[:400]} |"
            agrees = isinstance(error, plp.PruneError) and name in REFUSED
        print(row, flush=True)
        failed += [] if agrees else [name]
    told = f"{len(names) - len(failed)} of {len(names)} networks agree, or are refused as they have to be"
    print(f"\n{told}; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
