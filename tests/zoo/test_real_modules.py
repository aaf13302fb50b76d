"""The table of docs/real_modules.md: every module of the zoo under every criterion, pruned exactly or refused."""

from __future__ import annotations

import dataclasses
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_list import concrete
from fingerprint import bits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.demos import lstm, transformer
from refusal import expect_refusal
from zoo import ZOO, Case, Tokens, vision_transformer

import pl_prune as plp

PAGE = Path(__file__).parents[2] / "docs" / "real_modules.md"
CHEAP = {"rounds": 3, "probes": 2}


def tables() -> list[list[list[str]]]:
    """Return the tables of the page, row by row, without the rule below the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(), re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()] for t in found]
    return [[head, *body] for head, _, *body in rows]


OUTCOMES, REASONS = tables()
HEADER = OUTCOMES[0]
WORDS = {reason: words.strip("`") for reason, words, _ in REASONS[1:]}


def cheap(cls: type[plp.Criterion], **settings: Any) -> plp.Criterion:
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in CHEAP.items() if name in fields}, **settings)


def criteria_of(column: str) -> list[plp.Criterion]:
    """Make the criteria of a column, which gives shell patterns of class names and perhaps a setting."""
    quoted = re.findall(r"`(.+?)`", column)
    settings = {name: float(value) for name, value in (q.split("=") for q in quoted if "=" in q)}
    patterns = [q for q in quoted if "=" not in q]
    classes = [cls for cls in concrete(plp.Criterion) if any(fnmatchcase(cls.__name__, p) for p in patterns)]
    return [cheap(cls, **settings) for cls in classes]


def cells() -> Iterator[Any]:
    for name, prunable, *outcomes in OUTCOMES[1:]:
        for column, outcome in zip(HEADER[2:], outcomes, strict=True):
            for criterion in criteria_of(column):
                setting = "-1.0" if "=" in column else ""
                label = f"{name.replace('`', '')}-{type(criterion).__name__}{setting}"
                yield pytest.param(name, int(prunable.replace(",", "")), criterion, outcome, id=label)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    gc.collect()
    gc.freeze()  # the collector would go through all that is imported by now, again and again: a third of the time
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def random_tokens(monkeypatch):
    for demo in (transformer, lstm):
        monkeypatch.setattr(demo, "WikiText2", Tokens)


def build(make: Callable[[], Case]) -> Case:
    seed_everything(0, verbose=False)
    return make()


def fit(case: Case, criterion: plp.Criterion, folder: Path) -> plp.MaskSet:
    """Take one training step under the callback, and return its masks."""
    allocation = plp.Layerwise() if criterion.layerwise_only else plp.Global()
    pruner = plp.PruneAtInit(criterion, 0.5, allocation, case.select, plp.Samples(total=4, batch_size=4))
    trainer = Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[pruner],
    )
    trainer.fit(case.module, case.loader)
    assert trainer.global_step == 1
    return pruner.masks


def check_pruned(module: LightningModule, masks: plp.MaskSet, prunable: int) -> None:
    weights = dict(module.named_parameters())
    assert sum(mask.numel() for mask in masks.values()) == prunable
    assert sum(int((~mask).sum()) for mask in masks.values()) == (prunable + 1) // 2
    for name, mask in masks.items():
        assert torch.equal(weights[name] == 0, ~mask), name
    for name, weight in weights.items():
        assert weight.isfinite().all(), name


def fit_and_listen(case: Case, criterion: plp.Criterion, folder: Path) -> tuple[plp.MaskSet, list[str]]:
    """Fit, and return the masks and the warnings about scores of zero."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*every score is zero in")
        masks = fit(case, criterion, folder)
    return masks, [str(warning.message) for warning in caught if "every score is zero in" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:.*expected a signal path through every layer")
@pytest.mark.parametrize(("name", "prunable", "criterion", "outcome"), list(cells()))
def test_a_module_is_pruned_exactly_or_refused(name, prunable, criterion, outcome, tmp_path):
    case = build(ZOO[name])
    if outcome in ("yes", "yes, warned"):
        masks, heard = fit_and_listen(case, criterion, tmp_path)
        assert len(heard) == (outcome == "yes, warned")
        check_pruned(case.module, masks, prunable)
    else:
        before = {key: bits(value) for key, value in case.module.state_dict().items()}
        with expect_refusal(WORDS[outcome]):
            fit(case, criterion, tmp_path)
        assert {key: bits(value) for key, value in case.module.state_dict().items()} == before


@pytest.mark.filterwarnings("ignore:.*expected a signal path through every layer")
def test_a_head_of_zeros_is_warned_of(tmp_path):
    _, heard = fit_and_listen(build(vision_transformer), plp.SNIP(), tmp_path)
    (message,) = heard
    assert "every score is zero in 9 of 9 layers" in message
    assert "every score is zero in 9 of 9 layers" in PAGE.read_text()


def test_the_page_covers_the_zoo_and_every_criterion_and_explains_each_refusal():
    assert [row[0] for row in OUTCOMES[1:]] == list(ZOO)
    plain = [type(c).__name__ for column in HEADER[2:] if "=" not in column for c in criteria_of(column)]
    assert sorted(plain) == sorted(cls.__name__ for cls in concrete(plp.Criterion))
    assert all(criteria_of(column) for column in HEADER[2:])
    refusals = {cell for row in OUTCOMES[1:] for cell in row[2:]} - {"yes", "yes, warned"}
    assert refusals == set(WORDS)
