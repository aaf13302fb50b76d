from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from refusal import expect_refusal
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pl_prune import Samples

LABELS = [2, 0, 1, 2, 2, 0, 2, 1, 2, 0, 2, 2, 7, 2, 0]


class Items(Dataset):
    """A data set that tells its labels one sample at a time, and counts how often it was read."""

    def __init__(self, samples):
        self.samples = samples
        self.reads = Counter()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.samples[index]


class Noisy(Dataset):
    """A data set that augments at random."""

    targets = LABELS

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([float(index), *noise]), LABELS[index]


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([float(i)]), i % 3) for i in range(20))


def inputs():
    return torch.arange(15.0).view(15, 1)


def stored():
    return TensorDataset(inputs(), torch.tensor(LABELS))


def with_attribute(name, value):
    data = Items([(torch.zeros(1),)] * 15)
    setattr(data, name, value)
    return data


LABELLED = {
    "TensorDataset": stored(),
    "targets": with_attribute("targets", LABELS),
    "labels": with_attribute("labels", np.array(LABELS)),
    "targets of tensors": with_attribute("targets", [torch.tensor(label) for label in LABELS]),
    "concatenated": ConcatDataset([
        TensorDataset(inputs()[:4], torch.tensor(LABELS[:4])),
        TensorDataset(inputs()[4:], torch.tensor(LABELS[4:])),
    ]),
    "subset": Subset(TensorDataset(torch.zeros(16, 1), torch.tensor([9, *reversed(LABELS)])), list(range(15, 0, -1))),
    "tuples": Items([(torch.zeros(1), label, "more") for label in LABELS]),
    "tensor labels": Items([[torch.zeros(1), torch.tensor([label])] for label in LABELS]),
    "numpy labels": Items([(torch.zeros(1), np.int64(label)) for label in LABELS]),
    **{
        f"dict of {key}": Items([{"x": 0, key: v} for v in LABELS])
        for key in ("label", "labels", "target", "targets", "y")
    },
    "named classes beside": with_attribute("labels", ["cat"] * 15),
}
LABELLED["named classes beside"].samples = [(torch.zeros(1), label) for label in LABELS]


@pytest.mark.parametrize("kind", LABELLED)
def test_every_way_to_hold_labels_gives_the_same_choice(kind):
    expected = Samples(per_class=2).indices(stored())
    assert len(expected) == 7
    assert Samples(per_class=2).indices(LABELLED[kind]) == expected


@pytest.mark.parametrize("per_class", [1, 2, 3, 100])
def test_classes_are_balanced_as_far_as_they_reach(per_class):
    chosen = Samples(per_class=per_class).indices(stored())
    assert len(set(chosen)) == len(chosen)
    available = Counter(LABELS)
    assert Counter(LABELS[i] for i in chosen) == {label: min(per_class, n) for label, n in available.items()}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_stride_is_balanced(ranks):
    labels = [0] * 30 + [1] * 30 + [2] * 30
    chosen = Samples(per_class=24).indices(TensorDataset(torch.zeros(90, 1), torch.tensor(labels)))
    turns = [[labels[i] for i in chosen[t : t + 3]] for t in range(0, 72, 3)]
    assert turns == [[0, 1, 2]] * 24
    shares = [chosen[rank::ranks] for rank in range(ranks)]
    assert sorted(i for share in shares for i in share) == sorted(chosen)


def test_the_choice_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = Samples(per_class=3).indices(stored())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert Samples(per_class=3).indices(stored()) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert Samples(per_class=3, seed=1).indices(stored()) != first


def test_the_choice_is_not_the_first_of_each_class():
    labels = torch.arange(1000) % 2
    chosen = Samples(per_class=100).indices(TensorDataset(torch.zeros(1000, 1), labels))
    for label in (0, 1):
        mean = sum(i for i in chosen if labels[i] == label) / 100
        assert 400 < mean < 600


@pytest.mark.parametrize(("total", "expected"), [(1, 1), (6, 6), (15, 15), (99, 15)])
def test_a_total_counts_whatever_the_labels(total, expected):
    data = Items([torch.zeros(1)] * 15)
    chosen = Samples(total=total).indices(data)
    assert len(chosen) == expected
    assert len(set(chosen)) == expected
    assert set(chosen) <= set(range(15))
    assert not data.reads


UNLABELLED = {
    "inputs only": TensorDataset(torch.zeros(5, 2)),
    "bare tensors": Items([torch.zeros(2)] * 5),
    "one element": Items([(torch.zeros(2),)] * 5),
    "dict without": Items([{"x": torch.zeros(2)}] * 5),
    "regression": Items([(torch.zeros(2), 0.5)] * 5),
    "regression tensor": TensorDataset(torch.zeros(5, 2), torch.rand(5)),
    "one-hot": TensorDataset(torch.zeros(5, 2), torch.eye(5).long()),
    "segmentation": Items([(torch.zeros(2), torch.zeros(4, 4).long())] * 5),
    "text": Items([(torch.zeros(2), "cat")] * 5),
    "None": Items([(torch.zeros(2), None)] * 5),
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_data_without_class_labels(kind):
    with expect_refusal("class label", "Set samples.total to a number of samples instead."):
        Samples().indices(UNLABELLED[kind])
    assert len(Samples(total=3).indices(UNLABELLED[kind])) == 3


def test_reading_labels_shows_progress():
    seen = []

    def track(items, label):
        seen.append(label)
        return items

    Samples(per_class=1).indices(LABELLED["tuples"], track)
    Samples(per_class=1).indices(stored(), track)
    assert seen == ["labels"]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_batches_hold_the_chosen_samples_in_order(batch_size):
    samples = Samples(per_class=3, batch_size=batch_size)
    chosen = samples.indices(stored())
    found = samples.batches(DataLoader(stored(), 2, shuffle=True, drop_last=True))
    assert [len(y) for _, y in found] == [len(part) for part in torch.tensor(chosen).split(batch_size)]
    assert torch.cat([x for x, _ in found]).view(-1).tolist() == chosen
    assert torch.cat([y for _, y in found]).tolist() == [LABELS[i] for i in chosen]


def test_samples_that_are_random_are_the_same_at_any_batch_size():
    def read(seed=0, **settings):
        torch.rand(1), random.random(), np.random.rand()
        found = Samples(per_class=2, seed=seed, **settings).batches(DataLoader(Noisy(), 3, shuffle=True))
        return {int(row[0]): row[1:].tolist() for x, _ in found for row in x}

    first = read()
    assert len(first) == 7
    assert len({tuple(noise) for noise in first.values()}) == 7
    assert read(batch_size=1) == first
    assert read(batch_size=3) == first
    assert all(noise != first.get(i) for i, noise in read(seed=1).items())


def test_the_loader_is_asked_for_its_collation_and_nothing_else():
    loader = DataLoader(stored(), 5, collate_fn=lambda rows: {"n": len(rows)})
    loader_iter = iter(loader)
    assert Samples(total=7, batch_size=4).batches(loader) == [{"n": 4}, {"n": 3}]
    assert [batch["n"] for batch in loader_iter] == [5, 5, 5]


def test_a_loader_with_a_batch_sampler():
    found = Samples(total=7, batch_size=4).batches(DataLoader(stored(), batch_sampler=[[0, 1], [2]]))
    assert [(tuple(x.shape), tuple(y.shape)) for x, y in found] == [((4, 1), (4,)), ((3, 1), (3,))]


@pytest.mark.parametrize("data", [stored(), Stream()], ids=["items", "stream"])
def test_a_loader_that_does_not_batch(data):
    with expect_refusal("batch"):
        Samples(total=7, batch_size=4).batches(DataLoader(data, batch_size=None))


@pytest.mark.parametrize("loader_batch", [1, 4, 5, 7, 20])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_a_stream_gives_exactly_the_total(loader_batch, batch_size):
    found = Samples(total=7, batch_size=batch_size).batches(DataLoader(Stream(), loader_batch))
    assert torch.cat([x for x, _ in found]).view(-1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_stream_that_ends_early_gives_what_it_has():
    found = Samples(total=50).batches(DataLoader(Stream(), 8))
    assert sum(len(x) for x, _ in found) == 20


def test_a_stream_has_no_classes_to_balance():
    with expect_refusal("data set with a length", "IterableDataset", "Set samples.total"):
        Samples().batches(DataLoader(Stream(), 4))


@pytest.mark.parametrize("field", ["per_class", "total", "batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(field, value):
    with expect_refusal(f"samples.{field} of 1 or more", f"found {value}"):
        Samples(**{field: value})
