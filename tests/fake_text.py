"""Tiny networks of transformers with their tokenizers, and text in the file layouts of the data modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    "who",
    "where",
    "was",
    "is",
    "born",
    "lives",
    "in",
    "the",
    "paris",
    "london",
    "rome",
    "ada",
    "alan",
    "grace",
    "and",
    "then",
    ".",
    "?",
    "a",
]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hop", "##per", *WORDS]
CONTEXT = (
    "Ada was born in Paris. Then Alan was born in London and Grace Hopper was born in the Rome. Alan lives in Paris."
)
ASKED = {  # question: the word of its answer and, where people differ, others
    "Where was Ada born?": ["Paris"],
    "Where was Alan born?": ["London", "in London"],
    "Who was born in Rome?": ["Grace Hopper", "Hopper"],
    "Where is Grace Hopper born?": ["Rome", "the Rome"],
}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 30}


def bert(folder: Path) -> str:
    """A BERT of two layers: config.json and vocab.txt."""
    from transformers import BertConfig

    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, **SMALL, **settings).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    return str(folder)


def decoder(folder: Path, kind: str = "llama", **settings: Any) -> str:
    """A decoder of two layers: config.json and tokenizer.json, of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *WORDS]
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    AutoConfig.for_model(kind, vocab_size=len(words), **ends, **(settings or SMALL)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"unk_token": "<unk>", "eos_token": "<end>", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(folder)
    return str(folder)


def squad(root: Path) -> str:
    """SQuAD 1.1 of two paragraphs, the same for training and validation."""
    root.mkdir(parents=True, exist_ok=True)
    for part, contexts in (("train", [CONTEXT, "In short: " + CONTEXT]), ("dev", [CONTEXT])):
        paragraphs = [
            {
                "context": context,
                "qas": [
                    {
                        "id": f"{part}{i}{j}",
                        "question": question,
                        "answers": [{"text": text, "answer_start": context.index(text)} for text in texts],
                    }
                    for j, (question, texts) in enumerate(ASKED.items())
                ],
            }
            for i, context in enumerate(contexts)
        ]
        data = {"version": "1.1", "data": [{"title": "people", "paragraphs": paragraphs}]}
        (root / f"{part}-v1.1.json").write_text(json.dumps(data))
    return str(root)


def texts(root: Path) -> str:
    """A folder of training files and one file of validation."""
    (root / "train" / "more").mkdir(parents=True)
    (root / "train" / "b.txt").write_text("ada was born in paris . " * 9)
    (root / "train" / "more" / "c.txt").write_text("alan was born in london and grace in rome . " * 9)
    (root / "train" / "a.txt").write_text("who was ada ? " * 9)
    (root / "val.txt").write_text("then ada lives in london . where is alan ? " * 6)
    return str(root)
