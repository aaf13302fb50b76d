"""Learned scores of whole channels inside fits: what is left can be sliced, to the budget."""

from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from refusal import expect_refusal
from test_resume import Loader, Steady

import pl_prune as plp


def resumable_fit(callback: plp.ScoreLearning, *others: Callback, ckpt_path=None) -> tuple[plp.ScoreLearning, Steady]:
    module = Steady()
    module.validation_step = None
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", enable_checkpointing=bool(others), callbacks=[callback, *others], **settings
    )
    trainer.fit(module, Loader(), ckpt_path=ckpt_path)
    return callback, module


@pytest.mark.parametrize("target", ["groups", "params", "macs"])
@pytest.mark.parametrize("s2ap", [False, True], ids=["plain", "s2ap"])
def test_a_network_of_learned_channels_is_sliced_to_its_budget(fit, tmp_path, target, s2ap):
    channels = plp.Channels(target=target)
    if s2ap:
        callback = plp.S2AP(0.5, plp.HARP(), gamma=0.05, warmup_epochs=0, channels=channels)
    else:
        callback = plp.ScoreLearning(0.5, channels=channels)
    module, _ = fit(callback, logger=CSVLogger(tmp_path, name="run", version="one"))
    groups, keep = callback.units
    size, left = sum(groups.sizes.values()), sum(int(k.sum()) for k in keep.values())
    params, macs = groups.cost(keep)
    whole_params, whole_macs = groups.cost({})
    found = {"groups": 1 - left / size, "params": 1 - params / whole_params, "macs": 1 - macs / whole_macs}[target]
    assert 0.5 <= found < 0.6

    module.eval()
    x = torch.randn(5, 1, 8, 8)
    small = plp.load_shrunk(TinyModule(), tmp_path / "run" / "one" / "small.safetensors").eval()
    torch.testing.assert_close(small(x), module(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == params
    assert sum(p.numel() for p in module.parameters()) == whole_params
    for name, mask in callback.masks.items():
        assert not dict(module.named_parameters())[name][~mask].any(), name


def test_a_resumed_fit_of_channels_ends_as_if_it_had_not_been(tmp_path):
    def make() -> plp.S2AP:
        return plp.S2AP(0.5, plp.HARP(), gamma=0.05, warmup_epochs=0, channels=plp.Channels(shrink_at_end=False))

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight, module = resumable_fit(make(), saver)
    again, resumed = resumable_fit(make(), ckpt_path=tmp_path / "step=4.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert straight.masks.digest() == again.masks.digest()
    assert straight.masks.sparsity() > 0.3


def test_a_checkpoint_within_the_fit_is_the_network_of_its_masks(fit, tmp_path):
    callback = plp.ScoreLearning(0.5, channels=plp.Channels())
    module, _ = fit(callback, ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
    twin = TinyModule()
    twin.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(twin.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-6)


def test_channels_that_cannot_be_learned_are_refused(fit):
    with pytest.raises(plp.PruneError, match="Expected target"):
        plp.Channels(target="flops")
    with pytest.raises(plp.PruneError, match="Expected channels"):
        plp.ScoreLearning(channels="macs")
    with pytest.raises(plp.PruneError, match="found RLTH"):
        fit(plp.ScoreLearning(0.5, plp.RLTH(), channels=plp.Channels()))
    with pytest.raises(plp.PruneError, match="can go, with a unit left"):
        fit(plp.ScoreLearning(0.999, channels=plp.Channels()))


def test_masks_of_whole_units_are_kept_where_norms_and_biases_have_them_too(fit, tmp_path):
    run = {"logger": CSVLogger(tmp_path, name="run", version="one"), "enable_checkpointing": False}
    module, _ = fit(plp.ScoreLearning(0.5, channels=plp.Channels()), plp.RunRecord(), **run)
    file = str(tmp_path / "run" / "one" / "masks.safetensors")
    masks = plp.load_masks(file)
    assert any(name.endswith("bias") for name in masks)
    callback = plp.PruneAtInit(masks=file)
    tuned, _ = fit(callback)
    assert callback.masks == masks
    live = dict(tuned.named_parameters())
    assert not any(live[name][~mask].any() for name, mask in masks.items())
    kept = masks["net.3.weight"]
    assert not torch.equal(live["net.3.weight"][kept], module.get_parameter("net.3.weight")[kept])
    with expect_refusal("masks of single weights", "whole units", "`control`"):
        fit(plp.PruneAtInit(masks=file, control="shuffle"))
