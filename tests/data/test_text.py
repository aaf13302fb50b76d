"""SQuAD and text files, read from files of their real form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_text
import pytest
import torch
from refusal import expect_refusal

from pl_prune.data import SQuAD, TextFiles
from pl_prune.data.squad_file import read_squad

pytest.importorskip("transformers")
WINDOW = {"max_length": 24, "doc_stride": 4, "max_query_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    fake_text.bert(root / "bert")
    fake_text.decoder(root / "llama")
    fake_text.squad(root / "squad")
    fake_text.texts(root / "texts")
    return root


@pytest.fixture(scope="module")
def squad(folder):
    data = SQuAD(str(folder / "squad"), str(folder / "bert"), batch_size=3, **WINDOW)
    data.setup("fit")
    return data


def words(text):
    return text.lower().replace("?", " ?").replace(".", " .").replace(":", " :").split()


def pieces(text):
    return [p for word in words(text) for p in (["hop", "##per"] if word == "hopper" else [word])]


def known(tokens):
    return [token if token in fake_text.PIECES else "[UNK]" for token in tokens]


def by_hand(question, context):
    """Cut a text as the definition says: windows share `doc_stride` tokens, and the last one is the shorter."""
    asked, text = known(pieces(question))[: WINDOW["max_query_length"]], known(pieces(context))
    room, windows = WINDOW["max_length"] - len(asked) - 3, []
    for start in range(0, len(text), room - WINDOW["doc_stride"]):
        windows.append((start, ["[CLS]", *asked, "[SEP]", *text[start : start + room], "[SEP]"]))
        if start + room >= len(text):
            break
    return len(asked) + 2, windows


def test_training_windows_are_those_cut_by_hand_and_answers_are_marked_in_them(folder, squad):
    questions, rows = read_squad(folder / "squad" / "train-v1.1.json"), iter(range(len(squad.train_set)))
    found = 0
    for question in questions:
        offset, windows = by_hand(question.text, question.context)
        answer = pieces(question.answers[0][0])
        place = len(pieces(question.context[: question.answers[0][1]]))
        for start, tokens in windows:
            row = squad.train_set[next(rows)]
            padded = tokens + ["[PAD]"] * (WINDOW["max_length"] - len(tokens))
            assert [fake_text.PIECES[i] for i in row["input_ids"]] == padded
            assert row["attention_mask"].tolist() == [int(token != "[PAD]") for token in padded]
            assert row["token_type_ids"].tolist() == [int(offset <= i < len(tokens)) for i in range(len(padded))]
            first = place - start + offset
            inside = first >= offset and first + len(answer) < len(tokens)
            marked = row["start_positions"].item(), row["end_positions"].item()
            assert marked == ((first, first + len(answer) - 1) if inside else (0, 0))
            found += inside
    assert next(rows, None) is None
    assert len(questions) <= found < len(squad.train_set)


def test_a_batch_of_questions_has_all_their_windows_and_where_tokens_are_in_the_text(squad):
    batches = list(squad.val_dataloader())
    assert [batch["ids"] for batch in batches] == [["dev00", "dev01", "dev02"], ["dev03"]]
    assert batches[0]["answers"] == list(fake_text.ASKED.values())[:3]
    for batch in batches:
        for window, question in enumerate(batch["question"].tolist()):
            context = batch["contexts"][question]
            for token, (start, stop) in zip(batch["input_ids"][window], batch["offsets"][window].tolist(), strict=True):
                if start >= 0:
                    assert fake_text.PIECES[token].removeprefix("##") in (context[start:stop].lower(), "[UNK]")
        seen = [[] for _ in batch["ids"]]
        for question, offsets in zip(batch["question"].tolist(), batch["offsets"].tolist(), strict=True):
            seen[question] += [tuple(place) for place in offsets if place[0] >= 0]
        for context, places in zip(batch["contexts"], seen, strict=True):
            assert len(set(places)) == len(pieces(context))
            assert len(set(places)) < len(places)


def test_loaders_of_squad(folder, squad):
    first = next(iter(squad.scoring_dataloader()))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (3, 24)),
        **dict.fromkeys(("start_positions", "end_positions"), (3,)),
    }
    assert first["input_ids"].dtype == torch.int64
    seen = torch.cat([batch["input_ids"] for batch in squad.train_dataloader()])
    assert sorted(seen.tolist()) == sorted(squad.train_set.tensors["input_ids"].tolist())
    few = SQuAD(str(folder / "squad"), str(folder / "bert"), train_samples=2, test_samples=1, **WINDOW)
    few.setup("fit")
    assert len(few.test_set) == 1
    assert len(few.train_set) < len(squad.train_set)
    fresh = SQuAD(str(folder / "squad"), str(folder / "bert"), **WINDOW)
    fresh.setup("test")
    assert not hasattr(fresh, "train_set")
    assert len(fresh.test_set) == 4


def test_a_long_question_is_cut(folder, tmp_path):
    context = "Ada was born in Paris."
    ask = {"id": "x", "question": "where " * 50, "answers": [{"text": " Paris", "answer_start": 15}]}
    file = {"data": [{"paragraphs": [{"context": context, "qas": [ask]}]}]}
    for part in ("train", "dev"):
        (tmp_path / f"{part}-v1.1.json").write_text(json.dumps(file))
    data = SQuAD(str(tmp_path), str(folder / "bert"), **WINDOW)
    data.setup("fit")
    (row,) = [data.train_set[i] for i in range(len(data.train_set))]
    tokens = [fake_text.PIECES[i] for i in row["input_ids"]]
    assert tokens.count("where") == 8
    assert tokens[row["start_positions"]] == tokens[row["end_positions"]] == "paris"


def test_answers_that_are_elsewhere_are_left_out(folder, tmp_path):
    fake_text.squad(tmp_path)
    path = tmp_path / "train-v1.1.json"
    file = json.loads(path.read_text())
    asked = [qa for paragraph in file["data"][0]["paragraphs"] for qa in paragraph["qas"]]
    data = SQuAD(str(tmp_path), str(folder / "bert"), **WINDOW)
    asked[0]["answers"][0]["answer_start"] += 1
    path.write_text(json.dumps(file))
    with pytest.warns(UserWarning, match="found 1 of 8 elsewhere"):
        data.setup("fit")
    for qa in asked[1:]:
        qa["answers"][0]["answer_start"] += 1
    path.write_text(json.dumps(file))
    with expect_refusal("found none, as for 'train00'"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"root": "nowhere"}, ["dev-v1.1.json in", "SQuAD's authors"]),
        ({"tokenizer": "squad"}, ["a tokenizer under the name", "data.init_args.tokenizer"]),
        ({"tokenizer": "llama"}, ["can pad", "an encoder"]),
        ({"doc_stride": 13}, ["below the 13 tokens", "found 13"]),
        ({"doc_stride": -1}, ["of 0 or more", "found -1"]),
        ({"max_query_length": 30}, ["max_length=24", "a question of 30"]),
        ({"tokenizer": "llama", "max_length": 65}, ["at most 64 tokens", "found 65"]),
    ],
    ids=str,
)
def test_refusals_of_squad(folder, change, parts):
    settings = {"root": "squad", "tokenizer": "bert", **WINDOW, **change}
    for name in ("root", "tokenizer"):
        settings[name] = str(folder / settings[name])
    with expect_refusal(*parts):
        SQuAD(**settings).setup("test")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["the form of SQuAD 1.1", "JSONDecodeError"]),
        ("[]", ["the form of SQuAD 1.1", "TypeError"]),
        ('{"data": [{"paragraphs": [{}]}]}', ["KeyError: 'qas'"]),
        ('{"data": []}', ["found none at all"]),
        (
            '{"data": [{"paragraphs": [{"context": "", "qas": [{"id": "7", "question": "", "answers": []}]}]}]}',
            ["none for '7'", "of 2.0"],
        ),
    ],
)
def test_refusals_of_files(tmp_path, text, parts):
    (tmp_path / "dev-v1.1.json").write_text(text)
    with expect_refusal(*parts):
        read_squad(tmp_path / "dev-v1.1.json")


def test_text_is_cut_into_blocks(folder):
    data = TextFiles(str(folder / "texts"), str(folder / "llama"), block_size=7, batch_size=4)
    data.setup("fit")
    vocabulary = ["<unk>", "<end>", *fake_text.WORDS]
    root = folder / "texts" / "train"
    files = [root / "a.txt", root / "b.txt", root / "more" / "c.txt"]
    stream = [vocabulary.index(word) for file in files for word in [*file.read_text().split(), "<end>"]]
    blocks = [row["input_ids"].tolist() for row in (data.train_set[i] for i in range(len(data.train_set)))]
    assert blocks == [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)]
    assert next(iter(data.scoring_dataloader()))["input_ids"].tolist() == blocks[:4]
    seen = torch.cat([batch["input_ids"] for batch in data.train_dataloader()]).tolist()
    assert sorted(seen) == sorted(blocks)
    assert seen != blocks
    assert data.test_set is data.val_set
    assert next(iter(data.val_dataloader()))["input_ids"].dtype == torch.int64


def test_a_test_text_of_its_own(folder, tmp_path):
    (tmp_path / "val.txt").write_text("ada . " * 9)
    (tmp_path / "test.txt").write_text("alan . " * 9)
    data = TextFiles(str(tmp_path), str(folder / "llama"), block_size=4)
    data.setup("test")
    assert not hasattr(data, "val_set")
    assert data.test_set[0]["input_ids"].tolist() == [2 + fake_text.WORDS.index(w) for w in ["alan", ".", "alan", "."]]


def test_refusals_of_text(folder, tmp_path):
    tokenizer = str(folder / "llama")
    with expect_refusal("2 tokens or more", "block_size=1"):
        TextFiles(block_size=1)
    with expect_refusal("train.txt or a folder train", "found neither"):
        TextFiles(str(tmp_path), tokenizer, block_size=4).setup("fit")
    (tmp_path / "train.txt").write_text("ada .")
    with expect_refusal("a block of 4 tokens", "found 3 tokens"):
        TextFiles(str(tmp_path), tokenizer, block_size=4).setup("fit")
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe")
    with expect_refusal("text in UTF-8"):
        TextFiles(str(tmp_path), tokenizer, block_size=4).setup("fit")
    with expect_refusal("at most 64 tokens a sample", "found 65"):
        TextFiles(str(tmp_path), tokenizer, block_size=65).setup("fit")


@pytest.mark.parametrize("make", [SQuAD, TextFiles])
def test_without_transformers_the_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with expect_refusal("Expected transformers", "pip install 'pl_prune[zoo]'"):
        make(str(Path("nowhere"))).setup("fit")
