"""Whatever is put together ends in exactly the sparsity that was asked for, or in a `PruneError`."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import pytest
import torch
from fake_module import tiny_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

import pl_prune as plp
from pl_prune.core.types import prune_count

STEPS = 4


class Drawn(NamedTuple):
    widths: list[int]
    norm: bool
    tied: bool
    frozen: int
    optimizer: str
    accumulate: int


class Net(LightningModule):
    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten()]
        before = 64
        for width in drawn.widths:
            layers += [nn.Linear(before, width), *([nn.BatchNorm1d(width)] if drawn.norm else []), nn.ReLU()]
            before = width
        self.net = nn.Sequential(*layers, nn.Linear(before, 4))
        linears = [m for m in self.net if isinstance(m, nn.Linear)]
        if drawn.tied and len(linears) > 2 and linears[1].weight.shape == linears[2].weight.shape:
            linears[2].weight = linears[1].weight
        for linear in linears[: drawn.frozen]:
            linear.weight.requires_grad_(False)
        self.drawn = drawn

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        params = [p for p in self.parameters() if p.requires_grad]
        kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop}[
            self.drawn.optimizer
        ]
        return kind(params, 0.05, weight_decay=0.1)


modules = st.builds(
    Drawn,
    widths=st.lists(st.sampled_from([1, 2, 6, 6]), min_size=1, max_size=3),
    norm=st.booleans(),
    tied=st.booleans(),
    frozen=st.sampled_from([0, 0, 0, 1, 2]),
    optimizer=st.sampled_from(["SGD", "AdamW", "RMSprop"]),
    accumulate=st.sampled_from([1, 2]),
)
often = [None] * 6
sparsities = st.one_of(*[st.integers(0, 980).map(lambda n: n / 1000)] * 3, st.sampled_from([0.999, 1 / 3, 1.0, -0.1]))
criteria = st.sampled_from([
    plp.Random(), plp.Magnitude(), plp.SNIP(), plp.GraSP(), plp.SynFlow(rounds=3), plp.FisherPruning(), plp.GaussNewtonDiagonal(probes=2)
])  # fmt: skip
floors = st.sampled_from([0] * 6 + [1, 3])
allocations = st.tuples(st.sampled_from([plp.Global, plp.Layerwise, plp.ERK]), floors, floors, floors)
patterns = st.sampled_from([*often, ["net.*"], ["net.1"], ["net.[1-4]"], ["*.weight"], ["nothing"]])
selections = st.tuples(
    patterns, st.sampled_from([*often, ["net.1"], ["net.*"]]), st.booleans(), st.booleans(), st.booleans()
)
schedules = st.tuples(
    st.sampled_from([plp.OneShot, plp.Cubic, plp.Linear, plp.Exponential]),
    st.integers(0, 2),
    st.sampled_from([1, 1, 1, 2, 3]),
    st.integers(1, 2),
)
company = st.sampled_from([
    lambda: [], lambda: [EMAWeightAveraging(decay=0.5)], lambda: [EMAWeightAveraging(update_starting_at_step=2)],
    lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1)], lambda: [plp.BatchNormWarmup(batches=1)],
])  # fmt: skip


def make_pruner(gradual, criterion, allocation, selection, sparsity, schedule, rewind_to):
    kind, rows, cols, layer = allocation
    include, exclude, output, first, frozen = selection
    common = {
        "allocation": kind(min_keep_rows=rows, min_keep_cols=cols, min_per_layer=layer),
        "select": plp.Select(include, exclude, output_layer=output, first_layer=first, frozen=frozen),
        "samples": plp.Samples(per_class=2, batch_size=3),
    }
    if not gradual:
        return plp.PruneAtInit(criterion, sparsity, **common)
    cls, start, length, every = schedule
    plan = cls(sparsity, start) if cls is plp.OneShot else cls(sparsity, start, start + length, every)
    return plp.GradualPruning(criterion, plan, rewind_to=rewind_to, **common)


@pytest.mark.filterwarnings("ignore")
def test_exactly_what_was_asked_or_a_refusal():
    outcomes: list[float] = []
    refusals: list[str] = []

    @settings(
        max_examples=int(os.environ.get("PL_PRUNE_DRAWS", "200")),
        derandomize="PL_PRUNE_DRAWS" not in os.environ,
        deadline=None,
        database=None,
    )
    @given(
        drawn=modules, gradual=st.booleans(), criterion=criteria, allocation=allocations, selection=selections, sparsity=sparsities,
        schedule=schedules, rewind_to=st.sampled_from([None, None, None, 0, 1]), company=company, first=st.booleans(),
    )  # fmt: skip
    def draw(drawn, gradual, criterion, allocation, selection, sparsity, schedule, rewind_to, company, first):
        module = Net(drawn)
        try:
            pruner = make_pruner(gradual, criterion, allocation, selection, sparsity, schedule, rewind_to)
            trainer = make_trainer(drawn, [pruner, *company()] if first else [*company(), pruner])
            trainer.fit(module, tiny_loader())
        except plp.PruneError as error:
            refusals.append(str(error))
            return
        outcomes.append(sparsity)
        assert trainer.global_step >= STEPS  # SWA passes once more over the data for the batch norms
        assert_exact(module, pruner, sparsity)

    draw()
    assert len(outcomes) > 50 < len(refusals)
    assert all(re.fullmatch(r"(?s).*[Ee]xpected .+; found .+\. \S.+", message) for message in refusals)


def make_trainer(drawn: Drawn, callbacks: list) -> Trainer:
    return Trainer(
        max_epochs=2, limit_train_batches=2 * drawn.accumulate, accumulate_grad_batches=drawn.accumulate, callbacks=callbacks,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def assert_exact(module: Net, pruner: plp.PruneAtInit | plp.GradualPruning, sparsity: float) -> None:
    counts = pruner.masks.counts().values()
    assert sum(size - kept for kept, size in counts) == prune_count(sparsity, sum(size for _, size in counts))
    for name, weight in module.named_parameters():
        if name in pruner.masks:
            assert not bool(weight[~pruner.masks[name]].any())
        elif name.endswith("weight"):
            assert bool(weight.any())
