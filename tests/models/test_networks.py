from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from refusal import expect_refusal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp
from pl_prune.models import VGG, ConvNet, ImageClassifier, ResNet, ViT, WideResNet

# Millions of parameters as the papers give them.
SIZES = {
    "ResNet-18": (lambda: ResNet(18), 11.17),
    "ResNet-20": (lambda: ResNet(20), 0.27),
    "ResNet-32": (lambda: ResNet(32), 0.466),
    "ResNet-34": (lambda: ResNet(34), 21.28),
    "ResNet-50": (lambda: ResNet(50), 23.5),
    "ResNet-56": (lambda: ResNet(56), 0.855),
    "ResNet-101": (lambda: ResNet(101), 42.5),
    "VGG-16": (lambda: VGG(16), 14.73),
    "VGG-19": (lambda: VGG(19), 20.04),
    "WRN-28-4": (lambda: WideResNet(28, 4), 5.85),
    "WRN-28-10": (lambda: WideResNet(28, 10), 36.5),
    "ConvNet": (ConvNet, 0.094),
    "ViT": (ViT, 2.4),
}


@pytest.mark.parametrize(("make", "millions"), SIZES.values(), ids=SIZES)
def test_sizes_and_shapes(make, millions):
    with torch.device("meta"):
        model = make()
        logits = model(torch.empty(2, 1 if isinstance(model, ConvNet) else 3, 32, 32))
    assert logits.shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_a_resnet_for_imagenet_has_the_tensors_of_torchvisions(depth):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours, theirs = ResNet(depth, 1000, "imagenet"), getattr(torchvision.models, f"resnet{depth}")()
        shapes = [sorted(tuple(t.shape) for t in m.state_dict().values()) for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert ours(torch.empty(1, 3, 224, 224)).shape == (1, 1000)


def test_a_depth_or_width_that_does_not_exist_is_refused():
    for make in (
        lambda: ResNet(19),
        lambda: VGG(11),
        lambda: WideResNet(27),
        lambda: ViT(heads=5),
        lambda: ViT(patch=5),
    ):
        with expect_refusal():
            make()


def test_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    attention = ViT(1, 12, 3).double().blocks[0].attention
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.in_proj_bias.copy_(attention.qkv.bias)
        theirs.out_proj.load_state_dict(attention.proj.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0])


def image_batches(classes: int, n: int = 24) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(n, 3, 8, 8), torch.arange(n) % classes), 12)


def fitted(classes: int, tmp_path, *callbacks) -> Trainer:
    torch.manual_seed(0)
    module = ImageClassifier(ViT(2, 12, 3, 4, 8, classes), classes)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, image_batches(classes), image_batches(classes))
    return trainer


@pytest.mark.parametrize(("classes", "logged"), [(4, False), (20, True)])
def test_top5_accuracy_where_classes_are_many(classes, logged, tmp_path):
    trainer = fitted(classes, tmp_path)
    assert ("val/acc5" in trainer.callback_metrics) == logged
    if logged:
        x, y = image_batches(classes).dataset.tensors
        with torch.no_grad():
            best = trainer.model.eval()(x).topk(5).indices
        assert trainer.callback_metrics["val/acc5"].item() == pytest.approx(
            (best == y[:, None]).any(1).float().mean().item()
        )


@pytest.mark.parametrize("criterion", [plp.SNIP(), plp.FisherPruning(), plp.HutchinsonPruning(probes=2)], ids=repr)
def test_a_vision_transformer_is_pruned(criterion, tmp_path):
    pruner = plp.PruneAtInit(criterion, 0.7)
    fitted(4, tmp_path, pruner)
    assert pruner.masks.sparsity() == pytest.approx(0.7, abs=1e-3)
    names = {name.removeprefix("network.").partition(".")[2] for name in pruner.masks if ".blocks.0." in f".{name}"}
    assert names == {"0.attention.qkv.weight", "0.attention.proj.weight", "0.mlp.0.weight", "0.mlp.2.weight"}
