"""Handwritten digits in a loop of plain PyTorch.

python train.py --epochs 10 --save digits.pt
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import pl_prune as plp


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", default="digits.pt")
    parser.add_argument("--sparsity", type=float, default=0.9)
    return parser.parse_args()


def batches_of(x, y, size):
    order = torch.randperm(len(x))
    return [(x[part], y[part]) for part in order.split(size)]


def main():
    args = parse()
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    train, test = slice(0, 1500), slice(1500, None)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    loss_fn = nn.CrossEntropyLoss()

    batch = (x[train], y[train])
    scores = plp.score(model, plp.SNIP(), [batch], lambda model, batch: loss_fn(model(batch[0]), batch[1]))
    masks = plp.Global()(scores, args.sparsity)
    plp.attach_masks(optimizer, model, masks)

    for epoch in range(args.epochs):
        for inputs, labels in batches_of(x[train], y[train], 50):
            optimizer.zero_grad()
            loss_fn(model(inputs), labels).backward()
            optimizer.step()
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
        print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}")

    torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
