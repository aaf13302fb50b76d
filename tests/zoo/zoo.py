"""Networks that other people wrote, each in the LightningModule that a user would put around it, with random data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, Net
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pl_prune as plp

models = pytest.importorskip("torchvision.models")
CLASSES = 4


class Classifier(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Detector(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        return sum(self.network(images, targets).values())

    def scoring_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.network.train()  # in evaluation mode torchvision's detectors return boxes, not losses
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


class TextClassifier(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Tokens(Dataset[Any]):
    """Random tokens in the place of `WikiText2`."""

    vocabulary = 50

    def __init__(self, download: bool = True) -> None:
        self.data = torch.randint(self.vocabulary, (40, 9))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index, :-1], self.data[index, 1:]


class Case(NamedTuple):
    """A module, its training data where it brings none, and what to prune."""

    module: LightningModule
    loader: DataLoader[Any] | None = None
    select: plp.Select = plp.Select()


def _images(network: nn.Module, size: int = 32, channels: int = 3) -> Case:
    data = TensorDataset(torch.randn(8, channels, size, size), torch.arange(8) % CLASSES)
    return Case(Classifier(network), DataLoader(data, batch_size=4))


def vision_transformer() -> Case:
    """The module as torchvision builds it: with a head of zeros."""
    return _images(models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES))


def _vision_transformer_with_a_head() -> Case:
    case = vision_transformer()
    nn.init.normal_(case.module.network.heads.head.weight, std=0.02)
    return case


def _convnext() -> Case:
    blocks = [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 2)]
    return _images(models.ConvNeXt(blocks, layer_scale=0.1, num_classes=CLASSES))


def _detector() -> Case:
    network = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    network.transform.fixed_size = (64, 64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 50.0]]), "labels": torch.tensor([1, 2])}
    scenes: Any = [(torch.rand(3, 64, 64), target) for _ in range(8)]
    return Case(
        Detector(network), DataLoader(scenes, batch_size=4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    )


def _timm() -> Case:
    return _images(pytest.importorskip("timm").create_model("test_resnet", pretrained=False, num_classes=CLASSES))


def _bert() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    sentences: Any = [
        {"input_ids": torch.randint(50, (8,)), "attention_mask": torch.ones(8).long(), "labels": torch.tensor(i % 2)}
        for i in range(8)
    ]
    network = transformers.BertForSequenceClassification(config)
    return Case(TextClassifier(network), DataLoader(sentences, batch_size=4))


ZOO: dict[str, Callable[[], Case]] = {
    "`BoringModel`": lambda: Case(BoringModel()),
    "`BoringModel` with `output_layer=True`": lambda: Case(BoringModel(), select=plp.Select(output_layer=True)),
    "`ManualOptimBoringModel`": lambda: Case(ManualOptimBoringModel()),
    "`Net`": lambda: _images(Net(), 28, 1),
    "`LightningTransformer`": lambda: Case(LightningTransformer(Tokens.vocabulary)),
    "`LightningLSTM`": lambda: Case(LightningLSTM(Tokens.vocabulary)),
    "`resnet18`": lambda: _images(models.resnet18(num_classes=CLASSES)),
    "`mobilenet_v3_small`": lambda: _images(models.mobilenet_v3_small(num_classes=CLASSES)),
    "`efficientnet_b0`": lambda: _images(models.efficientnet_b0(num_classes=CLASSES)),
    "`ConvNeXt`": _convnext,
    "`SwinTransformer`": lambda: _images(
        models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)
    ),
    "`VisionTransformer`, head drawn anew": _vision_transformer_with_a_head,
    "`ssdlite320_mobilenet_v3_large` with `scoring_step`": _detector,
    "`test_resnet` (timm)": _timm,
    "`BertForSequenceClassification` (transformers)": _bert,
}
