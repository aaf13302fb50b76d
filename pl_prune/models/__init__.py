"""Networks and the LightningModule of the recipes."""

from pl_prune.models.classifier import ImageClassifier as ImageClassifier
from pl_prune.models.convnet import ConvNet as ConvNet
