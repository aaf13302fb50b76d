"""LightningDataModules of the recipes."""

from pl_prune.data.digits import Digits as Digits
