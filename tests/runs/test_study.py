from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.report.study import cells, study_table, summary, winners
from pl_prune.runs.lock import is_locked
from pl_prune.runs.plan import Plan
from pl_prune.runs.search import Search
from pl_prune.runs.study import Study

ROOT = Path(__file__).parents[2]
PLAN = Plan(
    name="fake",
    rows={"dense": {"config": [], "grid": False}, "a": {"config": []}, "b": {"config": []}},
    grid={"prune.sparsity": [0.5, 0.9]},
    seeds=(0, 1),
    metric="acc",
)


class Trainer:
    """Stands for a training: what it reaches depends on the run alone."""

    def __init__(self, fails_on: str = "", dies_on: str = "") -> None:
        self.fails_on, self.dies_on, self.trained = fails_on, dies_on, []

    def __call__(self, spec, run):
        self.trained.append(spec.key)
        run.begin(0)
        if spec.key == self.fails_on:
            raise ValueError("diverged")
        if spec.key == self.dies_on:
            raise KeyboardInterrupt
        value = len(spec.key) + spec.seed
        for step in (1, 2):
            run.log({"epoch": step, "step": step, "seconds": 1.0, "acc": float(value + (step == 1))})
        told = {"method": spec.row, "sparsity": spec.settings.get("prune.sparsity", 0.0), "masks": None, "seconds": 1.0}
        run.finish(
            {**told, "pruning_seconds": 0.5, "peak_bytes": None, "epochs": 2, "steps": 2, "metrics": {"acc": value}},
            plp.MaskSet({}),
        )


def quiet(_: str) -> None:
    pass


def table(study: Study) -> str:
    return study_table(study.results(), "acc", "maximize")


def test_every_run_is_done_once_and_read_back(tmp_path):
    study, train = Study(PLAN, tmp_path), Trainer()
    study.work(train, quiet)
    assert sorted(train.trained) == sorted(study.specs)
    assert len(train.trained) == 10
    assert [r["key"] for r in study.results()] == list(study.specs)
    first = study.results()[0]
    assert (first["last"], first["best"]) == (12.0, 13.0)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == study.results()
    again, nothing = Study(PLAN, tmp_path), Trainer()
    again.work(nothing, quiet)
    assert nothing.trained == []
    assert table(again) == table(study)


def test_a_run_that_fails_stops_no_other_and_is_tried_again_the_next_time(tmp_path):
    study, train = Study(PLAN, tmp_path), Trainer(fails_on="a_sparsity=0.9_seed=1")
    study.work(train, quiet)
    assert len(train.trained) == 10
    assert study.failures() == {"a_sparsity=0.9_seed=1": "ValueError: diverged"}
    assert len(study.results()) == 9
    again, mended = Study(PLAN, tmp_path), Trainer()
    again.work(mended, quiet)
    assert mended.trained == ["a_sparsity=0.9_seed=1"]
    assert again.failures() == {}
    assert len(again.results()) == 10


def test_a_run_whose_worker_died_is_taken_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Study(PLAN, tmp_path).work(Trainer(dies_on="b_sparsity=0.5_seed=0"), quiet)
    again, train = Study(PLAN, tmp_path), Trainer()
    again.work(train, quiet)
    assert "b_sparsity=0.5_seed=0" in train.trained
    whole = Study(PLAN, tmp_path / "whole")
    whole.work(Trainer(), quiet)
    assert table(again) == table(whole)


def test_finished_runs_are_not_repeated_even_without_the_database(tmp_path):
    Study(PLAN, tmp_path).work(Trainer(), quiet)
    (tmp_path / "study.db").unlink()
    again, train = Study(PLAN, tmp_path), Trainer()
    again.work(train, quiet)
    assert train.trained == []
    assert len(again.results()) == 10


def test_a_plan_may_grow(tmp_path):
    Study(PLAN, tmp_path).work(Trainer(), quiet)
    more = Plan(**{**PLAN.__dict__, "seeds": (0, 1, 2)})
    study, train = Study(more, tmp_path), Trainer()
    study.work(train, quiet)
    assert len(train.trained) == 5
    assert all(key.endswith("seed=2") for key in train.trained)


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported what they need when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pl_prune.cli", "pl_prune.runs.study"])
    return context


class Slow(Trainer):
    def __call__(self, spec, run):
        time.sleep(0.3)
        super().__call__(spec, run)


def share(folder):
    train = Slow()
    Study(PLAN, folder).work(train, quiet)
    return train.trained


def test_workers_share_a_study_without_repeating_a_run(tmp_path, processes):
    with processes.Pool(2) as pool:
        trained = pool.map(share, [tmp_path] * 2, chunksize=1)
    study = Study(PLAN, tmp_path)
    assert sorted(trained[0] + trained[1]) == sorted(study.specs)
    assert trained[0]
    assert trained[1]
    assert len(study.results()) == 10


def test_a_database_that_cannot_be_reached_and_a_metric_that_is_not_logged_are_named(tmp_path):
    with expect_refusal("sqlite:////nowhere/at/all.db", "--storage"):
        Study(PLAN, tmp_path, "sqlite:////nowhere/at/all.db")
    study, train = Study(Plan(**{**PLAN.__dict__, "metric": "val/acc", "name": "other"}), tmp_path), Trainer()
    with expect_refusal("the metric 'val/acc'", "found acc", "closest name is 'acc'"):
        study.work(train, quiet)
    assert train.trained == ["dense_seed=0"]  # not all of them, to fail one by one
    assert set(study.failures()) == {"dense_seed=0"}
    again, train = Study(Plan(**{**PLAN.__dict__, "name": "other"}), tmp_path), Trainer()
    again.work(train, quiet)
    assert "dense_seed=0" not in train.trained
    assert len(again.results()) == 10


def test_another_metric_is_read_from_the_runs(tmp_path):
    class Two(Trainer):
        def __call__(self, spec, run):
            super().__call__(spec, run)
            lines = [{**record, "loss": 10 - record["acc"]} for record in run.metrics()]
            (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    study = Study(PLAN, tmp_path)
    study.work(Two(), quiet)
    told = json.loads((tmp_path / "study.json").read_text())
    assert (told["total"], told["failures"]) == (10, {})
    other = Study(Plan(**{**PLAN.__dict__, "metric": "loss", "direction": "minimize"}), tmp_path)
    train = Trainer()
    other.work(train, quiet)
    assert train.trained == []
    pairs = list(zip(study.results(), other.results(), strict=True))
    assert all(there["last"] == 10 - here["last"] for here, there in pairs)
    assert all(there["best"] == 10 - here["best"] for here, there in pairs)
    with expect_refusal("the metric 'lost'", "closest name is 'loss'"):
        Study(Plan(**{**PLAN.__dict__, "metric": "lost"}), tmp_path).results()


def test_results_are_there_before_the_study_is_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Study(PLAN, tmp_path).work(Trainer(dies_on="b_sparsity=0.5_seed=0"), quiet)
    assert 0 < len((tmp_path / "results.jsonl").read_text().splitlines()) < 10
    assert json.loads((tmp_path / "study.json").read_text())["total"] == 10


def test_a_worker_whose_parent_is_gone_takes_no_other_run(tmp_path):
    train, left = Trainer(), [True, True, False]
    study = Study(PLAN, tmp_path)
    study.work(train, quiet, lambda: left.pop(0))
    assert len(train.trained) == len(study.results()) == 2


def test_a_folder_belongs_to_one_study(tmp_path):
    Study(PLAN, tmp_path)
    with expect_refusal("the folder of 'other'", "found that of 'fake'", "--folder"):
        Study(Plan(**{**PLAN.__dict__, "name": "other"}), tmp_path)


def test_a_seed_that_diverged_leaves_the_table_whole():
    def record(row, seed, last):
        times = {"seconds": 2.0, "pruning_seconds": 0.25, "peak_bytes": None}
        return {"row": row, "settings": {}, "seed": seed, "last": last, "best": last, **times}

    values = {"a": (0.8, 0.82), "b": (0.7, math.nan), "c": (0.6, 0.61)}
    results = [record(row, s, v) for row, found in values.items() for s, v in enumerate(found)]
    assert [cell.row for cell in winners(cells(results), "maximize")] == ["a"]
    lines = study_table(results, "acc", "maximize").splitlines()
    assert "*0.8100" in lines[2]
    assert "nan" in lines[3]
    assert math.isnan(summary(results, "maximize")[1]["last_std"])


def test_the_table_has_mean_deviation_and_the_best_where_intervals_part():
    def record(row, sparsity, seed, last):
        settings = {"prune.sparsity": sparsity} if sparsity else {}
        times = {"seconds": 2.0, "pruning_seconds": 0.25, "peak_bytes": 2**20 * (seed + 1)}
        return {"row": row, "settings": settings, "seed": seed, "last": last, "best": last + 0.01, **times}

    results = [record("dense", None, s, v) for s, v in enumerate((0.9, 0.92))]
    results += [record("a", 0.5, s, v) for s, v in enumerate((0.8, 0.82))] + [
        record("b", 0.5, s, v) for s, v in enumerate((0.7, 0.72))
    ]
    results += [record("a", 0.9, s, v) for s, v in enumerate((0.5, 0.7))] + [
        record("b", 0.9, s, v) for s, v in enumerate((0.52, 0.6))
    ]
    found = cells(results)
    assert [(c.row, c.settings) for c in winners(found, "maximize")] == [("a", {"prune.sparsity": 0.5})]
    assert [c.row for c in winners(found, "minimize")] == ["b"]
    lines = study_table(results, "acc", "maximize").splitlines()
    assert lines[0].split()[:3] == ["row", "sparsity", "seeds"]
    assert "0.9100 ± 0.0141" in lines[2]
    assert "**0.8100 ± 0.0141**" in lines[3]
    assert not any("**" in line for line in lines[4:])
    assert lines[3].split()[-3:] == ["0.25", "2.0", "2"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of five real trainings on the digits."""
    monkeypatch.chdir(ROOT)
    content = {
        "name": "small",
        "config": "recipes/settings/convnet_digits.yaml",
        "set": {"trainer.accelerator": "cpu", "trainer.max_epochs": 2, "model.network.width": 4},
        "rows": {
            "dense": {"set": {"prune": "Dense"}, "grid": False},
            "SNIP": {"config": "recipes/pai/snip.yaml"},
            "after": {"config": "recipes/pai/magnitude.yaml", "set": {"prune.sparsity": 0.5}, "weights_of": "dense", "grid": False},
            "longer": {"masks_of": "after", "grid": False},
            "cubic": {"set": {"prune": {"class_path": "GradualPruning", "init_args": {"schedule": {
                "class_path": "Cubic", "init_args": {"final": 0.9, "end": 30, "every": 10}}}}}, "grid": False},
        },
        "grid": {"prune.sparsity": [0.5, 0.9]},
    }  # fmt: skip
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def outcome(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [[r[key] for key in ("key", "last", "best", "masks", "steps")] for r in map(json.loads, lines)]


def test_a_run_that_starts_from_a_file_of_weights_is_resumed(small, tmp_path, monkeypatch):
    from pl_prune.commands.study_run import StudyRun

    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    content = yaml.safe_load(small.read_text())
    content["set"]["trainer.max_epochs"] = 1
    small.write_text(yaml.safe_dump(content))
    first = Plan.load(small).specs()[0]
    run = plp.RunFolder(tmp_path / first.key)
    StudyRun.train(first, run)
    longer = {"weights": str(run.checkpoint), "trainer.max_epochs": 2}
    (run.path / "result.json").unlink()
    StudyRun.train(dataclasses.replace(first, values={**first.values, **longer}), run)
    assert [record["epoch"] for record in run.metrics()] == [0, 1]


def study_of_its_own(arguments, said):
    """Run a study in a process that says on a file what it would on the terminal."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    torch.set_num_threads(1)
    sys.argv = ["pl-prune"]
    main(["study", *arguments])


def test_a_study_killed_again_and_again_ends_as_an_undisturbed_one(small, tmp_path, capsys, processes):
    content = yaml.safe_load(small.read_text())
    content["grid"] = {"prune.sparsity": [0.9]}
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments, said = [f"--config={small}", f"--folder={tmp_path / 'killed'}"], tmp_path / "said"
    dice, killed = random.Random(0), 0
    for _ in range(3):
        said.write_text("")
        job = processes.Process(target=study_of_its_own, args=(arguments, said))
        job.start()
        while job.is_alive() and not re.search(": started|: resumed", said.read_text()):
            time.sleep(0.05)
        time.sleep(dice.uniform(0.1, 1.5))
        job.kill()
        job.join()
        killed += job.exitcode == -9
    assert killed > 1
    undisturbed = tmp_path / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pl-prune"])
        assert main(["study", *arguments]) == 0
        capsys.readouterr()
        assert main(["study", f"--config={small}", f"--folder={undisturbed}"]) == 0
    assert outcome(tmp_path / "killed") == outcome(undisturbed)
    assert len(outcome(undisturbed)) == 5
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["dense", "SNIP", "after", "longer", "cubic"]
    run = plp.RunFolder(undisturbed / "runs" / "SNIP_sparsity=0.9_seed=0")
    assert run.masks().sparsity() == run.result()["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert len(run.metrics()) == 2
    dense, after = (plp.RunFolder(undisturbed / "runs" / f"{row}_seed=0").metrics() for row in ("dense", "after"))
    assert after[0]["train/loss"] < 0.75 * dense[0]["train/loss"]
    masks = [plp.RunFolder(undisturbed / "runs" / f"{row}_seed=0").masks() for row in ("after", "longer")]
    assert masks[0] == masks[1]
    longer = plp.RunFolder(undisturbed / "runs" / "longer_seed=0").metrics()
    assert longer[0]["train/loss"] < after[0]["train/loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nowhere.yaml"], "found none"),
        (["--config", "STUDY", "--workers=0"], "--workers of 1 or more"),
        (["--config", "STUDY", "--storage=nosuch://x"], "--storage"),
    ],
)
def test_bad_input_ends_in_a_message_and_status_two(arguments, said, small, tmp_path, capfd, monkeypatch):
    arguments = [str(small) if word == "STUDY" else word for word in arguments]
    assert main(["study", *arguments, f"--folder={tmp_path / 'f'}"]) == 2
    assert said in capfd.readouterr().err


def test_the_sweep_of_a_study_is_printed(small, capsys):
    content = yaml.safe_load(small.read_text())
    del content["rows"]["after"], content["rows"]["longer"]
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["study", f"--config={small}", "--as-sweep"]) == 0
    sweep = yaml.safe_load(capsys.readouterr().out)
    assert [p["class_path"] for p in sweep["parameters"]["prune"]["values"]] == [
        "Dense",
        *["pl_prune.PruneAtInit"] * 2,
        "GradualPruning",
    ]


def test_settings_that_do_not_parse_are_refused_before_the_first_run(small, tmp_path, capfd):
    content = yaml.safe_load(small.read_text())
    content["rows"] = {"plain": {"set": {"prune": "Dense"}}, "odd": {"set": {"prune": "Dense", "prune.spersity": 0.5}}}
    small.write_text(yaml.safe_dump(content))
    assert main(["study", f"--config={small}", f"--folder={tmp_path / 'f'}"]) == 2
    said = capfd.readouterr().err
    assert "Expected" in said
    assert "spersity" in said
    assert not list((tmp_path / "f").glob("runs/*"))


def test_a_value_of_the_grid_that_does_not_parse_is_refused_before_the_first_run(small, tmp_path, capfd):
    content = yaml.safe_load(small.read_text())
    content["grid"] = {"prune.sparsity": [0.5, "much"]}
    small.write_text(yaml.safe_dump(content))
    assert main(["study", f"--config={small}", f"--folder={tmp_path / 'f'}"]) == 2
    assert "much" in capfd.readouterr().err


def test_what_is_left_of_a_search_names_a_run_of_each_row(tmp_path):
    search = Search.read({"trials": 2, "space": {"prune.sparsity": {"low": 0.5, "high": 0.9}}}, "here")
    plan = Plan("s", {"a": {"config": []}, "b": {"config": [], "grid": False}}, search=search)
    assert [(s.row, s.settings) for s in Study(plan, tmp_path).left()] == [
        ("b", {}),
        *[("a", {"prune.sparsity": end}) for end in (0.5, 0.9)],  # both must be settings that fit takes
    ]


def change(plan, **changes):
    return Plan(**{**plan.__dict__, **changes})


def test_settings_that_changed_under_finished_runs_are_refused(tmp_path):
    Study(PLAN, tmp_path).work(Trainer(), quiet)
    changed, train = Study(change(PLAN, set={"trainer.max_epochs": 9}), tmp_path), Trainer()
    with expect_refusal("'dense_seed=0' was run with", "trainer.max_epochs", "another name or --folder"):
        changed.work(train, quiet)
    assert train.trained == []


def test_settings_in_another_order_are_others_where_one_goes_into_another(tmp_path):
    first = {"prune": "Dense", "prune.sparsity": 0.5, "trainer.max_epochs": 2, "trainer.gradient_clip_val": None}
    Study(change(PLAN, set=first), tmp_path).work(Trainer(), quiet)
    same = {"trainer.max_epochs": 2, "prune": "Dense", "prune.sparsity": 0.5, "trainer.gradient_clip_val": None}
    train = Trainer()
    Study(change(PLAN, set=same), tmp_path).work(train, quiet)
    assert train.trained == []
    turned = {"prune.sparsity": 0.5, "prune": "Dense", "trainer.max_epochs": 2, "trainer.gradient_clip_val": None}
    with expect_refusal("'order': ['prune', 'prune.sparsity']", "found {'order': ['prune.sparsity', 'prune']"):
        Study(change(PLAN, set=turned), tmp_path).work(Trainer(), quiet)
    with expect_refusal("'trainer.gradient_clip_val': None", "found them gone"):
        del same["trainer.gradient_clip_val"]
        Study(change(PLAN, set=same), tmp_path).work(Trainer(), quiet)


class Interrupted(Trainer):
    """Leaves a checkpoint of the run that it dies in."""

    def __call__(self, spec, run):
        (run.path / "checkpoints").mkdir(parents=True)
        (run.path / "checkpoints" / "last.ckpt").touch()
        super().__call__(spec, run)


def test_settings_that_changed_under_an_unfinished_run_are_refused(tmp_path):
    (tmp_path / "common.yaml").write_text("# a comment\noptimizer.lr: 0.1")
    plan = change(PLAN, config=(str(tmp_path / "common.yaml"),), set={"trainer.max_epochs": 2})
    with pytest.raises(KeyboardInterrupt):
        Study(plan, tmp_path / "s").work(Interrupted(dies_on="dense_seed=0"), quiet)
    train = Trainer()
    with expect_refusal("'dense_seed=0' was begun with", "{'trainer.max_epochs': 2}", "{'trainer.max_epochs': 3}"):
        Study(change(plan, set={"trainer.max_epochs": 3}), tmp_path / "s").work(train, quiet)
    with expect_refusal("'trainer.max_epochs': 2", "found them gone"):
        Study(change(plan, set={}), tmp_path / "s").work(train, quiet)
    (tmp_path / "common.yaml").write_text("optimizer.lr: 0.2")
    with expect_refusal("{'common.yaml': 'content"):
        Study(plan, tmp_path / "s").work(train, quiet)
    assert train.trained == []
    (tmp_path / "common.yaml").write_text("optimizer.lr: 0.1  # another comment")
    study = Study(plan, tmp_path / "s")
    study.work(train, quiet)
    assert len(study.results()) == 10


def test_a_run_that_failed_before_its_first_checkpoint_takes_new_settings(tmp_path):
    study = Study(PLAN, tmp_path)
    study.work(Trainer(fails_on="a_sparsity=0.5_seed=0"), quiet)
    rows = {**PLAN.rows, "a": {"config": [], "set": {"optimizer.lr": 0.1}}}
    study = Study(change(PLAN, rows={"a": rows["a"]}, grid={"prune.sparsity": [0.5]}, seeds=(0,)), tmp_path)
    study.work(Trainer(), quiet)
    assert [r["asked"]["values"]["optimizer.lr"] for r in study.results()] == [0.1]


class Weighing(Trainer):
    def __call__(self, spec, run):
        self.weights = {**getattr(self, "weights", {}), spec.key: spec.values.get("weights")}
        if spec.row == "dense":
            (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            torch.save({"global_step": 2}, run.path / "checkpoints" / "last.ckpt")
        super().__call__(spec, run)


def test_a_row_that_starts_from_anothers_weights_waits_for_it(tmp_path):
    after = {"config": [], "weights_of": "dense"}
    plan = change(PLAN, rows={"after": after, "dense": PLAN.rows["dense"]}, grid={"prune.sparsity": [0.5]})
    lost = Study(plan, tmp_path)
    lost.work(Weighing(fails_on="dense_seed=1"), quiet)
    assert [r["key"] for r in lost.results()] == ["after_sparsity=0.5_seed=0", "dense_seed=0"]
    study, train = Study(plan, tmp_path), Weighing()
    study.work(train, quiet)
    assert train.trained == ["dense_seed=1", "after_sparsity=0.5_seed=1"]
    checkpoint = tmp_path / "runs" / "dense_seed=1" / "checkpoints" / "last.ckpt"
    assert train.weights == {"dense_seed=1": None, "after_sparsity=0.5_seed=1": str(checkpoint)}
    assert study.results()[0]["asked"]["weights_of"] == "dense_seed=0"
    (tmp_path / "runs" / "dense_seed=0" / "checkpoints" / "last.ckpt").unlink()
    shutil.rmtree(tmp_path / "runs" / "after_sparsity=0.5_seed=0")
    (tmp_path / "study.db").unlink()
    alone = Study(plan, tmp_path)
    alone.work(Trainer(), quiet)
    assert "Expected the last checkpoint of 'dense_seed=0'" in alone.failures()["after_sparsity=0.5_seed=0"]


def test_a_run_that_two_machines_put_into_the_queue_is_done_once(tmp_path):
    study, train = Study(PLAN, tmp_path), Trainer()
    for key in study.specs:
        study._study.enqueue_trial({}, user_attrs={"key": key})
    study.work(train, quiet)
    for key in study.specs:
        study._study.enqueue_trial({}, user_attrs={"key": key})
    study.work(train, quiet)
    assert len(train.trained) == 10
    assert len(study.results()) == len(study._trials("COMPLETE")) == 10


def test_runs_are_taken_one_process_at_a_time(tmp_path, monkeypatch):
    held, plain = [], RDBStorage.set_trial_state_values

    def watched(self, trial_id, state, values=None):
        if state.name == "RUNNING":
            held.append(is_locked(tmp_path / "sharing"))
        return plain(self, trial_id, state, values)

    class Watched(Trainer):
        def __call__(self, spec, run):
            free.append(not is_locked(tmp_path / "sharing"))
            super().__call__(spec, run)

    free = []
    monkeypatch.setattr(RDBStorage, "set_trial_state_values", watched)
    Study(PLAN, tmp_path).work(Watched(), quiet)
    assert held == free == [True] * 10


def test_a_worker_that_was_given_up_for_silent_goes_on(tmp_path):
    class Slow(Trainer):
        def __call__(self, spec, run):
            super().__call__(spec, run)
            if len(self.trained) == 1:
                (trial,) = study._trials("RUNNING")
                study._study.tell(trial.number, state=TrialState.FAIL)

    study, train, said = Study(PLAN, tmp_path), Slow(), []
    study.work(train, said.append)
    assert len(train.trained) == len(study.results()) == 10
    assert any("Its run is read from its folder" in line for line in said)


def test_a_metric_that_is_not_finite_is_a_result_all_the_same(tmp_path):
    class Diverging(Trainer):
        def __call__(self, spec, run):
            super().__call__(spec, run)
            run.log({"epoch": 3, "step": 3, "seconds": 1.0, "acc": float("nan")})

    study, train = Study(PLAN, tmp_path), Diverging()
    study.work(train, quiet)
    assert len(train.trained) == len(study.results()) == 10
    assert all(math.isnan(r["last"]) for r in study.results())


def test_the_table_has_the_papers_values_and_rows_that_are_not_reproduced(tmp_path):
    paper = {"a": ["93.1 ± 0.2", None], "RST": ["92.0", "91.5"]}
    plan = change(PLAN, paper=paper, not_reproduced=("RST", "GraNet"))
    study = Study(plan, tmp_path)
    study.work(Trainer(), quiet)
    lines = study_table(study.results(), "acc", "maximize", plan.references()).splitlines()
    assert "paper" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["dense", "a", "a", "b", "b", "RST", "RST", "GraNet"]
    assert ["93.1 ± 0.2" in line for line in lines[2:]] == [False, True, *[False] * 6]
    assert ["not reproduced" in line for line in lines[2:]] == [False] * 5 + [True] * 3
    assert lines[7].split()[:2] == ["RST", "0.5"]
    assert "92.0" in lines[7]
    assert json.loads((tmp_path / "study.json").read_text())["references"] == plan.references()
    plain = study_table(study.results(), "acc", "maximize").splitlines()
    assert "paper" not in plain[0]
    assert len(plain) == 7
