"""Questions and causal language models: losses, metrics, and units that leave."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path

import fake_text
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.data import SQuAD, TextFiles
from pl_prune.models import CausalLanguageModel, QuestionAnswerer
from pl_prune.models.question_answerer import best_spans

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False} | {
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
WINDOW = {"max_length": 24, "doc_stride": 4, "max_query_length": 8}
SAMPLES = plp.Samples(total=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    fake_text.bert(root / "bert")
    fake_text.decoder(root / "llama", num_key_value_heads=3, initializer_range=0.5, **fake_text.SMALL)
    fake_text.squad(root / "squad")
    fake_text.texts(root / "texts")
    return root


class Answering(QuestionAnswerer):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Writing(CausalLanguageModel):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def task(folder, kind):
    """A module with its data, and what it is measured by."""
    seed_everything(0, verbose=False)
    if kind == "questions":
        data = SQuAD(str(folder / "squad"), str(folder / "bert"), batch_size=4, **WINDOW)
        return Answering(str(folder / "bert"), pretrained=False), data, "val/f1"
    data = TextFiles(str(folder / "texts"), str(folder / "llama"), block_size=12, batch_size=4)
    return Writing(str(folder / "llama"), pretrained=False), data, "val/perplexity"


@pytest.mark.parametrize("longest", [1, 3, 9])
def test_best_spans_are_those_of_a_search(longest):
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    allowed = torch.rand(5, 9, generator=generator) < 0.7
    score, first, last = best_spans(start, end, allowed, longest)
    for n in range(5):
        spans = [
            (float(start[n, i] + end[n, j]), i, j)
            for i, j in itertools.product(range(9), repeat=2)
            if allowed[n, i] and allowed[n, j] and i <= j < i + longest
        ]
        best = max(spans)
        assert score[n].item() == pytest.approx(best[0], rel=1e-6)
        assert (first[n].item(), last[n].item()) == best[1:]


class Scripted(nn.Module):
    """A network that says which tokens are starts and ends."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.embedding = nn.Embedding(len(fake_text.PIECES), 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, token_type_ids):
        start, end = torch.zeros(2, *input_ids.shape)
        start[:, 0] = end[:, 0] = 9  # no part of the text
        for row, ids in enumerate(input_ids.tolist()):
            tokens = [fake_text.PIECES[i] for i in ids]
            question = " ".join(tokens[1 : tokens.index("[SEP]")])
            text = tokens.index("[SEP]")
            first, last = self.answers[question]
            for i, j in itertools.product(range(text, len(tokens)), repeat=2):
                if (tokens[i], tokens[j]) == (first, last) and i < j < i + 3:
                    start[row, i] = end[row, j] = 5
        return type("Output", (), {"start_logits": start, "end_logits": end})


def test_exact_match_and_f1_are_those_of_squad(folder):
    module, data, _ = task(folder, "questions")
    module.network = Scripted({
        "where was ada born ?": ("in", "paris"),  # "in Paris" for "Paris": F1 2/3
        "where was alan born ?": ("in", "london"),  # the second answer
        "who was born in rome ?": ("grace", "##per"),
        "where is grace hop ##per born ?": ("the", "rome"),  # articles do not count
    })
    trainer = Trainer(**QUIET)
    (found,) = trainer.validate(module, data, verbose=False)
    assert found == {"val/exact_match": pytest.approx(75), "val/f1": pytest.approx(100 * (3 + 2 / 3) / 4)}
    (found,) = trainer.test(module, data, verbose=False)
    assert found == {"test/exact_match": pytest.approx(75), "test/f1": pytest.approx(100 * (3 + 2 / 3) / 4)}
    (answers,) = trainer.predict(module, data)
    assert answers == {"dev00": "in Paris", "dev01": "in London", "dev02": "Grace Hopper", "dev03": "the Rome"}


def test_the_loss_of_answers_is_that_of_transformers(folder):
    module, data, _ = task(folder, "questions")
    module.log = lambda *_, **__: None
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, module.network(**batch).loss)
    assert float(loss.detach()) > 0


def test_perplexity_is_that_of_all_tokens(folder):
    module, data, _ = task(folder, "text")
    trainer = Trainer(**QUIET)
    (found,) = trainer.validate(module, data, verbose=False)
    total = count = 0
    double = module.network.double()
    sizes = []
    for batch in data.val_dataloader():
        ids = batch["input_ids"]
        sizes.append(len(ids))
        with torch.no_grad():
            logits = double(ids).logits
        for row, text in zip(logits, ids, strict=True):
            for position in range(len(text) - 1):
                total -= math.log(float(row[position].softmax(0)[text[position + 1]]))
                count += 1
    assert len(set(sizes)) == 2
    assert found["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_which_tokens_count(folder):
    module, _, _ = task(folder, "text")
    module.log = lambda *_, **__: None
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 8, 9, -100]])

    def expected(wanted):
        logits = module(ids, mask).log_softmax(2)
        places = [(n, t) for n in range(2) for t in range(1, 4) if wanted[n, t] >= 0]
        return -sum(logits[n, t - 1, wanted[n, t]] for n, t in places) / len(places)

    batch = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(module.training_step(batch, 0), expected(ids.masked_fill(mask == 0, -100)))
    torch.testing.assert_close(module.training_step({**batch, "labels": labels}, 0), expected(labels))
    assert module.predict_step(batch, 0).shape == ids.shape


@pytest.mark.parametrize(("kind", "units"), [("questions", 2 * (6 + 30)), ("text", 2 * (3 + 30))])
def test_a_fit_of_the_smaller_network_is_that_of_the_masked_one(folder, kind, units):
    results = []
    for shrink in (False, True):
        module, data, metric = task(folder, kind)
        dense = sum(p.numel() for p in module.parameters())
        pruner = plp.StructuredPruning(plp.ByGroup(plp.SNIP()), 0.5, shrink=shrink, samples=SAMPLES)
        trainer = Trainer(max_steps=2, callbacks=[pruner], **QUIET)
        trainer.fit(module, data)
        assert sum(pruner.groups.sizes.values()) == units
        assert trainer.global_step == 2
        if not shrink:
            small = plp.shrink(module, pruner.masks, module.example_input_array, pruner.groups)
        else:
            small = module
            assert sum(p.numel() for p in module.parameters()) < dense
        answers = Trainer(**QUIET).predict(small, data)
        results.append((Trainer(**QUIET).validate(small, data, verbose=False)[0], answers))
        results.append((Trainer(**QUIET).validate(module, data, verbose=False)[0], answers))
        assert math.isfinite(results[-1][0][metric])
    values = [scores[metric] for scores, _ in results]
    assert values == pytest.approx([values[0]] * 4, rel=1e-4)
    assert values[0] > 0
    assert all(
        torch.equal(a, b) if kind == "text" else a == b for a, b in zip(results[0][1], results[2][1], strict=True)
    )


ONE_TENSOR_OF_EXPERTS = int(transformers.__version__.split(".")[0]) >= 5
EXPERTS = {"num_key_value_heads": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
FAMILIES = {  # its settings; groups and units
    "gpt2": ({"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 30}, 4, 2 * (6 + 30)),
    "opt": (
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_dim": 30, "word_embed_proj_dim": 24},
        4,
        72,
    ),
    "qwen2_moe": (
        {**fake_text.SMALL, **EXPERTS, "shared_expert_intermediate_size": 7},
        *((6, 2 * (3 + 5 + 7)) if ONE_TENSOR_OF_EXPERTS else (8, 44)),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_decoder_loses_units_and_writes_on_without_them(tmp_path, family):
    seed_everything(0, verbose=False)
    settings, count, units = FAMILIES[family]
    module = CausalLanguageModel(fake_text.decoder(tmp_path, family, **settings), pretrained=False).eval()
    groups = plp.trace_groups(module, module.example_input_array)
    assert (len(groups), sum(groups.sizes.values())) == (count, units)
    masks = groups.expand({root: torch.arange(size) % 3 > 0 for root, size in groups.sizes.items()})
    small = plp.shrink(module, masks, module.example_input_array, groups)
    masks.apply_(dict(module.named_parameters()))
    ids = torch.arange(20).view(2, 10)
    mask = (torch.arange(10) < torch.tensor([[10], [7]])).long()
    with torch.no_grad():
        found, expected = (m(ids, mask)[mask.bool()] for m in (small, module))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    written = [m.network.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (small, module)]
    assert torch.equal(*written)


def test_a_checkpoint_of_transformers_is_loaded_in_float32_and_trains(folder, tmp_path):
    module, _, _ = task(folder, "text")
    module.network.to(torch.bfloat16).eval().save_pretrained(tmp_path)
    loaded = CausalLanguageModel(str(tmp_path))
    assert loaded.network.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for (name, p), q in zip(module.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, msg=name)


def test_refusals(folder, tmp_path, monkeypatch):
    with expect_refusal("AutoModelForQuestionAnswering", "model.init_args.network"):
        QuestionAnswerer(str(tmp_path / "none"))
    with expect_refusal("AutoModelForCausalLM", "model.init_args.pretrained=false"):
        CausalLanguageModel(str(folder / "llama"))  # has no weights
    with expect_refusal("AutoModelForQuestionAnswering"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
        QuestionAnswerer(str(tmp_path), pretrained=False)
    with expect_refusal("max_answer_length of 1", "found 0"):
        QuestionAnswerer(str(folder / "bert"), pretrained=False, max_answer_length=0)
    module, data, _ = task(folder, "text")
    module.network.resize_token_embeddings(6)
    with expect_refusal("tokens below 6", "data.init_args.tokenizer"):
        Trainer(**QUIET).validate(module, data, verbose=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with expect_refusal("Expected transformers", "pip install 'pl_prune[zoo]'"):
        QuestionAnswerer("bert")


def test_the_page(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (fragment,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "language.md").read_text(), re.DOTALL)
    tiny = {
        'Answering("google-bert/bert-base-uncased")': f'Answering("{folder}/bert", pretrained=False)',
        'SQuAD("squad", ': f'SQuAD("{folder}/squad", max_length=24, doc_stride=4, max_query_length=8, ',
        '"google-bert/bert-base-uncased", batch_size=32': f'"{folder}/bert", batch_size=1',
        "target_group_sparsity=0.5": "target_group_sparsity=0.5, periods=2, shrink_at_end=False",
        "max_epochs=3": f"max_epochs=1, **{QUIET}",
    }
    for written, here in tiny.items():
        assert fragment.count(written) == 1, written
        fragment = fragment.replace(written, here)
    space: dict[str, object] = {}
    exec(fragment, space)
    layers = [module.network.bert.encoder.layer for module in (space["module"], space["small"])]
    assert [sum(layer.intermediate.dense.out_features for layer in kind) for kind in layers] == [60, 30]
