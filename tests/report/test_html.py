"""The page of a study and of a run: what it says, that it stands alone, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError
from pl_prune.report.heatmaps import overlap
from pl_prune.report.html import write_report
from pl_prune.report.reading import read_study
from pl_prune.report.scored import scored
from pl_prune.runs.folder import RunFolder

VOID = {"meta", "link", "br", "hr", "img", "input"}
SPARSITIES = (0.5, 0.9, 0.99)
LATENCY = {
    "dense": [0.0010, 0.0020, 0.0030],
    "masked": [0.0010, 0.0021, 0.0030],
    "batch": 2,
    "threads": 4,
    "device": "a device",
    "repeats": 20,
}


class Page(HTMLParser):
    """A page taken apart; raises where elements are not nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, str] = {"lead": "", "li": "", "figcaption": "", "h3": "", "strong": "", "all": ""}
        self.size = path.stat().st_size
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(f"lead:{tag}" if dict(attrs).get("class") == "lead" else tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().rpartition(":")[2] == tag

    def handle_data(self, data):
        self.texts["all"] += data
        for kind in self.texts.keys() & set(self.open):
            self.texts[kind] += data
        if "lead:p" in self.open:
            self.texts["lead"] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def line(self, *start: str, table: int = 0) -> list[str]:
        return [row for row in self.rows if row[: len(start)] == list(start)][table]

    def stands_alone(self) -> None:
        kinds = [tag for tag, _ in self.tags]
        assert "script" not in kinds
        assert "link" not in kinds
        for tag, attrs in self.tags:
            assert tag != "img" or attrs.get("alt")
            for name, value in attrs.items():
                assert name not in ("src", "href", "xlink:href") or (value or "").startswith(("#", "data:")), (
                    tag,
                    attrs,
                )
        drawings = [attrs for tag, attrs in self.tags if tag == "svg"]
        assert all(a["role"] == "img" and len(a["aria-label"] or "") > 30 for a in drawings)
        assert kinds.count("figure") == kinds.count("figcaption") == len(drawings) + kinds.count("img")
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        used = set(re.findall(r"url\(#([^)]*)\)", json.dumps(self.tags))) | {
            href[1:] for _, a in self.tags if (href := a.get("xlink:href") or "").startswith("#")
        }
        assert used <= set(ids)


def layers(kept: dict[str, int], total: int = 64) -> list[dict]:
    shape = [8, total // 8]
    return [
        {"name": n, "shape": shape, "kept": k, "total": total, "empty_rows": 8 - min(k, 8)} for n, k in kept.items()
    ]


def add(folder: Path, row: str, settings: dict, seed: int, last: float, **more) -> None:
    """Write a run as a study does, and add it to the results."""
    key = f"{re.sub(r'[^a-zA-Z0-9]', '_', row)}_{'_'.join(f'{v}' for v in settings.values())}_seed={seed}"
    sparsity = more.get("sparsity", next((v for v in settings.values() if isinstance(v, float) and v < 1), 0.0))
    run = RunFolder(folder / "runs" / key)
    run.path.mkdir(parents=True)
    names = more.get("layers", [f"network.block{i}.conv.weight" for i in range(3)])
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(8, 8, generator=generator) for n in names}
    masks = MaskSet(
        {n: score >= sparsity for n, score in scores.items()} if sparsity and more.get("masked", True) else {}
    )
    kept = more.get("kept", {n: max(k, 1) for n, (k, _) in masks.counts().items()} or dict.fromkeys(names, 64))
    for epoch in range(more.get("epochs", 3)):
        run.log({
            "epoch": epoch,
            "step": 10 * epoch,
            "val/acc": last * (epoch + 1) / more.get("epochs", 3),
            "val/loss": 0.1,
        })
    cost = {"params": 1000, "params_kept": 100 + sum(kept.values()), "macs": 9000, "macs_kept": 10 * sum(kept.values())}
    report = {"layers": layers(kept), "cost": cost, "path": more.get("path", True), "metrics": {}}
    report |= {"latency": more["latency"]} if "latency" in more else {}
    (run.path / "report.json").write_text(json.dumps(report))
    result = {"method": f"{row}() at {sparsity}", "sparsity": sparsity, "seed": seed, "epochs": 3, "steps": 30}
    result |= {"seconds": 5.0 + seed, "pruning_seconds": 0.5, "peak_bytes": 2**30, "metrics": {"val/acc": last}}
    result |= {"removed": more["removed"]} if "removed" in more else {}
    if sparsity and "criterion" in more:
        run.keep_scores(scores, {"criterion": more["criterion"], "weights": f"of seed {seed}"})
    run.finish(result, masks)
    record = {"key": key, "row": row, "settings": settings, "best": max(last, 0.9), "last": last, **result}
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def small(folder: Path) -> Path:
    """Three rows and dense at three points: at 0.5 intervals overlap, at 0.9 `far` wins, at 0.99 `dies` collapses."""
    for seed in range(3):
        add(folder, "dense", {}, seed, 0.95 + 0.001 * seed)
        for sparsity in SPARSITIES:
            level = 0.90 - sparsity / 10 + 0.01 * seed
            timed = {"latency": LATENCY} if sparsity == 0.9 else {}
            add(folder, "near", {"prune.sparsity": sparsity}, seed, level, criterion=plp.Magnitude(), **timed)
            level += 0.001 if sparsity == 0.5 else 0.05
            add(folder, "far", {"prune.sparsity": sparsity}, seed, level, criterion=plp.SNIP())
        names = [f"network.block{i}.conv.weight" for i in range(3)]
        dead = {"kept": dict(zip(names, (5, 0, 1), strict=True)), "path": False}
        add(folder, "dies", {"prune.sparsity": 0.99}, seed, 0.1 + 0.001 * seed, **dead)
    return folder


@pytest.fixture
def study(tmp_path):
    return small(tmp_path / "small")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study with its page, for tests that only read."""
    folder = small(tmp_path_factory.mktemp("written") / "small")
    return folder, write_report(folder)


def test_a_study_is_a_page_that_stands_alone_with_its_figures_beside_it(written):
    study, path = written
    assert path == study / "report.html"
    page = Page(path)
    page.stands_alone()
    pngs = sorted((study / "report_figures").iterdir())
    assert len(pngs) == 16
    assert len(pngs) == sum(tag == "svg" for tag, _ in page.tags)
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)
    assert not list(study.rglob("*.part"))
    for word in (
        "against sparsity",
        "Density of each layer",
        "Collapse",
        "parameters kept",
        "MACs kept",
        "against latency",
        "during training",
        "Scores of the entries",
        "Scores against magnitudes",
        "Magnitudes that are pruned",
        "Correlation between the rows' scores",
        "Widths at sparsity 0.99",
        "Agreement of masks",
    ):
        assert word in page.texts["h3"], word
    assert "save neither time nor memory" in page.texts["all"]


def test_the_first_paragraph_says_who_won_and_where_nobody_did(written):
    page = Page(written[1])
    lead = page.texts["lead"]
    assert "far won at sparsity 0.9 and 0.99" in lead
    assert "nobody won at sparsity 0.5" in lead
    assert "near won" not in lead
    assert "24 runs of 4 rows" in lead
    assert "dense row has 0.9510 ± 0.0010" in lead
    assert "Collapsed: dies at sparsity 0.99." in lead
    points = page.texts["li"]
    assert "At sparsity 0.5, nobody won: far has the highest mean val/acc" in points
    assert "overlaps with that of near" in points
    assert "At sparsity 0.9, far won" in points
    assert (
        "dies collapsed at sparsity 0.99: nothing is kept of network.block1.conv.weight in 3 of 3 runs; "
        "no path leads from input to output in 3 of 3 runs; val/acc is 0.1010 ± 0.0010, at most half"
    ) in points
    assert "far collapsed" not in points


def test_a_metric_to_be_minimized_turns_the_verdict_round(study):
    lead = Page(write_report(study, direction="minimize")).texts["lead"]
    assert "near won at sparsity 0.9" in lead
    assert "dies won at sparsity 0.99" in lead


def test_a_study_is_decided_and_called_as_its_own_record_says(study):
    (study / "study.json").write_text(json.dumps({"name": "of nets", "metric": "val/acc", "direction": "minimize"}))
    page = Page(write_report(study))
    assert "near won at sparsity 0.9" in page.texts["lead"]
    assert "Study of nets" in page.texts["all"]
    assert "far won" in Page(write_report(study, direction="maximize")).texts["lead"]
    about = {"total": 99, "failures": {"far_seed=7": "ValueError: diverged"}}
    (study / "study.json").write_text(json.dumps(about))
    page = Page(write_report(study))
    assert "of 99 runs are not done, 1 of them failed" in page.texts["lead"]
    assert "far_seed=7: ValueError: diverged" in page.texts["li"]


def test_another_metric_is_read_from_the_curves_or_refused(study):
    page = Page(write_report(study, metric="val/loss", direction="minimize"))
    assert "compared by val/loss" in page.texts["lead"]
    curve = [json.loads(line) for line in next(study.glob("runs/near*/metrics.jsonl")).read_text().splitlines()]
    assert f"{curve[-1]['val/loss']:.4f}" in page.texts["all"]
    with expect_refusal("the metric 'val/los'", "closest name is 'val/loss'"):
        write_report(study, metric="val/los")


def test_the_table_holds_means_and_deviations_of_the_data(written):
    study, path = written
    page = Page(path)
    records = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    checked = 0
    for row in ("near", "far"):
        for sparsity in SPARSITIES:
            values = [r["last"] for r in records if r["row"] == row and r["settings"] == {"prune.sparsity": sparsity}]
            best = [r["best"] for r in records if r["row"] == row and r["settings"] == {"prune.sparsity": sparsity}]
            line = page.line(row, str(sparsity))
            assert line[2] == "3 (0, 1, 2)"
            assert line[3] == f"{mean(values):.4f} ± {stdev(values):.4f}"
            assert line[4] == f"{mean(best):.4f} ± {stdev(best):.4f}"
            assert line[5:] == ["0.50", "6.0", "1024", f"{row}() at {sparsity}"]
            checked += 1
    assert checked == 6
    assert page.line("dense")[1] == "-"
    assert page.texts["strong"] == page.line("far", "0.9")[3] + page.line("far", "0.99")[3]


def test_what_a_paper_reports_stands_beside(tmp_path):
    for seed in range(2):
        for row in ("a", "b"):
            add(tmp_path / "s", row, {"prune.sparsity": 0.9}, seed, 0.9)
    references = [
        {"row": "a", "settings": {"prune.sparsity": 0.9}, "value": "93.1 ± 0.2", "reproduced": True},
        {"row": "theirs <x>", "settings": {"prune.sparsity": 0.9}, "value": "94.0", "reproduced": False},
    ]
    (tmp_path / "s" / "study.json").write_text(json.dumps({"references": references}))
    page = Page(write_report(tmp_path / "s"))
    assert page.rows[0][5] == "paper"
    assert page.line("a", "0.9")[5] == "93.1 ± 0.2"
    assert page.line("b", "0.9")[5] == "-"
    assert page.line("theirs <x>") == ["theirs <x>", "0.9", "0", "not reproduced", "-", "94.0", "-", "-", "-", "-"]
    (tmp_path / "s" / "study.json").write_text(json.dumps({"references": [{"row": "a"}]}))
    with pytest.raises(PruneError, match="Expected the record of a study"):
        write_report(tmp_path / "s")


def test_a_single_seed_wins_nothing_and_has_no_band(tmp_path):
    for row, value in (("a", 0.9), ("b", 0.5)):
        add(tmp_path / "s", row, {"prune.sparsity": 0.9}, 0, value)
    page = Page(write_report(tmp_path / "s"))
    assert "Nobody won at sparsity 0.9" in page.texts["lead"]
    assert "with a single seed each there is no interval" in page.texts["li"]
    assert "no bands" in page.texts["figcaption"]
    assert page.texts["strong"] == ""
    assert page.line("a", "0.9")[3] == "0.9000"


def test_a_search_leads_with_the_best_point_of_each_row(tmp_path):
    found = {"a": {0.1: 0.7, 0.2: 0.9, 0.3: 0.8}, "b": {0.15: 0.95, 0.25: float("nan")}}
    for row, points in found.items():
        for lr, value in points.items():
            add(tmp_path / "s", row, {"optimizer.lr": lr}, 0, value)
    (tmp_path / "s" / "study.json").write_text(json.dumps({"search": {"sampler": "tpe"}, "references": []}))
    page = Page(write_report(tmp_path / "s"))
    assert "Best of b: 0.9500 at lr 0.15. Best of a: 0.9000 at lr 0.2." in page.texts["lead"]
    assert "obody won" not in page.texts["all"]
    assert "val/acc against lr" in page.texts["h3"]
    assert "Each point is a run; the best of each row is ringed" in page.texts["figcaption"]
    assert page.line("a", "0.2")[3] in page.texts["strong"]
    assert page.line("a", "0.1")[3] not in page.texts["strong"]


def test_text_of_the_data_is_escaped(tmp_path):
    names = ["<script>alert(1)</script>", "$x_", '_hidden & "quoted" -->', "<b>"]
    for seed in range(2):
        for i, name in enumerate(names):
            add(
                tmp_path / "s",
                name,
                {"k<i>": "<u>"},
                seed,
                0.5 + i / 10,
                layers=["<img src=x>.weight", "b"],
                sparsity=0.5,
            )
    path = write_report(tmp_path / "s", metric="val/acc")
    page = Page(path)
    page.stands_alone()
    assert not {"b", "i", "u", "img", "script"} & {tag for tag, _ in page.tags}
    assert page.line("<b>")[1] == "<u>"
    assert "<b> won at k<i> <u>" in page.texts["lead"]
    assert page.texts["all"].count("$x_") > 3


@pytest.mark.parametrize("grid", ["lr", "two keys", "no number", "none"])
def test_other_grids_get_their_figures(tmp_path, grid):
    points = {
        "lr": [{"optimizer.lr": 0.1}, {"optimizer.lr": 1}, {"optimizer.lr": 10}],
        "two keys": [{"on": flag, "prune.sparsity": s} for flag in (True, False) for s in (0.0, 0.5)],
        "no number": [{"a.kind": "x"}, {"b.kind": {"class_path": "y" * 90}}],
        "none": [{}],
    }[grid]
    for seed in range(2):
        for row in ("one", "other row"):
            for i, point in enumerate(points):
                add(tmp_path / "s", row, point, seed, 0.5 + i / 50 + (row == "one") / 5 + seed / 100, sparsity=0.5)
    page = Page(write_report(tmp_path / "s"))
    page.stands_alone()
    expected = {"lr": "against lr", "two keys": "against sparsity at on true", "no number": "of each row"}
    assert expected.get(grid, "of each row") in page.texts["h3"]
    assert "one won at" in page.texts["lead"]
    assert "nobody" not in page.texts["lead"]


def test_a_diverged_row_is_named_and_wins_nothing(tmp_path):
    for seed in range(2):
        for row, value in (("a", 0.9), ("b", 0.5), ("nan", float("nan")), ("inf", float("inf"))):
            add(tmp_path / "s", row, {"prune.sparsity": 0.9}, seed, value)
    page = Page(write_report(tmp_path / "s"))
    assert "a won at sparsity 0.9" in page.texts["lead"]
    assert "nan and inf ended in a number that is not finite" in page.texts["li"]
    assert "inf collapsed at sparsity 0.9" in page.texts["li"]


def test_runs_without_report_metrics_or_masks_leave_figures_out_and_say_so(study):
    for name in ("report.json", "metrics.jsonl", "masks.safetensors", "scores.safetensors"):
        for file in study.rglob(name):
            file.unlink()
    page = Page(write_report(study))
    assert [tag for tag, _ in page.tags].count("svg") == 2  # the metric, whole and near the top
    assert "No run has a report.json" in page.texts["li"]
    assert "no training curves" in page.texts["li"]
    assert "no figures of scores" in page.texts["li"]
    shutil.rmtree(study / "runs")
    assert "far won" in Page(write_report(study)).texts["lead"]


def test_a_second_page_leaves_no_figure_of_the_first(study):
    figures = study / "report_figures"
    figures.mkdir()
    mine = figures / "mine.png"
    for file in (mine, figures / "09_collapse.png"):
        file.touch()
    shutil.rmtree(study / "runs")
    write_report(study)
    assert len(list((study / "report_figures").iterdir())) == 3
    assert mine.exists()


def test_agreement_is_the_intersection_over_the_union(written):
    masks = [RunFolder(written[0] / "runs" / f"{name}_seed=0").masks() for name in ("near_0.9", "far_0.5")]
    one, other = (torch.cat([mask.flatten() for _, mask in sorted(found.items())]) for found in masks)
    expected = int((one & other).sum()) / int((one | other).sum())
    assert 0 < expected < 1
    assert overlap(*masks) == expected
    assert overlap(masks[0], MaskSet({"other": one})) != overlap(masks[0], masks[0]) == 1
    assert overlap(*(MaskSet({"a": torch.zeros(3).bool()}) for _ in range(2))) == 1


def test_a_single_run_has_its_summary_layers_and_curves(study, tmp_path):
    run = study / "runs" / "dies_0.99_seed=1"
    path = write_report(run, tmp_path / "elsewhere" / "run.html")
    assert path == tmp_path / "elsewhere" / "run.html"
    page = Page(path)
    page.stands_alone()
    assert "dies() at 0.99" in page.texts["lead"]
    assert "1 of 3 layers collapsed (network.block1.conv.weight), 2 bottlenecks" in page.texts["lead"]
    assert "NONE, no input reaches the output" in page.texts["lead"]
    assert page.line("network.block1.conv.weight") == [
        "network.block1.conv.weight",
        "8x8",
        "0 / 64",
        "0.00%",
        "8 / 8",
        "COLLAPSED",
    ]
    assert page.texts["h3"] == "Density of each layeracc during trainingloss during trainingWidths before and after"
    assert "14 of 24 output channels are gone" not in page.texts["figcaption"]
    assert "10 of 24 output channels are gone"[2:] in page.texts["figcaption"]
    assert len(list((tmp_path / "elsewhere" / "run_figures").iterdir())) == 4
    assert "slicing masked units off" not in page.texts["all"]
    report = json.loads((run / "report.json").read_text())
    report["units"] = {"layers": {"conv": [3, 8]}, "sliced": False, "cost": {"params_kept": 1234, "macs_kept": 56789}}
    (run / "report.json").write_text(json.dumps(report))
    assert "1,234 parameters, 56,789 MACs per sample" in Page(write_report(run)).texts["all"]
    (run / "report.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert "no report.json" in Page(write_report(run)).texts["li"]


def test_a_network_that_lost_units_is_not_the_dense_one(tmp_path):
    for row, removed in (("whole", 0.0), ("half", 0.5)):
        add(tmp_path / "s", row, {}, 0, 0.9, removed=removed)
    for kind, removed in (("a", 0.2), ("b", 0.8), ("c", 0.4)):
        add(tmp_path / "s", "other", {"prune.kind": kind}, 0, 0.9, removed=removed)
    study = read_study(tmp_path / "s", "val/acc", "maximize")
    assert study.dense.cell.row == "whole"
    assert [group.cell.row for group in study.at({})] == ["half"]
    assert study.shown == [{"prune.kind": "b"}, {"prune.kind": "a"}]  # the smallest and the largest network
    page = Page(write_report(tmp_path / "s" / "runs" / "half__seed=0"))
    assert "0.5000 of all parameters" in page.texts["all"]


def test_scores_are_compared_at_one_seed_and_the_same_weights(written, tmp_path):
    page = Page(written[1])
    assert "Scores at sparsity 0.99, seed 0" in page.texts["all"]
    captions = page.texts["figcaption"]
    assert "near and far order the entries most alike (1.00)" in captions  # the test gives both the same scores
    assert "left of the line: far 0 %. Magnitudes are the scores of near" in captions
    for seed in range(2):
        add(tmp_path / "s", "near", {"prune.sparsity": 0.9}, seed, 0.9, criterion=plp.Magnitude())
        add(tmp_path / "s", "far", {"prune.sparsity": 0.9}, seed, 0.8, criterion=plp.SNIP())

    def seen():
        return scored(read_study(tmp_path / "s", "val/acc", "maximize"))

    assert [one.row for one in seen().alike] == ["near", "far"]
    (tmp_path / "s" / "runs" / "far_0.9_seed=0" / "scores.safetensors").unlink()
    assert seen().where == " at sparsity 0.9, seed 1"
    assert len(seen().alike) == 2
    run = RunFolder(tmp_path / "s" / "runs" / "far_0.9_seed=1")
    run.keep_scores(run.scores(), {"criterion": plp.SNIP(), "weights": "others"})
    assert [one.row for one in seen().alike] == ["near"]
    assert seen().notes == ["far scored other weights than near, so figures of magnitudes leave them out."]
    (tmp_path / "s" / "runs" / "near_0.9_seed=1" / "scores.safetensors").unlink()
    assert seen().where == " at sparsity 0.9, a seed of each row"
    for i in range(13):
        add(tmp_path / "s", f"row {i}", {"prune.sparsity": 0.9}, 1, 0.8, criterion=plp.SNIP())
    assert len(seen().found) == 12
    assert "left out are row 10, row 11 and row 12" in seen().notes[0]
    for file in tmp_path.rglob("near*/scores.safetensors"):
        file.unlink()
    assert seen().alike == []
    assert seen().notes[1:] == ["No row scores by Magnitude(), so no figure sets scores against magnitudes."]


def test_the_cost_table_says_what_latency_says(written):
    page = Page(written[1])
    kept = int((torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) >= 0.9).sum())
    assert "a masked network takes 1.05 times as long as the same one dense" in page.texts["all"]
    assert "so masks alone bring no speed-up" in page.texts["all"]
    assert "a device, 4 threads, batch of 2" in page.texts["all"]
    line = page.line("near", "0.9", table=1)
    assert line[4:] == ["2", "2.1", "1.05"]
    assert line[2].endswith("%)")
    assert kept > 0
    assert page.line("far", "0.9", table=1)[4:] == ["-", "-", "-"]


def test_pictures_that_runs_left_are_in_the_page(written, tmp_path):
    png = next((written[0] / "report_figures").glob("*.png")).read_bytes()
    for name, seed in (("a", 0), ("b", 0), ("b", 1), ("dense", 0)):
        add(tmp_path / "s", name, {} if name == "dense" else {"prune.sparsity": 0.9}, seed, 0.9, criterion=plp.SNIP())
        place = next((tmp_path / "s" / "runs").glob(f"{name}*_seed={seed}")) / "figures"
        place.mkdir()
        (place / "panels.png").write_bytes(png)
        (place / "panels.txt").write_text("Samples <1>\nThey look alike.")
    page = Page(write_report(tmp_path / "s"))
    page.stands_alone()
    assert page.texts["h3"].count("Samples <1>") == 3
    assert "Samples <1> (b, sparsity 0.9)" in page.texts["h3"]
    assert "Samples <1> (dense)" in page.texts["h3"]
    assert "They look alike." in page.texts["figcaption"]
    assert len(list((tmp_path / "s" / "report_figures").glob("*_panels.png"))) == 3
    page = Page(write_report(tmp_path / "s" / "runs" / "b_0.9_seed=1"))
    page.stands_alone()
    assert "Samples <1>" in page.texts["h3"]
    assert "Scores of the entries of this run" in page.texts["h3"]


def test_two_hundred_runs_stay_small(tmp_path):
    names = [f"network.encoder.layers.{i}.self_attention.out_projection.weight" for i in range(40)]
    folder = tmp_path / "large"
    for seed in range(3):
        for i in range(13):
            for s in (0.5, 0.8, 0.9, 0.95, 0.98):
                row = f"a row with a rather long name, number {i}"
                add(folder, row, {"prune.sparsity": s}, seed, 0.9 - i / 100, layers=names, epochs=60, masked=s == 0.98)
    for seed in range(5):
        add(folder, "dense", {}, seed, 0.95, layers=names)
    path = write_report(folder)
    assert len((folder / "results.jsonl").read_text().splitlines()) == 200
    page = Page(path)
    page.stands_alone()
    assert page.size < 5e6
    assert [tag for tag, _ in page.tags].count("svg") <= 18


def break_(study: Path, case: str) -> Path:
    run = study / "runs" / "far_0.9_seed=0"
    if case == "no folder":
        return study / "nowhere"
    if case == "other folder":
        return study / "runs"
    if case == "unfinished":
        (run / "result.json").unlink()
        return run
    if case == "empty":
        (study / "results.jsonl").write_text("")
    elif case == "not begun":
        (study / "results.jsonl").unlink()
    elif case == "half a line":
        text = (study / "results.jsonl").read_text()
        (study / "results.jsonl").write_text(text[:40] + "\n" + text)
    elif case == "no metric":
        (study / "results.jsonl").write_text('{"key": "a", "row": "a"}\n')
    elif case == "text":
        text = (study / "results.jsonl").read_text()
        (study / "results.jsonl").write_text(re.sub(r'"last": [0-9.]+', '"last": "high"', text))
    elif case == "report":
        (run / "report.json").write_text('{"layers": [')
    elif case == "layers":
        (run / "report.json").write_text('{"layers": [{"name": "w"}]}')
    elif case == "metrics":
        (run / "metrics.jsonl").write_text("[1]\n")
    elif case == "latency":
        (run / "report.json").write_text('{"latency": {"dense": [1, 2], "masked": [1, 2]}}')
    elif case in ("masks", "scores"):
        (study / "runs" / "far_0.99_seed=0" / f"{case}.safetensors").write_bytes(b"1234")
    elif case == "figure":
        (study / "runs" / "far_0.99_seed=0" / "figures").mkdir()
        (study / "runs" / "far_0.99_seed=0" / "figures" / "a.png").write_bytes(b"GIF")
    elif case == "result":
        (run / "result.json").write_text("{")
        return run
    return study


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("no folder", "no such folder"),
        ("other folder", "found neither"),
        ("unfinished", "a run that is not finished"),
        ("empty", "Expected finished runs .* found none"),
        ("not begun", "a study that has written no results yet"),
        ("half a line", "Expected a JSON record .*results.jsonl"),
        ("no metric", "without settings, seed"),
        ("text", "Expected a row, settings and numbers"),
        ("report", "Expected a JSON record .*report.json"),
        ("layers", "Expected the report of SparsityReport"),
        ("metrics", "Expected a JSON record .*metrics.jsonl"),
        ("latency", "Expected the report of SparsityReport"),
        ("masks", "Expected a file of masks .* damaged"),
        ("scores", "Expected a file of scores .* damaged"),
        ("figure", "Expected a PNG"),
        ("result", "Expected a JSON record .*result.json"),
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_is_written(study, case, found):
    folder = break_(study, case)
    with pytest.raises(PruneError, match=found):
        write_report(folder)
    assert not list(study.rglob("report.html"))
    assert not list(study.rglob("report_figures"))


def test_a_wrong_direction_is_refused(study):
    with pytest.raises(PruneError, match="'maximize' or 'minimize'; found 'up'"):
        write_report(study, direction="up")


def test_without_matplotlib_the_extra_is_named(study, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PruneError, match=r"pip install 'pl_prune\[report\]'"):
        write_report(study)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(written, tmp_path):
    shot = tmp_path / "shot.png"
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --window-size=800,2000"
    )
    command = ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    subprocess.run([*command, written[1].as_uri()], check=True, capture_output=True, timeout=60)
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 30_000


def test_the_robustness_of_a_run_is_on_its_page(study, tmp_path):
    run = shutil.copytree(study / "runs" / "dies_0.99_seed=1", tmp_path / "run")
    found = {"total": 10, "clean": 0.9, "robust": 0.4, "clean_interval": [0.6, 0.98], "robust_interval": [0.17, 0.69]}
    (run / "robustness.json").write_text(json.dumps({**found, "eps": 8 / 255, "norm": "linf", "preset": "fast"}))
    page = Page(write_report(run))
    page.stands_alone()
    assert "Accuracy without and under attack" in page.texts["h3"]
    assert "10 images; fast attacks" in page.texts["figcaption"]
