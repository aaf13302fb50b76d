"""LightningDataModules of the recipes."""

from pl_prune.data.digits import Digits as Digits
from pl_prune.data.folders import ImageNet as ImageNet
from pl_prune.data.folders import TinyImageNet as TinyImageNet
from pl_prune.data.small import CIFAR as CIFAR
from pl_prune.data.small import MNIST as MNIST
from pl_prune.data.small import SVHN as SVHN
