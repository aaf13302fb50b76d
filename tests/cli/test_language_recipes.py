"""The recipes of language, run as they are on tiny networks and texts; what HESSO leaves is sliced off without a change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_text
import pytest
import torch
from lightning.pytorch import Trainer

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.data import SQuAD, TextFiles
from pl_prune.models import CausalLanguageModel, QuestionAnswerer

pytest.importorskip("transformers")
RECIPES = Path(__file__).parents[2] / "recipes" / "hesso"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
WINDOW = {"max_length": 24, "doc_stride": 4, "max_query_length": 8}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    return tmp_path


def fit(recipe, network, root, *more):
    given = [
        f"--model.network={network}",
        "--model.pretrained=false",
        f"--data.root={root}",
        f"--data.tokenizer={network}",
    ]
    assert main(["fit", f"--config={RECIPES / recipe}", *given, *QUIET, *more]) == 0
    (result,) = Path().rglob("result.json")
    (small,) = Path().rglob("small.safetensors")
    (checkpoint,) = Path().rglob("last.ckpt")
    return json.loads(result.read_text()), small, torch.load(checkpoint, weights_only=True)["state_dict"]


def agree(make, data, metric, small, weights):
    """The smaller network of the file is measured as the masked one of the checkpoint is."""
    masked = make()
    masked.load_state_dict(weights)
    sliced = plp.load_shrunk(make(), small)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**settings, enable_checkpointing=False)
    found = [trainer.validate(module, data, verbose=False)[0][metric] for module in (masked, sliced)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 0
    return sliced


def test_bert_loses_half_of_its_hidden_units_and_no_head(here):
    network, root = fake_text.bert(here / "bert"), fake_text.squad(here / "squad")
    given = [f"--data.{name}={value}" for name, value in WINDOW.items()]
    given += ["--data.batch_size=1", "--prune.periods=2", "--trainer.max_epochs=1", "--optimizer.lr=0.01"]
    result, small, weights = fit("bert_squad.yaml", network, root, *given)
    assert result["method"].startswith("HESSO at sparsity 0.5 of groups")
    data = SQuAD(root, network, **WINDOW)
    sliced = agree(lambda: QuestionAnswerer(network, pretrained=False), data, "val/f1", small, weights)
    layers = sliced.network.bert.encoder.layer
    assert sum(layer.intermediate.dense.out_features for layer in layers) == 30
    assert [layer.attention.self.query.out_features for layer in layers] == [24, 24]


def test_a_decoder_loses_a_fifth_of_its_parameters(here):
    settings = {"num_key_value_heads": 3, "initializer_range": 0.5, **fake_text.SMALL}
    network, root = fake_text.decoder(here / "llama", **settings), fake_text.texts(here / "texts")
    given = ["--data.block_size=8", "--data.batch_size=1", "--trainer.limit_train_batches=20"]
    result, small, weights = fit("causal_lm.yaml", network, root, *given)
    assert "CRIC(preset='paper')" in result["method"]
    whole = CausalLanguageModel(network, pretrained=False)
    data = TextFiles(root, network, block_size=8)
    sliced = agree(lambda: CausalLanguageModel(network, pretrained=False), data, "val/perplexity", small, weights)
    share = sum(p.numel() for p in sliced.parameters()) / sum(p.numel() for p in whole.parameters())
    assert 0.79 < share <= 0.8
