"""Handwritten digits by an MLP; a script with its settings in one nested dictionary, and a Trainer built by hand.

python train.py optimizer.lr=0.01 trainer.max_epochs=5
"""

import sys
from ast import literal_eval

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONFIG = {
    "seed": 1,
    "data": {"batch_size": 64},
    "model": {"hidden": 128, "dropout": 0.1},
    "optimizer": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "trainer": {"max_epochs": 15, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    "save_as": "digits.ckpt",
}


def override(config, assignments):
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        *groups, key = path.split(".")
        place = config
        for group in groups:
            place = place[group]
        try:
            place[key] = literal_eval(value)
        except (SyntaxError, ValueError):
            place[key] = value
    return config


class Mlp(LightningModule):
    def __init__(self, model, optimizer):
        super().__init__()
        self.save_hyperparameters()
        hidden = model["hidden"]
        self.body = nn.Sequential(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(model["dropout"])
        )
        self.body.append(nn.Linear(hidden, hidden)).append(nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x)), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.hparams.optimizer)


def main(config):
    seed_everything(config["seed"])
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    loader = DataLoader(data, **config["data"], shuffle=True)
    callbacks = []
    trainer = Trainer(**config["trainer"], callbacks=callbacks)
    trainer.fit(Mlp(config["model"], config["optimizer"]), loader)
    trainer.save_checkpoint(config["save_as"])


if __name__ == "__main__":
    main(override(CONFIG, sys.argv[1:]))
