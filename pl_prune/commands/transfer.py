"""`pl-prune transfer`: whether masks move to other data and to other initial weights."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_prune.runs.transfer import TransferPlan


def run(argv: Sequence[str]) -> int:
    """Score, make masks, train every arm, and compute DTI and I3.

    Args:
        argv: Arguments after `transfer`.

    Returns:
        Exit status: 0; 1 if a run failed or is left.

    Raises:
        PruneError: If two data sets have one name, or a target's file is missing.
    """
    parser = argparse.ArgumentParser(
        "pl-prune transfer",
        description="Make masks on a source data set, train with them on targets and from other initial weights, and compare with the "
        "targets' own masks: Dataset-Transfer Index, Initialization-Independence Index, and the noise of training. "
        "An interrupted study goes on where it was.",
    )
    parser.add_argument(
        "--config", required=True, action="append", help="recipe of network, source data and training; may repeat"
    )
    parser.add_argument(
        "--targets", nargs="+", default=[], help="files that say the data, and the number of classes, of a target"
    )
    parser.add_argument("--sparsity", nargs="+", type=float, default=[], help="fractions to prune")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two or more (default 0 1 2)")
    parser.add_argument(
        "--criteria",
        nargs="+",
        default=["YOPO", "SNIP", "HutchinsonPruning"],
        help="names of criteria (default YOPO SNIP HutchinsonPruning)",
    )
    parser.add_argument("--allocation", default="Global", help="where the kept entries go (default Global)")
    parser.add_argument("--metric", default="val/acc", help="an accuracy in [0, 1], or a loss (default val/acc)")
    parser.add_argument("--direction", choices=("maximize", "minimize"), default="maximize")
    parser.add_argument("--folder", default="transfer", help="where everything goes (default transfer)")
    parser.add_argument("--storage", help="URL of a database, for several machines; default: a file in the folder")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default 1)")
    parser.add_argument("--json", action="store_true", help="print the indices as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    from pl_prune.commands.study import train, unfinished
    from pl_prune.core.types import PruneError
    from pl_prune.report.table import Table
    from pl_prune.report.terminal import finite, show, show_json
    from pl_prune.report.transfer import Training, risk, transfer_cells, transfer_content, transfer_rows
    from pl_prune.runs.folder import write_whole
    from pl_prune.runs.lock import locked
    from pl_prune.runs.study import Study
    from pl_prune.runs.transfer import SOURCE, TransferPlan

    folder = Path(options.folder)
    names = [SOURCE, *(Path(file).stem for file in options.targets)]
    if odd := sorted({name for name in names if names.count(name) > 1}):
        raise PruneError(
            f"Expected files of --targets whose names differ, and none called {SOURCE!r}; found {', '.join(odd)} more than once. "
            "Rename a file: results are shown by its name."
        )
    if lost := [file for file in options.targets if not Path(file).is_file()]:
        raise PruneError(f"Expected files of --targets; found none at {', '.join(lost)}. Look at the path.")
    plan = TransferPlan(
        name="transfer",
        rows={},
        seeds=tuple(options.seeds),
        metric=options.metric,
        direction=options.direction,
        config=tuple(options.config),
        data={SOURCE: [], **{Path(file).stem: [file] for file in options.targets}},
        criteria={name: name for name in options.criteria},
        sparsities=tuple(options.sparsity),
        folder=folder,
    )
    plan.check()
    import lightning.pytorch  # noqa: F401, which would set the levels anew

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainings say what they have to say in their logs
        with locked(folder / "preparing", wait=True):  # machines that start together would mix their files up
            plan.settle(options.allocation)
            _prepare(plan, options.allocation)
    study = Study(plan, folder, options.storage)
    if not train(study, options.workers, ["transfer", *argv]):
        return 2
    if options.worker:
        return 0
    last = {record["key"]: risk(record["last"], plan.direction) for record in study.results()}
    cells = transfer_cells([Training(**about, risk=last[spec.key]) for about, spec in plan.arms() if spec.key in last])
    content = finite(transfer_content(cells))
    write_whole(folder / "transfer.json", json.dumps(content, indent=1) + "\n")
    if cells:
        _draw(cells, folder)
    if options.json:
        show_json(content, sys.stdout)
    else:
        head, *rows = transfer_rows(cells)
        show([Table(head, rows), *unfinished(study)], sys.stdout)
    return 1 if len(study.results()) < study.total else 0


def _prepare(plan: TransferPlan, allocation: str) -> None:
    """Make initial weights, scores and masks, so far as they are not there."""
    from pl_prune.core.store import read_header

    for seed in plan.seeds:
        for data in plan.data:
            _weights(plan, data, seed)
        for label, criterion in plan.criteria.items():
            for data in plan.data:
                made = [plan.masks(label, data, sparsity, seed) for sparsity in plan.sparsities]
                if all(file.is_file() for file in made):
                    continue
                scores = plan.scores(label, data, seed)
                for sparsity in plan.sparsities:
                    rounds = read_header(scores)["meta"].get("rounds", 1) if scores.is_file() else None
                    if rounds is None or rounds > 1:  # whose scores are those of one sparsity
                        _score(plan, criterion, data, seed, allocation, sparsity, scores)
                    _mask(scores, allocation, sparsity, plan.masks(label, data, sparsity, seed))


def _words(plan: TransferPlan, data: str, seed: int) -> list[str]:
    files = [word for file in (*plan.config, *plan.data[data]) for word in ("--config", file)]
    return [*files, f"--seed_everything={seed}"]


def _weights(plan: TransferPlan, data: str, seed: int) -> None:
    from safetensors.torch import save_file

    from pl_prune.cli import Inspect
    from pl_prune.core.archive import whole_file
    from pl_prune.runs.transfer import SOURCE

    file = plan.weights(data, seed)
    if file.is_file():
        return

    class Build(Inspect):
        def fit(self, model: Any, **kwargs: Any) -> None:
            with whole_file(file) as part:
                save_file({name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}, part)

    start = [] if data == SOURCE else [f"--weights={plan.weights(SOURCE, seed)}", "--new_head=true"]
    Build(args=["fit", *_words(plan, data, seed), *start])


def _score(
    plan: TransferPlan, criterion: str, data: str, seed: int, allocation: str, sparsity: float, out: Path
) -> None:
    from pl_prune.commands import score

    prune = ["--prune=PruneAtInit", f"--prune.criterion={criterion}", f"--prune.sparsity={sparsity}"]
    start = [f"--prune.allocation={allocation}", f"--weights={plan.weights(data, seed)}"]
    sys.stderr.write(f"pl-prune transfer: scores by {criterion} on {data}, seed {seed}\n")
    with contextlib.redirect_stdout(io.StringIO()):
        score.run([*_words(plan, data, seed), *prune, *start, "--out", str(out)])


def _mask(scores: Path, allocation: str, sparsity: float, out: Path) -> None:
    from pl_prune.commands import mask

    words = [
        "--scores",
        str(scores),
        f"--allocation={allocation}",
        "--sparsity",
        str(sparsity),
        "--out-dir",
        str(out.parent),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        mask.run(words)
    (out.parent / f"masks-{sparsity}.safetensors").replace(out)


def _draw(cells: Sequence[Any], folder: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write("pl-prune transfer: no picture without matplotlib: pip install 'pl_prune[report]'\n")
        return
    from pl_prune.report.attached import save_figure
    from pl_prune.report.transfer_picture import transfer_picture

    save_figure(folder, transfer_picture(cells))
