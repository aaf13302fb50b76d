"""Files of scores and masks: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.core import archive

SCORES = {"a.weight": torch.tensor([[0.5, -2.0, 3.0], [0.0, 1.0, 7.0]]), "b.weight": torch.arange(4.0).double()}
MASKS = plp.MaskSet({"a.weight": torch.tensor([[True, False, True]] * 3), "b.weight": torch.zeros(4, dtype=torch.bool)})


def same(one, other):
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


shapes = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    min_size=1,
    max_size=4,
).filter(lambda found: all("_orig_mod." not in name and name != "__metadata__" for name in found))


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_what_is_written_is_read_back(tmp_path_factory, shapes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    path = tmp_path_factory.mktemp("round") / "file.safetensors"
    scores = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    plp.save_scores(path, scores, {"seed": seed})
    assert same(plp.load_scores(path), scores)
    masks = plp.MaskSet({name: score > 0 for name, score in scores.items()})
    plp.save_masks(path, masks)
    again = plp.load_masks(path)
    assert again == masks
    assert list(again) == list(masks)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensors_that_share_memory_or_are_views_are_written_as_what_they_hold(tmp_path):
    flat = torch.arange(12.0)
    scores = {"a": flat[:6].view(2, 3), "b": flat[6:].view(3, 2).T, "c": flat[:6].view(2, 3)}
    plp.save_scores(tmp_path / "s", scores)
    assert same(plp.load_scores(tmp_path / "s"), scores)


def test_masks_take_a_bit_an_entry(tmp_path):
    masks = plp.MaskSet({"a": torch.ones(800, 100, dtype=torch.bool)})
    plp.save_masks(tmp_path / "m", masks)
    assert 10_000 <= (tmp_path / "m").stat().st_size < 11_500


def test_the_header_says_what_the_file_is(tmp_path):
    criterion = plp.GaussNewtonPruning(probes=3)
    plp.save_scores(tmp_path / "s", SCORES, {"criterion": criterion, "seed": 5})
    header = plp.read_header(tmp_path / "s")
    assert (header["kind"], header["version"], header["selected"]) == ("scores", 1, 10)
    assert header["shapes"] == {"a.weight": [2, 3], "b.weight": [4]}
    told = json.dumps([["a.weight", [2, 3]], ["b.weight", [4]]])
    assert header["architecture"] == hashlib.sha256(told.encode()).hexdigest()
    assert header["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert header["meta"]["seed"] == 5
    assert header["meta"]["criterion"]["class_path"] == "pl_prune.criteria.gauss_newton.GaussNewtonPruning"
    assert header["meta"]["criterion"]["init_args"]["probes"] == 3
    plp.save_masks(tmp_path / "m", MASKS)
    header = plp.read_header(tmp_path / "m", "masks")
    assert (header["kept"], header["selected"], header["sparsity"]) == (6, 13, 7 / 13)


def test_names_are_those_before_compilation_and_come_back_as_the_models(tmp_path):
    plp.save_scores(tmp_path / "s", {"_orig_mod.0.weight": torch.ones(3, 2)})
    assert list(plp.load_scores(tmp_path / "s")) == ["0.weight"]
    compiled = {"_orig_mod.0.weight": torch.zeros(3, 2)}
    assert list(plp.load_scores(tmp_path / "s", compiled)) == ["_orig_mod.0.weight"]


def test_a_file_for_another_architecture_is_refused_by_name_and_shape(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    scores = plp.score(model, plp.Magnitude())
    plp.save_scores(tmp_path / "s", scores)
    plp.save_masks(tmp_path / "m", plp.Global()(scores, 0.5))
    other_head = nn.Sequential(*model[:2], nn.Linear(4, 9))
    assert same(plp.load_scores(tmp_path / "s", other_head), scores)
    assert same(plp.load_scores(tmp_path / "s", plp.Select()(other_head)), scores)
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 7), nn.Linear(7, 5))
    for load, path in ((plp.load_scores, tmp_path / "s"), (plp.load_masks, tmp_path / "m")):
        with expect_refusal("1.weight: (4, 3) in the file, (7, 3) in the model", str(path)):
            load(path, other)
        with expect_refusal("1.weight: (4, 3) in the file, none in the model"):
            load(path, nn.Sequential(nn.Linear(2, 3)))
        with expect_refusal("2.weight: (5, 4) in the model alone"):
            load(path, plp.Select(output_layer=True)(model))


def test_what_is_not_such_a_file_is_refused(tmp_path):
    with expect_refusal("found none", "nowhere", "RunRecord"):
        plp.load_scores(tmp_path / "nowhere")
    with expect_refusal("found none"):
        plp.load_scores(tmp_path)
    for content in (b"", b"\0" * 8, b"not a file of tensors", b"PK\x03\x04" + b"0" * 99):
        (tmp_path / "odd").write_bytes(content)
        with expect_refusal("damaged"):
            plp.load_masks(tmp_path / "odd")
    archive.save_file({"a": torch.ones(2)}, tmp_path / "weights")
    with expect_refusal("without the header of pl_prune"):
        plp.load_scores(tmp_path / "weights")
    plp.save_scores(tmp_path / "s", SCORES)
    with expect_refusal("a file of masks", "one of scores"):
        plp.load_masks(tmp_path / "s")
    plp.save_masks(tmp_path / "m", MASKS)
    with expect_refusal("a file of scores", "one of masks"):
        plp.load_scores(tmp_path / "m")


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_VERSION", 2)
    plp.save_scores(tmp_path / "s", SCORES)
    monkeypatch.undo()
    with expect_refusal("version 1", "version 2", "newer pl_prune"):
        plp.load_scores(tmp_path / "s")


def test_nothing_is_written_of_what_cannot_be(tmp_path, monkeypatch):
    path = tmp_path / "file"
    plp.save_scores(path, SCORES)
    with expect_refusal("NaN or infinity in a"):
        plp.save_scores(path, {"a": torch.tensor([float("nan")])})
    with expect_refusal("meta"):
        plp.save_scores(path, SCORES, {"loss": torch.nn.functional.cross_entropy})
    with expect_refusal("meta"):
        plp.save_scores(path, SCORES, {"loss": float("nan")})
    with expect_refusal("at least one parameter"):
        plp.save_masks(path, plp.MaskSet({}))
    with expect_refusal("MaskSet"):
        plp.save_masks(path, {"a": torch.ones(2, dtype=torch.bool)})
    with expect_refusal("this fails", "make room"):
        plp.save_masks(path / "below a file", MASKS)

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(archive, "save_file", full)
    with expect_refusal("No space left"):
        plp.save_scores(path, {"a.weight": torch.ones(3)})
    assert same(plp.load_scores(path), SCORES)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module", params=["scores", "masks"])
def written(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "file"
    if request.param == "scores":
        plp.save_scores(path, SCORES, {"seed": 1})
        return path, path.read_bytes(), lambda file: same(plp.load_scores(file), SCORES)
    plp.save_masks(path, MASKS, {"seed": 1})
    return path, path.read_bytes(), lambda file: plp.load_masks(file) == MASKS


def test_a_file_cut_off_anywhere_is_refused(written, tmp_path):
    _, whole, _ = written
    refused = 0
    for size in range(0, len(whole), 7):
        (tmp_path / "file").write_bytes(whole[:size])
        for load in (plp.load_scores, plp.load_masks):
            with pytest.raises(plp.PruneError):
                load(tmp_path / "file")
        refused += 1
    (tmp_path / "file").write_bytes(whole + b"more")
    with pytest.raises(plp.PruneError):
        plp.read_header(tmp_path / "file")
    assert refused > 100


def test_a_flipped_bit_is_refused_or_changes_nothing(written, tmp_path):
    _, whole, right = written
    (length,) = struct.unpack("<Q", whole[:8])
    changed = 0
    for place in range(len(whole)):
        file = bytearray(whole)
        file[place] ^= 1 << place % 8
        (tmp_path / "file").write_bytes(file)
        try:
            assert right(tmp_path / "file"), place
        except plp.PruneError:
            changed += 1
        else:
            assert place < 8 + length, place  # blanks of the header, say
    assert changed > 0.95 * len(whole)


def test_a_header_changed_by_hand_is_refused(written, tmp_path):
    _, whole, _ = written
    assert whole.count(b'\\"seed\\": 1') == 1
    (tmp_path / "file").write_bytes(whole.replace(b'\\"seed\\": 1', b'\\"seed\\": 2'))
    with expect_refusal("its header is not what was written"):
        plp.read_header(tmp_path / "file")
