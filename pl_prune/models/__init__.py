"""Networks and the LightningModule of the recipes."""

from pl_prune.models.classifier import ImageClassifier as ImageClassifier
from pl_prune.models.convnet import ConvNet as ConvNet
from pl_prune.models.resnet import ResNet as ResNet
from pl_prune.models.resnet import WideResNet as WideResNet
from pl_prune.models.vgg import VGG as VGG
from pl_prune.models.vit import ViT as ViT
