"""Both sides of every pair on the page about migration."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import partial
from tempfile import TemporaryDirectory

import pytest
import torch
from fragments import PAGES, ROOT, fragments
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_prune.models import ResNet

OLD_FIRST = list(zip(*[iter(fragments("migration", "python"))] * 2, strict=True))


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.fixture(scope="module")
def found():
    """Return what each side of each pair leaves: (old, new) by number."""
    torch.manual_seed(0)
    whole, inputs = ResNet(20, num_classes=10).eval(), torch.rand(4, 3, 16, 16)
    loader = DataLoader(TensorDataset(torch.randn(64, 16), torch.arange(64) % 4), 16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    space = {
        **{"torch": torch, "Trainer": partial(Trainer, logger=False, accelerator="cpu", **quiet), "steps": 4},
        **{"inputs": inputs, "batches": [(inputs, torch.arange(4))]},
        "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }
    sides = []
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.simplefilter("ignore")  # of the other tools
        for side in fragments("migration", "python"):
            seed_everything(1, verbose=False)
            space |= {"module": Module(), "model": deepcopy(whole), "trainer": None}
            exec(side, space)
            if space["trainer"]:
                space["trainer"].fit(space["module"], loader)
            sides.append(dict(space))
    return list(zip(*[iter(sides)] * 2, strict=True))


def zeros(side: dict) -> dict[str, torch.Tensor]:
    return {name: p == 0 for name, p in side["module"].named_parameters() if name.endswith("weight")}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def widths(network: nn.Module) -> list[int]:
    return [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]


def test_the_old_lines_stand_before_the_new_ones():
    assert len(OLD_FIRST) == 7
    for old, new in OLD_FIRST:
        assert old.startswith(("# Lightning\n", "# Torch-Pruning"))
        assert new.startswith("# pl_prune")


@pytest.mark.parametrize("job", [0, 1])
def test_the_same_weights_go_as_with_model_pruning(found, job):
    old, new = (zeros(side) for side in found[job])
    assert sum(int(zero.sum()) for zero in old.values()) == 832
    for name, zero in old.items():
        assert torch.equal(zero, new[name])


def test_amounts_compound_to_the_sparsity_that_is_written_down(found):
    for side in found[2]:
        assert {name: int(zero.sum()) for name, zero in zeros(side).items()} == {
            **{"net.0.weight": 0, "net.4.weight": 0},
            "net.2.weight": 369,  # of 1,024
        }


def test_rows_are_zero_there_and_gone_here(found):
    old, new = found[3]
    rows = {name: int(zero.all(1).sum()) for name, zero in zeros(old).items()}
    assert rows == {"net.0.weight": 8, "net.2.weight": 8, "net.4.weight": 1}
    assert size(old["module"]) == size(Module())
    assert [p.shape[0] for name, p in new["module"].named_parameters() if name.endswith("weight")] == [24, 24, 4]


def test_networks_are_as_wide_as_those_of_torch_pruning(found):
    old, new = found[4]
    assert widths(old["model"]) == widths(new["small"])
    assert (size(old["model"]), old["params"]) == (size(new["small"]), new["params"])
    assert size(new["small"]) < size(new["model"]) / 3


def test_a_network_is_cut_by_taylor_scores_there_and_a_callback_does_it_here(found):
    old, new = found[5]
    assert size(old["model"]) < size(new["model"])
    assert sum(new["module"].net[i].out_features for i in (0, 2)) == 32  # of 64


def test_the_file_holds_the_smaller_network(found):
    old, new = found[6]
    assert isinstance(old["model"], ResNet)
    assert size(new["small"]) < size(new["model"]) / 3


def test_the_readme_leads_here_for_the_eight_cases():
    (table,) = [part for part in PAGES["migration"].split("\n\n") if part.startswith("| Case |")]
    assert table.count("\n") == 9
    assert "[Eight cases, and how to change over](docs/migration.md)" in (ROOT / "README.md").read_text()
