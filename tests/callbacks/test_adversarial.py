from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

sys.path.insert(0, str(Path(__file__).parent))
from launch import launch
from refusal import expect_refusal
from robust_job import EPS, Classifier, evaluated, loader, trainer_of

import pl_prune as plp
from pl_prune.callbacks import bridge
from pl_prune.data import Digits
from pl_prune.models import ConvNet, ImageClassifier

TRADES = plp.TRADES(EPS, EPS / 4, 3)
PGDAT = plp.PGDAT(EPS, EPS / 4, 3)
FAST = plp.FastAT(EPS, 1.25 * EPS)


@pytest.fixture
def fit(tmp_path):
    def run(*callbacks, module=None, data=None, ckpt_path=None, **settings):
        seed_everything(3, verbose=False)
        module = Classifier() if module is None else module
        trainer = trainer_of(tmp_path, *callbacks, **settings)
        trainer.fit(module, data or loader(), loader(16), ckpt_path=ckpt_path)
        return module, trainer

    return run


def weights(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_without_an_attack_nothing_changes(fit):
    plain, _ = fit(module=Classifier(dropout=0.3))
    found, _ = fit(plp.AdversarialTraining(plp.CrossEntropy()), module=Classifier(dropout=0.3))
    assert same(weights(plain), weights(found))


def published(module, loss, epochs=2):
    """TRADES written as a plain loop over the same batches, clean logits computed anew wherever they are needed."""
    optimizer = module.configure_optimizers()
    data = loader()
    callback = plp.AdversarialTraining(loss)
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(data):
            x = x.double()
            noise = torch.empty_like(x).normal_(std=0.001, generator=callback._generator((epoch, i), x.device))
            module.eval()
            moved = x + noise
            for _ in range(loss.steps):
                moved = moved.detach().requires_grad_()
                aim = kl_div(log_softmax(module.net(moved), 1), softmax(module.net(x), 1), reduction="sum")
                (g,) = torch.autograd.grad(aim, moved)
                moved = torch.min(torch.max(moved.detach() + loss.step_size * g.sign(), x - loss.eps), x + loss.eps)
                moved = moved.clamp(0, 1)
            module.train()
            optimizer.zero_grad()
            logits = module.net(x)
            robust = kl_div(log_softmax(module.net(moved.detach()), 1), softmax(logits, 1), reduction="batchmean")
            (cross_entropy(logits, y) + loss.beta * robust).backward()
            optimizer.step()
    return module


def test_trades_is_the_published_loop(fit):
    found, trainer = fit(plp.AdversarialTraining(TRADES), precision="64-true")
    expected = published(Classifier().double(), TRADES)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-9, atol=1e-10)
    assert not same(weights(found), weights(fit(precision="64-true")[0]))
    assert {"train/loss", "adversarial/loss", "adversarial/acc"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["adversarial/loss"] > trainer.callback_metrics["train/loss"]


@pytest.mark.parametrize("loss", [PGDAT, FAST], ids=["PGDAT", "FastAT"])
def test_the_step_gets_adversarial_examples(fit, loss):
    module, trainer = fit(plp.AdversarialTraining(loss), module=Classifier(dropout=0.3))
    plain, _ = fit(module=Classifier(dropout=0.3))
    assert len(module.seen) == len(plain.seen) == 8
    for moved, x in zip(module.seen, plain.seen, strict=True):
        away = (moved - x).abs().max()
        assert 0.5 * EPS < away <= EPS + 1e-6
        assert moved.min() >= 0
        assert moved.max() <= 1
    assert 0 <= trainer.callback_metrics["adversarial/acc"] <= 1
    assert trainer.callback_metrics["adversarial/loss"] > 0


def test_the_modules_random_stream_is_its_own(fit):
    ends = []
    for callbacks in ((), (plp.AdversarialTraining(PGDAT),)):
        fit(*callbacks, module=Classifier(dropout=0.3))
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


class PowerCut(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("loss", [TRADES, FAST], ids=["TRADES", "FastAT"])
def test_a_resumed_run_is_the_uninterrupted_one(fit, loss, tmp_path):
    whole, _ = fit(plp.AdversarialTraining(loss), max_epochs=3)
    module = Classifier()
    saves = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(plp.AdversarialTraining(loss), PowerCut(6), saves, module=module, max_epochs=3, enable_checkpointing=True)
    assert "training_step" not in vars(module)
    again, _ = fit(plp.AdversarialTraining(loss), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(whole), weights(again))


def test_the_module_is_given_back(fit):
    callback = plp.AdversarialTraining(TRADES)
    module, _ = fit(callback)
    assert "training_step" not in vars(module)
    assert set(module.state_dict()) == set(Classifier().state_dict())
    first = weights(module)
    fit(callback, module=module)
    assert not same(first, weights(module))
    assert "training_step" not in vars(module)
    assert not module._forward_hooks
    own = module.training_step
    module.training_step = own
    fit(callback, module=module)
    assert vars(module)["training_step"] is own


def test_accumulated_batches_are_one_batch(fit):
    callbacks = plp.AdversarialTraining(PGDAT), plp.AdversarialTraining(PGDAT)
    frozen = [Classifier() for _ in range(2)]
    for module in frozen:
        module.net[1] = nn.Identity()  # batch norm sees the size of batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pl_prune.adversarial.attacks.random_in_ball", lambda x, *_: torch.zeros_like(x))  # by batch
        one, _ = fit(callbacks[0], module=frozen[0], max_epochs=1)
        two, _ = fit(callbacks[1], module=frozen[1], max_epochs=1, data=loader(batch_size=8), accumulate_grad_batches=2)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [TRADES, PGDAT], ids=["TRADES", "PGDAT"])
def test_bfloat16_trains_every_weight(fit, loss):
    module, _ = fit(plp.AdversarialTraining(loss), precision="bf16-mixed", max_epochs=1, gradient_clip_val=0.1)
    fresh = Classifier()
    for (name, p), q in zip(module.named_parameters(), fresh.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert not torch.equal(p, q), name


class Silent(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("loss", [TRADES, PGDAT], ids=["TRADES", "PGDAT"])
def test_compiled_modules(fit, loss):
    plain, _ = fit(plp.AdversarialTraining(loss), max_epochs=1)
    module = Silent()
    fit(plp.AdversarialTraining(loss), module=torch.compile(module, backend="eager"), max_epochs=1)
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-4, atol=1e-5)


class DictStep(Classifier):
    def training_step(self, batch):
        return {"loss": super().training_step(batch, 0), "more": 1}


def test_steps_that_return_a_dict(fit):
    assert same(
        weights(fit(plp.AdversarialTraining(TRADES), module=DictStep())[0]),
        weights(fit(plp.AdversarialTraining(TRADES))[0]),
    )


class Inner(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


def test_a_step_that_goes_around_forward_is_trained_and_told(fit):
    with pytest.warns(UserWarning, match=r"Inner.training_step does not call self\(images\)"):
        module, _ = fit(plp.AdversarialTraining(TRADES), module=Inner(), max_steps=1)
    expected, _ = fit(plp.AdversarialTraining(TRADES), max_steps=1)
    torch.testing.assert_close(dict(module.named_parameters()), dict(expected.named_parameters()))
    assert int(module.net[1].num_batches_tracked) == int(expected.net[1].num_batches_tracked) + 1


class Named(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(x=batch[0]), batch[1])


def test_images_may_be_given_by_name(fit):
    assert same(
        weights(fit(plp.AdversarialTraining(TRADES), module=Named())[0]),
        weights(fit(plp.AdversarialTraining(TRADES))[0]),
    )


class Standardising(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self((batch[0] - 0.5) / 0.2), batch[1])


@pytest.mark.parametrize("loss", [TRADES, PGDAT], ids=["TRADES", "PGDAT"])
def test_a_step_that_standardises_is_refused(fit, loss):
    module = Standardising()
    with expect_refusal("Standardising.training_step to call self(images)", "NormalizedModel"):
        fit(plp.AdversarialTraining(loss), module=module)
    assert not module._forward_hooks
    with pytest.warns(UserWarning, match=r"does not call self\(images\)"):
        fit(plp.AdversarialTraining(loss), module=Inner(), max_steps=1)


class Skipping(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("loss", [TRADES, PGDAT], ids=["TRADES", "PGDAT"])
def test_a_step_may_skip_a_batch(fit, loss):
    module, _ = fit(plp.AdversarialTraining(loss), module=Skipping(), max_epochs=1)
    assert len(module.seen) == 3


class Manual(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization(fit):
    manual, _ = fit(plp.AdversarialTraining(PGDAT), module=Manual())
    assert same(weights(manual), weights(fit(plp.AdversarialTraining(PGDAT))[0]))
    with expect_refusal("Manual optimizes manually", "PGDAT"):
        fit(plp.AdversarialTraining(TRADES), module=Manual())


def test_gradual_pruning_of_an_adversarially_trained_network(fit):
    pruner = plp.GradualPruning(plp.Magnitude(), plp.Cubic(0.8, end=6, every=2))
    module, _ = fit(plp.AdversarialTraining(TRADES), pruner)
    assert plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in pruner.masks}) == pruner.masks
    assert pruner.masks.sparsity() == pytest.approx(0.8, abs=0.01)


def test_scores_are_those_of_the_robust_loss(fit):
    samples = plp.Samples(total=16)
    pruners = [plp.PruneAtInit(plp.SNIP(), 0.5, bn_warmup="never", samples=samples) for _ in range(2)]
    fit(pruners[0])
    fit(plp.AdversarialTraining(TRADES), pruners[1])
    assert pruners[0].masks != pruners[1].masks


@pytest.mark.parametrize("loss", [TRADES, PGDAT], ids=["TRADES", "PGDAT"])
@pytest.mark.parametrize(
    "criterion", [plp.SNIP(), plp.IterSNIP(rounds=4), plp.FisherDiagonal()], ids=lambda c: type(c).__name__
)
def test_scores_do_not_depend_on_the_size_of_batches(fit, loss, criterion):
    pruners = []
    for size in (16, 5):
        samples = plp.Samples(total=16, batch_size=size)
        pruners.append(plp.PruneAtInit(criterion, 0.5, bn_warmup="never", samples=samples))
        fit(plp.AdversarialTraining(loss), pruners[-1], max_steps=1, precision="64-true")
    assert pruners[0].masks == pruners[1].masks


def test_every_round_of_a_criterion_attacks_the_network_of_that_round(fit, monkeypatch):
    found = []
    examples = plp.PGDAT.examples

    def counted(self, model, *args):
        if not model.training:
            found.append(int(sum((p == 0).sum() for p in model.parameters())))
        return examples(self, model, *args)

    monkeypatch.setattr(plp.PGDAT, "examples", counted)
    pruner = plp.PruneAtInit(plp.IterSNIP(rounds=4), 0.5, bn_warmup="never", samples=plp.Samples(total=16))
    fit(plp.AdversarialTraining(PGDAT), pruner, max_steps=1)
    assert len(set(found)) >= 4


def test_an_average_of_weights(fit):
    average = EMAWeightAveraging(decay=0.5)
    module, _ = fit(plp.AdversarialTraining(TRADES), average)
    assert "training_step" not in vars(module)
    assert not same(weights(module), weights(fit(plp.AdversarialTraining(TRADES))[0]))


class Sharing(Callback):
    """Asks for the examples before the step does, as a callback that perturbs weights would."""

    def __init__(self, training):
        self.training, self.got = training, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.got.append(self.training.examples(trainer, pl_module, batch))


def test_callbacks_share_the_examples_of_a_batch(fit):
    training = plp.AdversarialTraining(PGDAT)
    sharing = Sharing(training)
    module, _ = fit(sharing, training)
    assert all(one is two for one, two in zip(sharing.got, module.seen, strict=True))
    assert same(weights(module), weights(fit(plp.AdversarialTraining(PGDAT))[0]))


def test_who_asks_first_has_no_influence_on_precision(fit):
    training = plp.AdversarialTraining(PGDAT)
    module, _ = fit(Sharing(training), training, precision="bf16-mixed")
    assert same(weights(module), weights(fit(plp.AdversarialTraining(PGDAT), precision="bf16-mixed")[0]))


class Again:
    """A loader of one batch, twice."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        return iter([self.batch, self.batch])


def test_the_same_tensor_again_is_attacked_again(fit):
    module, _ = fit(plp.AdversarialTraining(PGDAT), data=Again(next(iter(loader()))))
    assert len({float(x.double().sum()) for x in module.seen}) == 4


class Normalised(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].mul_(2).sub_(1)


def test_what_cannot_be_trained_is_refused(fit):
    with expect_refusal("[0, 1]", "NormalizedModel", "standardise"):
        fit(Normalised(), plp.AdversarialTraining(TRADES))
    with expect_refusal("found several"):
        fit(plp.AdversarialTraining(TRADES), plp.AdversarialTraining(FAST))
    with expect_refusal("batches (images, labels)", "dict"):
        fit(plp.AdversarialTraining(TRADES), data=Again({"x": torch.rand(2, 1, 8, 8)}))
    with expect_refusal("loss to be a RobustLoss", "the class TRADES"):
        plp.AdversarialTraining(plp.TRADES)


class TwoSets(Classifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def test_robust_accuracy_while_training_chooses_the_checkpoint(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, monitor="val/robust_acc", mode="max")
    evaluation = plp.RobustnessEvaluation(eps=0.01, preset="pgd", every_n_epochs=1)
    module, trainer = fit(plp.AdversarialTraining(FAST), evaluation, saves, enable_checkpointing=True)
    x, y = loader(16).dataset.tensors
    assert trainer.callback_metrics["val/robust_acc"] == pytest.approx(
        plp.robust_accuracy(module, x, y, eps=0.01, preset="pgd").robust
    )
    assert saves.best_model_path
    assert not list(tmp_path.rglob("robustness*"))
    with expect_refusal("eps above 0"):
        plp.RobustnessEvaluation(eps=0)
    with expect_refusal("images"):
        plp.RobustnessEvaluation(images=0)
    average = EMAWeightAveraging(decay=0.5)
    with expect_refusal("before EMAWeightAveraging", "Swap the two"):
        fit(average, evaluation)
    fit(evaluation, average, max_epochs=1)
    trainer_of(tmp_path, evaluation).test(module, [loader()], verbose=False)
    assert evaluation.result.total == 64
    with expect_refusal("one DataLoader", "list of 2"):
        trainer_of(tmp_path, evaluation).test(TwoSets(), [loader(), loader()], verbose=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch([Path(__file__).with_name("robust_job.py"), folder])
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_judge_as_one(ranks, tmp_path):
    folder, results = ranks
    alone = evaluated(tmp_path, Classifier()).result
    for result in results:
        assert result["flags"] == list(alone.flags)
        assert result["robust"] == alone.robust
    assert 0 < alone.robust < alone.clean
    written = [json.loads((f / "robustness.json").read_text()) for f in (folder / "evaluation", tmp_path)]
    assert written[0] == written[1] == alone.to_dict()
    chunks = [sorted((f / "robustness").rglob("chunk_*.json")) for f in (folder / "evaluation", tmp_path)]
    assert [f.read_text() for f in chunks[0]] == [f.read_text() for f in chunks[1]]
    assert len(chunks[0]) == 4


def test_two_ranks_train_one_network(ranks):
    _, (one, two) = ranks
    assert same(one["weights"], two["weights"])
    fresh = Classifier()
    assert all(not torch.equal(one["weights"][name], p) for name, p in fresh.named_parameters())
    assert not one["step"]
    assert "adversarial/loss" in one["metrics"]


def test_training_on_digits_gains_robust_accuracy(tmp_path):
    found = {}
    for name, loss in {"plain": plp.CrossEntropy(), "TRADES": plp.TRADES(0.1, 0.05, 3)}.items():
        seed_everything(0, verbose=False)
        module = ImageClassifier(ConvNet(width=8))
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)
        evaluation = plp.RobustnessEvaluation(eps=0.1, preset="pgd")
        trainer = trainer_of(tmp_path, plp.AdversarialTraining(loss), evaluation, max_epochs=4)
        data = Digits()
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        found[name] = evaluation.result
    assert found["plain"].clean > 0.95
    assert found["TRADES"].clean > 0.9
    paired = found["TRADES"].compare(found["plain"])
    assert paired.difference > 0.2
    assert paired.p_value < 1e-6


@pytest.mark.parametrize(("loss", "passes"), [(PGDAT, 1), (TRADES, 2)], ids=["PGDAT", "TRADES"])
def test_a_warm_up_does_not_measure_the_passes_of_the_attack(fit, monkeypatch, loss, passes):
    found = []
    pooled = bridge.pooled_moments

    def spy(*args):
        moments, count = pooled(*args)
        found.append(float(next(iter(moments.values()))[0, 0]) / count)
        return moments, count

    monkeypatch.setattr(bridge, "pooled_moments", spy)
    for callbacks in ((), (plp.AdversarialTraining(loss),)):
        fit(*callbacks, plp.PruneAtInit(plp.Magnitude(), 0.5, bn_warmup="always", warmup_batches=1), max_steps=1)
    assert found[1] == passes * found[0] > 0
