"""LightningDataModules of the recipes."""

from pl_prune.data.cifar import CIFAR as CIFAR
from pl_prune.data.digits import Digits as Digits
