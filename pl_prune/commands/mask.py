"""`pl-prune mask`: masks of any number of sparsities from one file of scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn


def run(argv: Sequence[str]) -> int:
    """Select at every sparsity, and write a file for each.

    Args:
        argv: Arguments after `mask`.

    Returns:
        Exit status: 0.
    """
    from jsonargparse import ArgumentParser

    import pl_prune
    from pl_prune.core.allocate import Allocation, Global
    from pl_prune.core.budgets import nested_masks
    from pl_prune.core.store import check_use, load_scores, read_header, save_masks
    from pl_prune.core.types import describe
    from pl_prune.report.table import columns
    from pl_prune.report.terminal import show_json
    from pl_prune.spelling import explain

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            meant = explain(message, {"allocation": Allocation})
            if meant is None:
                super().error(message, ex)
            self.exit(2, f"pl-prune mask: error: {meant}\n")

    for home in pl_prune._HOMES:
        if home.startswith("core."):  # whose allocations go by their short names
            import_module(f"pl_prune.{home}")
    parser = Parser(
        "pl-prune mask", description="Make masks of any number of sparsities from one file of scores; they are nested."
    )
    parser.add_argument("--scores", required=True, help="a file of scores, of `pl-prune score` or of a run")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[], help="fractions to prune, 0.9 0.95 0.98 say")
    parser.add_argument("--allocation", type=Allocation, default=Global(), help="where the kept entries go")
    parser.add_argument("--out-dir", default=".", help="where the files masks-SPARSITY.safetensors go")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    options = parser.instantiate_classes(parser.parse_args(list(argv)))

    header = read_header(options.scores, "scores")
    for sparsity in options.sparsity:
        check_use(options.scores, header, options.allocation, sparsity)
    found = nested_masks(options.allocation, load_scores(options.scores), options.sparsity)
    origin = {**header["meta"], "allocation": options.allocation, "scores": header["digest"]}
    written, rows = [], []
    for sparsity, masks in found.items():
        file = Path(options.out_dir) / f"masks-{sparsity}.safetensors"
        method = f"scores of file {header['digest'][:12]} at sparsity {sparsity}, {describe(options.allocation)}"
        save_masks(file, masks, {**origin, "method": method, "sparsity": sparsity})
        counts = masks.counts().values()
        kept, empty = sum(kept for kept, _ in counts), sum(kept == 0 < total for kept, total in counts)
        written.append({"masks": str(file), "sparsity": sparsity, "kept": kept, "empty_layers": empty})
        rows.append((str(file), f"{sparsity}", f"{kept:,} / {header['selected']:,}", f"{empty}"))
    text = columns([("masks", "sparsity", "kept", "empty layers"), *rows])
    if options.json:
        show_json(written, sys.stdout)
    else:
        sys.stdout.write(text + "\n")
    return 0
