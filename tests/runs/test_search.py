"""A search proposes points one after another; what it has proposed follows from its seed and from what was reached."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import yaml
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.report.study import study_table
from pl_prune.runs.plan import Plan
from pl_prune.runs.search import Range, Search
from pl_prune.runs.study import Study
from pl_prune.runs.sweep import as_sweep

SPACE = {
    "optimizer.lr": Range(0.001, 1.0, log=True),
    "prune.sparsity": [0.5, 0.9],
    "trainer.max_epochs": Range(2, 6, step=2),
}
PLAN = Plan(
    name="searched",
    rows={"dense": {"config": [], "grid": False}, "a": {"config": []}, "b": {"config": []}},
    seeds=(3,),
    metric="acc",
    search=Search(12, SPACE),
)


def reaches(settings):
    """Best at a learning rate of 0.03."""
    return -((math.log10(settings.get("optimizer.lr", 1.0)) - math.log10(0.03)) ** 2)


class Trainer:
    def __init__(self, dies_after=None, lost=()):
        self.trained, self.dies_after, self.lost = [], dies_after, lost

    def __call__(self, spec, run):
        self.trained.append(spec.key)
        run.begin(0)
        if len(self.trained) == self.dies_after:
            raise KeyboardInterrupt
        value = math.nan if spec.key in self.lost else reaches(spec.settings)
        run.log({"epoch": 1, "step": 1, "seconds": 1.0, "acc": value + 1})
        run.log({"epoch": 2, "step": 2, "seconds": 1.0, "acc": value})
        told = {"method": spec.row, "sparsity": 0.0, "masks": None, "seconds": 1.0, "pruning_seconds": 0.0}
        run.finish({**told, "peak_bytes": None, "epochs": 2, "steps": 2, "metrics": {}}, plp.MaskSet({}))


def quiet(_):
    pass


def done(study):
    return [(r["key"], r["settings"], r["last"], r["best"]) for r in study.results()]


def test_every_searched_row_gets_its_points_and_the_others_run_once(tmp_path):
    study, train = Study(PLAN, tmp_path), Trainer()
    study.work(train, quiet)
    assert len(train.trained) == len(set(train.trained)) == study.total == len(study.results()) == 25
    assert list(study.specs)[:2] == ["dense_seed=3", "a_trial=0_seed=3"]
    assert train.trained[:3] == ["dense_seed=3", "a_trial=0_seed=3", "b_trial=0_seed=3"]
    for row in "ab":
        points = [r["settings"] for r in study.results() if r["row"] == row]
        assert len({json.dumps(p) for p in points}) == 12
        assert all(0.001 <= p["optimizer.lr"] <= 1 and p["trainer.max_epochs"] in (2, 4, 6) for p in points)
        assert {p["prune.sparsity"] for p in points} == {0.5, 0.9}
        assert all(p["optimizer.lr"] == float(f"{p['optimizer.lr']:.4g}") for p in points)
    assert [r["row"] for r in study.best()] == ["a", "b"]
    for record in study.best():
        assert record["last"] == max(r["last"] for r in study.results() if r["row"] == record["row"])
    spec = study.specs["b_trial=4_seed=3"]
    assert spec.values == {**spec.settings, "seed_everything": 3}
    assert json.loads((tmp_path / "study.json").read_text())["search"] == PLAN.search.told()
    assert len(study_table(study.results(), "acc", "maximize").splitlines()) == 27


def test_a_search_that_is_interrupted_again_and_again_goes_on_as_an_undisturbed_one(tmp_path):
    plan = Plan(**{**PLAN.__dict__, "rows": {"a": {"config": []}}, "search": Search(13, SPACE, "tpe", 5)})
    whole = Study(plan, tmp_path / "whole")
    whole.work(Trainer(), quiet)
    for after in (3, 1, 9):
        with pytest.raises(KeyboardInterrupt):
            Study(plan, tmp_path / "cut").work(Trainer(after), quiet)
    cut = Study(plan, tmp_path / "cut")
    cut.work(Trainer(), quiet)
    assert done(cut) == done(whole)
    (tmp_path / "cut" / "study.db").unlink()
    again, train = Study(plan, tmp_path / "cut"), Trainer()
    again.work(train, quiet)
    assert train.trained == []
    assert done(again) == done(whole)


def test_a_search_may_be_given_more_trials_but_no_other_space(tmp_path):
    Study(PLAN, tmp_path).work(Trainer(), quiet)
    more, train = Study(Plan(**{**PLAN.__dict__, "search": Search(14, SPACE)}), tmp_path), Trainer()
    more.work(train, quiet)
    assert train.trained == [f"{row}_trial={n}_seed=3" for n in (12, 13) for row in "ab"]
    for other in (Search(14, SPACE, seed=1), Search(14, {"optimizer.lr": [0.1]}), None):
        with expect_refusal("proposed by", "number of trials"):
            Study(Plan(**{**PLAN.__dict__, "search": other}), tmp_path)


def test_a_value_that_is_no_number_is_kept_and_not_searched_by(tmp_path):
    plan = Plan(**{
        **PLAN.__dict__,
        "rows": {"a": {"config": []}},
        "search": Search(3, {"optimizer.lr": [0.1, 0.2, 0.3]}),
    })
    study = Study(plan, tmp_path)
    study.work(Trainer(lost=("a_trial=1_seed=3",)), quiet)
    assert [math.isnan(r["last"]) for r in study.results()] == [False, True, False]
    assert study.best()[0]["key"] != "a_trial=1_seed=3"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_is_proposed_twice_until_there_is_none_left(sampler):
    search = Search(
        100, {"a": [1, "x", {"class_path": "SNIP"}], "b": Range(0.5, 1.0, step=0.25), "c": Range(1, 2)}, sampler
    )
    assert search.points == 18
    earlier = []
    for n in range(search.points):
        earlier.append((search.propose("row", earlier, "minimize"), None if n % 3 else float(n)))
    every = itertools.product([1, "x", {"class_path": "SNIP"}], [0.5, 0.75, 1.0], [1, 2])
    assert sorted(json.dumps(list(p.values())) for p, _ in earlier) == sorted(json.dumps(list(p)) for p in every)


def test_rounded_numbers_stay_in_the_range():
    narrow = Range(0.123456, 0.123459)
    assert narrow.readable(0.123457) == narrow.high  # 0.1235 is above it
    search, earlier = Search(3, {"optimizer.lr": narrow}), []
    for _ in range(3):
        earlier.append((search.propose("a", earlier, "maximize"), 1.0))
    assert all(narrow.low <= point["optimizer.lr"] <= narrow.high for point, _ in earlier)
    assert Range(0.1, 0.2).readable(0.123456) == 0.1235
    assert (Range(1, 99999).readable(54321), Range(0.0, 9.0, step=0.00001).readable(1.23457)) == (54321, 1.23457)


def test_proposals_follow_from_seed_row_and_what_was_reached():
    search = Search(30, SPACE)
    earlier = [(search.propose("a", [], "maximize"), 1.0)]
    assert search.propose("a", earlier, "maximize") == search.propose("a", earlier, "maximize")
    assert search.propose("b", earlier, "maximize") != search.propose("a", earlier, "maximize")
    assert Search(30, SPACE, seed=1).propose("a", earlier, "maximize") != search.propose("a", earlier, "maximize")


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_tpe_finds_what_random_points_miss(direction):
    sign, reached = (1 if direction == "maximize" else -1), {}
    for sampler in ("tpe", "random"):
        best = []
        for seed in range(5):
            search, earlier = Search(40, {"optimizer.lr": Range(1e-6, 1e2, log=True)}, sampler, seed), []
            for _ in range(40):
                point = search.propose("a", earlier, direction)
                earlier.append((point, sign * reaches(point)))
            best.append(max(sign * value for _, value in earlier))
        reached[sampler] = sorted(best)[2]
    assert reached["random"] < reached["tpe"] < 0
    assert reached["tpe"] > -0.01


def load(tmp_path, **changes):
    content = {
        "rows": {"a": {"set": {"prune": "Dense"}}},
        "search": {"trials": 3, "space": {"optimizer.lr": [0.1, 0.2]}},
    }
    content["search"] = {**content["search"], **changes.pop("search", {})}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return Plan.load(tmp_path / "study.yaml")


def test_a_study_file_with_a_search_is_read(tmp_path):
    space = {"x": {"low": 1, "high": 9, "log": True}, "y": {"low": 0.5, "high": 1}, "z": [True, None]}
    search = load(tmp_path, search={"space": space, "sampler": "random", "seed": 4}).search
    assert search == Search(3, {"x": Range(1, 9, True), "y": Range(0.5, 1), "z": [True, None]}, "random", 4)
    assert search.points == 3
    assert load(tmp_path).search.points == 2


@pytest.mark.parametrize(
    ("search", "parts"),
    [
        ({"trails": 3}, ("'trails'", "closest", "'trials'")),
        ({"trials": 0}, ("search.trials", "0")),
        ({"trials": True}, ("search.trials", "True")),
        ({"seed": -1}, ("search.seed", "-1")),
        ({"sampler": "grid"}, ("search.sampler", "'grid'")),
        ({"space": {}}, ("search.space", "at least one")),
        ({"space": {"x": 0.1}}, ("search.space.x", "0.1")),
        ({"space": {"x": []}}, ("search.space.x", "[]")),
        ({"space": {"x": [1, 1.0]}}, ("search.space.x", "different")),
        ({"space": {"x": {"low": 0, "hi": 1}}}, ("search.space.x", "'hi'")),
        ({"space": {"x": {"low": "1e-3", "high": 1}}}, ("search.space.x", "1.0e-3")),
        ({"space": {"x": {"low": 0.1}}}, ("search.space.x", "numbers")),
        ({"space": {"x": {"low": 0, "high": 1, "log": True}}}, ("search.space.x", "positive low")),
        ({"space": {"x": {"low": 1, "high": 1}}}, ("search.space.x", "below high")),
        ({"space": {"x": {"low": 1, "high": 2, "step": 0.5, "log": True}}}, ("search.space.x", "without log")),
    ],
)
def test_mistakes_in_a_search_are_named(search, parts, tmp_path):
    with expect_refusal(*parts):
        load(tmp_path, search=search)


def test_a_search_has_no_grid_and_one_seed(tmp_path):
    for changes in ({"grid": {"prune.sparsity": [0.5]}}, {"seeds": [0, 1]}):
        with expect_refusal("one seed and without a grid", "beside it"):
            load(tmp_path, **changes)
    (tmp_path / "study.yaml").write_text("rows: {a: {}}\nsearch: 3")
    with expect_refusal("search: {trials, space}", "3"):
        Plan.load(tmp_path / "study.yaml")


def test_a_search_as_a_sweep_has_the_same_space(tmp_path):
    space = {
        "lr": {"low": 0.001, "high": 1.0, "log": True}, "n": {"low": 1, "high": 8}, "m": {"low": 1, "high": 8, "log": True},
        "s": {"low": 0.5, "high": 1.0, "step": 0.25}, "u": {"low": 0.5, "high": 1.0}, "c": [1, "x"],
    }  # fmt: skip
    rows = {"a": {"set": {"prune": "Dense"}}, "b": {"set": {"prune": "PruneAtInit", "prune.sparsity": 0.5}}}
    sweep = as_sweep(load(tmp_path, rows=rows, search={"space": space}))
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 6)
    assert sweep["parameters"] == {
        "prune": {"values": [{"class_path": "Dense"}, {"class_path": "PruneAtInit", "init_args": {"sparsity": 0.5}}]},
        "lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
        "n": {"distribution": "int_uniform", "min": 1, "max": 8},
        "m": {"distribution": "q_log_uniform_values", "min": 1, "max": 8},
        "s": {"distribution": "q_uniform", "q": 0.25, "min": 0.5, "max": 1.0},
        "u": {"distribution": "uniform", "min": 0.5, "max": 1.0},
        "c": {"values": [1, "x"]},
        "seed_everything": {"values": [0]},
    }
    inner = {"sampler": "random", "space": {"prune.sparsity": {"low": 0.5, "high": 0.9}}}
    alone = as_sweep(load(tmp_path, rows={"b": rows["b"]}, search=inner, set={"optimizer.lr": 0.1}))
    assert (alone["method"], list(alone["parameters"])) == ("random", ["prune.sparsity", "seed_everything"])
    assert alone["command"][3:6] == ["--optimizer.lr=0.1", "--prune=PruneAtInit", "--prune.sparsity=0.5"]
    with expect_refusal("one row for a sweep", "prune.sparsity", "a, b"):
        as_sweep(load(tmp_path, rows=rows, search=inner))
