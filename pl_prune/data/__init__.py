"""LightningDataModules of the recipes."""

from pl_prune.data.cityscapes import Cityscapes as Cityscapes
from pl_prune.data.coco import COCO as COCO
from pl_prune.data.digits import Digits as Digits
from pl_prune.data.div2k import DIV2K as DIV2K
from pl_prune.data.folders import ImageNet as ImageNet
from pl_prune.data.folders import TinyImageNet as TinyImageNet
from pl_prune.data.small import CIFAR as CIFAR
from pl_prune.data.small import MNIST as MNIST
from pl_prune.data.small import SVHN as SVHN
from pl_prune.data.squad import SQuAD as SQuAD
from pl_prune.data.text_files import TextFiles as TextFiles
