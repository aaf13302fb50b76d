"""Scores and masks from files, and the controls of a score, inside a fit."""

from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core.controls import inverted


class Steady(TinyModule):
    """The same weights each time, and no randomness while it trains."""

    def __init__(self, classes=4):
        torch.manual_seed(0)
        super().__init__()
        self.net[7] = nn.Identity()
        self.net[9] = nn.Linear(16, classes)


class AtStart(Callback):
    """The weights that training starts with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


class Keep:
    """What a pruner hands over, as `RunRecord` would take it."""

    def __init__(self, pruner):
        self.taken = []
        pruner.keep_scores = lambda scores, about: self.taken.append((scores, about))

    @property
    def scores(self):
        return self.taken[-1][0]


def started(fit, pruner, module=None):
    """Fit a little; return the weights at the start, and the module."""
    start = AtStart()
    module, _ = fit(pruner, start, module=module or Steady(), max_epochs=1)
    return start.weights, module


@pytest.fixture
def snip(fit, tmp_path):
    """A pruned run, and its scores and masks as files."""
    pruner = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK())
    keep = Keep(pruner)
    weights, module = started(fit, pruner)
    scores, about = keep.taken[0]
    plp.save_scores(tmp_path / "s", scores, about)
    plp.save_masks(tmp_path / "m", pruner.masks)
    return pruner, weights, module, str(tmp_path / "s"), str(tmp_path / "m")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_from_a_file_is_the_run_that_the_file_came_from(fit, snip):
    # "never": with a file nothing is scored, and so nothing warms the batch norms up.
    never = {"bn_warmup": "never"}
    pruner = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), **never)
    keep = Keep(pruner)
    _, module = started(fit, pruner)
    scores, masks = snip[3], snip[4]
    plp.save_scores(scores, keep.scores)
    plp.save_masks(masks, pruner.masks)
    for again in (plp.PruneAtInit(sparsity=0.7, allocation=plp.ERK(), scores=scores), plp.PruneAtInit(masks=masks)):
        _, other = started(fit, again)
        assert again.masks == pruner.masks
        assert same(module, other)


def test_one_file_of_scores_gives_any_budget_by_any_allocation(fit, snip):
    pruner, _, _, scores, _ = snip
    held = plp.load_scores(scores)
    for sparsity, allocation in ((0.5, plp.Global()), (0.9, plp.Layerwise())):
        other = plp.PruneAtInit(sparsity=sparsity, allocation=allocation, scores=scores)
        started(fit, other)
        assert other.masks == allocation(held, sparsity)
        assert other.masks != pruner.masks
    default = plp.PruneAtInit(scores=scores)
    started(fit, default)
    assert default.masks == plp.Global()(held, 0.9)


def test_a_network_with_another_head_takes_the_file(fit, snip):
    pruner, _, _, _, masks = snip
    other = plp.PruneAtInit(masks=masks)
    started(fit, other, Steady(classes=7))
    assert other.masks == pruner.masks


def test_a_file_that_does_not_fit_is_refused_before_training(fit, snip, tmp_path):
    _, _, _, scores, masks = snip
    for pruner in (
        plp.PruneAtInit(masks=masks, select=plp.Select(exclude=["net.3"])),
        plp.PruneAtInit(scores=scores, select=plp.Select(exclude=["net.3"])),
    ):
        with expect_refusal(
            "net.3.weight: (8, 8, 3, 3) in the file, not selected in the model",
            "the `select` that the file was made with",
        ):
            fit(pruner)
    with expect_refusal("net.9.weight: (4, 16) in the model alone"):
        fit(plp.PruneAtInit(masks=masks, select=plp.Select(output_layer=True)))
    wide = Steady()
    wide.net[6], wide.net[9] = nn.Linear(72, 20), nn.Linear(20, 4)
    with expect_refusal("net.6.weight: (16, 72) in the file, (20, 72) in the model"):
        fit(plp.PruneAtInit(masks=masks), module=wide)
    with expect_refusal("a file of scores", "one of masks"):
        fit(plp.PruneAtInit(scores=masks))
    with expect_refusal("found none"):
        fit(plp.PruneAtInit(scores=str(tmp_path / "nothing")))
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with expect_refusal("damaged", "not what was written"):
        fit(plp.PruneAtInit(masks=masks))


def test_options_that_exclude_each_other_are_refused(fit, snip):
    _, _, _, scores, masks = snip
    with expect_refusal("masks=", "scores="):
        plp.PruneAtInit(scores=scores, masks=masks)
    with expect_refusal("masks=", "repair"):
        plp.PruneAtInit(masks=masks, on_layer_collapse="repair")
    with expect_refusal("masks=", "invert"):
        plp.PruneAtInit(masks=masks, control="invert")
    with expect_refusal("control", "inverted"):
        plp.PruneAtInit(control="inverted")
    with expect_refusal("sparsity of the masks", "sparsity=0.9", "Leave it out"):
        fit(plp.PruneAtInit(masks=masks, sparsity=0.9))
    agreeing = plp.PruneAtInit(masks=masks, sparsity=0.7)
    started(fit, agreeing)
    assert agreeing.masks.sparsity() == 0.7


def test_scores_of_many_rounds_give_no_budget_below_theirs(fit, tmp_path):
    path = str(tmp_path / "synflow")
    pruner = plp.PruneAtInit(plp.SynFlow(rounds=5), 0.8)
    keep = Keep(pruner)
    started(fit, pruner)
    plp.save_scores(path, *keep.taken[0])
    with expect_refusal("0.8 or more", "last of 5 rounds", "found 0.7"):
        fit(plp.PruneAtInit(sparsity=0.7, scores=path))
    with expect_refusal("one round", "Invert the criterion itself"):
        fit(plp.PruneAtInit(sparsity=0.8, scores=path, control="invert"))
    with expect_refusal("allocation of the 5 rounds", "core.allocate.Global", "found ERK()", "Score again"):
        fit(plp.PruneAtInit(sparsity=0.8, allocation=plp.ERK(), scores=path))
    again = plp.PruneAtInit(sparsity=0.8, scores=path)
    started(fit, again)
    assert again.masks == pruner.masks


def test_shuffled_masks_have_the_layer_counts_and_the_weights_of_the_method(fit, snip):
    pruner, weights, _, scores, masks = snip
    control = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), control="shuffle", control_seed=5)
    found, _ = started(fit, control)
    assert control.masks == pruner.masks.shuffled(5) != pruner.masks
    for name, keep in control.masks.items():
        unpruned = keep & pruner.masks[name]
        assert torch.equal(found[name][unpruned], weights[name][unpruned])
    for other in (
        plp.PruneAtInit(sparsity=0.7, allocation=plp.ERK(), scores=scores, control="shuffle", control_seed=5),
        plp.PruneAtInit(masks=masks, control="shuffle", control_seed=5),
    ):
        started(fit, other)
        assert other.masks == control.masks
        assert "control shuffle (seed 5)" in other.method


def test_reinitialised_weights_are_others_under_the_same_masks(fit, snip):
    pruner, weights, _, _, _ = snip
    dense = Steady().state_dict()
    control = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), control="reinitialise")
    found, _ = started(fit, control)
    assert control.masks == pruner.masks
    for name, weight in weights.items():
        if name not in pruner.masks:
            assert torch.equal(found[name], weight), name
            continue
        kept = pruner.masks[name]
        assert bool((found[name][~kept] == 0).all())
        assert bool((found[name][kept] != weight[kept]).all())
        assert found[name][kept].std().item() == pytest.approx(dense[name].std().item(), rel=0.6)
    kaiming = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), init="kaiming", control="reinitialise")
    started(fit, kaiming)
    drawn = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), init="kaiming")
    started(fit, drawn)
    assert kaiming.masks == drawn.masks


def test_inverted_scores_keep_the_lowest_at_the_layer_counts_of_the_method(fit, snip):
    pruner, _, _, scores, _ = snip
    control = plp.PruneAtInit(plp.SNIP(), 0.7, plp.ERK(), control="invert", on_layer_collapse="warn")
    file = plp.PruneAtInit(sparsity=0.7, allocation=plp.ERK(), scores=scores, control="invert")
    for one in (control, file):
        started(fit, one)
        assert one.masks.counts() == pruner.masks.counts()
        assert one.masks == inverted(pruner.masks, plp.load_scores(scores))


def test_a_criterion_of_many_rounds_is_inverted_by_its_first(fit):
    method, control = (plp.PruneAtInit(plp.SynFlow(rounds=5), 0.5, control=c) for c in (None, "invert"))
    once = plp.PruneAtInit(plp.SynFlow(rounds=1), 0.5)
    keep = Keep(once)
    for pruner in (method, control, once):
        started(fit, pruner)
    assert control.masks == inverted(method.masks, keep.scores)


@pytest.mark.parametrize("kind", ["scores", "masks"])
def test_resume_is_the_uninterrupted_run_and_another_file_is_refused(fit, snip, tmp_path, kind):
    path = snip[3] if kind == "scores" else snip[4]
    pruner = {kind: path, "control": "shuffle"}

    class Crash(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("power cut")

    straight, _ = fit(plp.PruneAtInit(**pruner), module=Steady(), max_epochs=2)
    saver = ModelCheckpoint(tmp_path / "ck", "{epoch}", save_top_k=-1)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(plp.PruneAtInit(**pruner), Crash(), saver, module=Steady(), max_epochs=2, enable_checkpointing=True)
    file = tmp_path / "ck" / "epoch=0.ckpt"
    resumed, _ = fit(plp.PruneAtInit(**pruner), module=Steady(), max_epochs=2, ckpt_path=file)
    assert same(straight, resumed)
    held = plp.load_scores(snip[3])
    if kind == "scores":
        plp.save_scores(path, {name: -score for name, score in held.items()})
    else:
        plp.save_masks(path, plp.Global()(held, 0.7))
    with expect_refusal("settings that the checkpoint's masks were made with", f"{kind} of file"):
        fit(plp.PruneAtInit(**pruner), module=Steady(), max_epochs=2, ckpt_path=file)


def logger(tmp_path, version):
    return CSVLogger(tmp_path, name="logs", version=version)


def test_a_run_records_its_scores_and_nobody_keeps_them(fit, tmp_path):
    pruner = plp.PruneAtInit(plp.SNIP(), 0.8, samples=plp.Samples(total=8))
    fit(plp.RunRecord(), pruner, logger=logger(tmp_path, "one"), module=Steady())
    run = plp.RunFolder(tmp_path / "logs" / "one")
    scores = run.scores()
    assert plp.Global()(scores, 0.8) == pruner.masks == run.masks()
    header = plp.read_header(run.path / "scores.safetensors")
    assert header["meta"]["criterion"]["class_path"] == "pl_prune.criteria.gradient.SNIP"
    assert header["meta"]["samples"]["init_args"]["total"] == 8
    assert (header["meta"]["seed"], header["meta"]["rounds"]) == (3, 1)
    total = sum(p.numel() for p in Steady().parameters())
    assert (header["selected"], header["meta"]["parameters"]) == (1800, total)
    assert len(header["meta"]["weights"]) == len(header["meta"]["data"]) == 64
    masks = plp.read_header(run.path / "masks.safetensors")
    assert (masks["sparsity"], masks["meta"]["method"], masks["meta"]["seed"]) == (0.8, pruner.method, 3)
    assert pruner.keep_scores is None
    assert not any(isinstance(value, dict) and "net.0.weight" in value for value in vars(pruner).values())
    # A run from this run's own files says so.
    again = plp.PruneAtInit(sparsity=0.8, scores=str(run.path / "scores.safetensors"))
    fit(plp.RunRecord(), again, logger=logger(tmp_path, "two"), module=Steady())
    other = plp.RunFolder(tmp_path / "logs" / "two")
    assert other.masks() == run.masks()
    assert plp.read_header(other.path / "scores.safetensors")["meta"]["file"] == header["digest"]


def test_hashes_tell_other_weights_and_other_data(fit):
    def origin(samples=8, seed=0):
        pruner = plp.PruneAtInit(samples=plp.Samples(total=samples, seed=seed), bn_warmup="never")
        keep = Keep(pruner)
        module = Steady()
        with torch.no_grad():
            module.net[9].bias += seed
        started(fit, pruner, module)
        return [keep.taken[0][1][key] for key in ("weights", "data")]

    assert origin() == origin()
    assert origin()[0] == origin(samples=12)[0]
    assert origin()[1] != origin(samples=12)[1]
    assert origin()[0] != origin(seed=1)[0]


def test_a_gradual_run_records_the_scores_of_its_last_change(fit, tmp_path):
    pruner = plp.GradualPruning(plp.Magnitude(), plp.Cubic(final=0.8, start=1, end=6, every=1))
    fit(plp.RunRecord(), pruner, logger=logger(tmp_path, "gradual"), module=Steady())
    run = plp.RunFolder(tmp_path / "logs" / "gradual")
    scores, masks = run.scores(), run.masks()
    assert masks == pruner.masks
    assert set(scores) == set(masks)
    lowest = min(score[masks[name]].min() for name, score in scores.items() if bool(masks[name].any()))
    assert max(score[~masks[name]].max() for name, score in scores.items()) <= lowest


def test_two_callbacks_scores_end_in_one_file(fit, tmp_path):
    first = plp.PruneAtInit(plp.SNIP(), 0.5, select=plp.Select(include=["net.0"]))
    second = plp.PruneAtInit(plp.Magnitude(), 0.5, select=plp.Select(exclude=["net.0"]), name="rest")
    fit(plp.RunRecord(), first, second, logger=logger(tmp_path, "two"), module=Steady())
    run = plp.RunFolder(tmp_path / "logs" / "two")
    assert list(run.scores()) == ["net.0.weight", "net.3.weight", "net.6.weight"]
    assert run.masks() == first.masks.intersect(second.masks)
    meta = plp.read_header(run.path / "scores.safetensors")["meta"]
    assert [m["criterion"]["class_path"].rpartition(".")[2] for m in (meta["before"], meta)] == ["SNIP", "Magnitude"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_dense_run_has_neither_and_scores_of_an_earlier_fit_go(fit, tmp_path):
    run = plp.RunFolder(tmp_path / "logs" / "dense")
    plp.save_scores(run.path / "scores.safetensors", {"a": torch.ones(2)})
    fit(plp.RunRecord(), plp.Dense(), logger=logger(tmp_path, "dense"))
    assert run.finished
    assert run.scores() is None
    assert run.masks() is None
