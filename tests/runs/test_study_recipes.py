"""Every study file can be run: its plan is whole, and the command line takes what its rows ask for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace
from refusal import expect_refusal

from pl_prune.cli import PruneCLI
from pl_prune.runs.plan import Plan
from pl_prune.runs.sweep import as_sweep

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "studies").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def test_there_is_a_study_for_every_table():
    found = {p.relative_to(ROOT / "recipes" / "studies").with_suffix("").as_posix() for p in FILES}
    assert {f"pai/table_a{n}" for n in range(3, 22)} <= found
    tables = {name.split("/")[1].split("_")[1] for name in found if name.startswith("yopo/table_")}
    assert tables == {"1", "3", "4", "5", "6", "7", "8", "9"}  # table 2 is that of `pl-prune transfer`
    ippro = {name.removeprefix("ippro/") for name in found if name.startswith("ippro/")}
    assert ippro == {  # figures 2 and 5 are those of benchmarks/channels.py
        "table_1_resnet50", "table_1_mobilenetv2", "table_2_resnet56", "table_2_vgg19", "table_3_resnet50", "table_3_resnet56",
        "table_4", "table_5_resnet56", "table_5_vgg19", "figure_7", "small_cifar10",
    }  # fmt: skip
    hesso = {name.removeprefix("hesso/") for name in found if name.startswith("hesso/")}
    assert hesso == {"table_1", "table_4", "table_6", "table_7", "table_8", "small_cifar10"}
    s2ap = {name.removeprefix("s2ap/") for name in found if name.startswith("s2ap/")}
    nets, small = ("resnet18", "vgg16", "wrn28_4"), ("resnet18", "vgg16")
    assert s2ap == {
        *(f"tables_{n}_5_{net}_{data}" for net in nets for n, data in ((1, "cifar10"), (2, "svhn"))),
        *(f"table_8_{net}_{data}" for net in nets for data in ("cifar10", "svhn")),
        *(f"table_{n}_{net}" for n in (9, 10) for net in small),
        *(f"table_{n}_{net}" for n in (11, 13) for net in nets),
        *("table_3", "table_4", "table_12", "small_digits"),
    }  # tables 6 and 7 are those of pretrained networks and of benchmarks/adversarial.py
    assert {"yopo/rank", "yopo/mad_std_cifar10", "yopo/mad_std_cifar100", "digits"} <= found


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_study_is_planned(file):
    plan = Plan.load(file)
    specs = plan.specs()
    assert len(specs) == len(plan.seeds) * sum(len(plan.points(row)) for row in plan.rows)
    assert {spec.row for spec in specs} == set(plan.rows)
    folder = file.parent.name
    assert plan.name == (file.stem if folder == "studies" else f"{folder}_{file.stem}")
    first = file.read_text().split("\nname:")[0].splitlines()
    assert all(line.startswith("#") for line in first)
    assert f"--config {file.relative_to(ROOT).as_posix()}" in "\n".join(first)
    if any(map(plan.source, plan.rows)):
        with expect_refusal("for a sweep", "weights_of"):
            as_sweep(plan)
    else:
        sweep = as_sweep(plan)
        swept = [values["values"] for values in sweep["parameters"].values()]
        points = {json.dumps(plan.points(row)) for row in plan.rows if plan.varies(row)}
        assert len(points) == 1
        assert len(swept[0]) == sum(len(plan.points(row)) for row in plan.rows)
        assert swept[-1] == list(plan.seeds)


class Parser(PruneCLI):
    """The parser of `fit` alone: twice as fast as that of the whole command, which asks it."""

    def parse_arguments(self, parser, args):
        raise StopIteration(self._subcommand_parsers["fit"])


def the_parser():
    with pytest.raises(StopIteration) as caught:
        Parser(args=["fit"])
    return caught.value.value


@pytest.mark.parametrize(
    ("study", "found"),
    [
        ("hesso/table_8", {"saliency": {"kind": "taylor2", "preset": "paper"}, "cric": {"preset": "paper"}}),
        ("pai/table_a3", {"samples": {"per_class": 5000}}),
        ("yopo/rank", {"criterion": {"class_path": "pl_prune.YOPO"}}),
    ],
)
def test_the_command_line_takes_the_settings_of_a_sweep(study, found, tmp_path):
    sweep = as_sweep(Plan.load(ROOT / "recipes" / "studies" / f"{study}.yaml"))
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"prune": sweep["parameters"]["prune"]["values"][-1]}))
    config = the_parser().parse_args([*sweep["command"][3:-1], str(args)]).prune.init_args
    for key, expected in found.items():
        assert expected.items() <= vars(getattr(config, key)).items()


def test_the_command_line_takes_every_row_and_every_setting():
    parser = the_parser()
    seen, parsed = set(), 0
    for file in FILES:
        plan = Plan.load(file)
        for row, told in plan.rows.items():
            keys = sorted({*plan.points(row)[0]} - {"prune.sparsity", "prune.bn_warmup"})
            told_set = {k: v if isinstance(v, str) else type(v).__name__ for k, v in (told["set"] or {}).items()}
            kinds = {json.dumps([plan.config, plan.set]), json.dumps([told["config"], told_set, keys])}
            if kinds <= seen:
                continue
            seen |= kinds
            spec = [s for s in plan.specs() if s.row == row][-1]
            config = parser.parse_args(spec.words)
            parsed += 1
            assert config["seed_everything"] == spec.seed
            for key, value in spec.values.items():
                found = config
                for part in key.removesuffix("+").split("."):
                    if isinstance(found, list):  # the callback that was last when this was set
                        found = [cb for cb in found if part in cb.init_args][-1]
                    found = getattr(found, "init_args", found)[part]
                found = found[-1] if key.endswith("+") else found
                found = found.as_dict() if isinstance(found, Namespace) else found
                if isinstance(found, dict) and "class_path" in found:
                    assert found["class_path"].endswith(
                        (value if isinstance(value, str) else value["class_path"]).split(".")[-1]
                    )
                else:
                    assert (list(found) if isinstance(found, tuple) else found) == value, (file, row, key)
    assert parsed > 20
