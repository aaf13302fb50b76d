"""`pl-prune score`: the scores of a recipe, as a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def run(argv: Sequence[str]) -> int:
    """Score as `fit` would, write the scores, and train nothing.

    Args:
        argv: Arguments after `score`; those that are not its own are those of `fit`.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If the recipe does not score at the start of a fit, or with more than one callback.
    """
    parser = argparse.ArgumentParser(
        "pl-prune score",
        description="Score as `pl-prune fit` would, write the scores to a file, and train nothing. "
        "All other options are those of `pl-prune fit`.",
    )
    parser.add_argument("--out", required=True, help="the file to write, scores.safetensors say")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    options, rest = parser.parse_known_args(argv)

    from pl_prune.callbacks.base import pruning_callbacks
    from pl_prune.cli import Inspect
    from pl_prune.core.store import read_header, save_scores
    from pl_prune.core.types import PruneError
    from pl_prune.report.terminal import show_json

    class Score(Inspect):
        def fit(self, model: Any, **kwargs: Any) -> None:
            written = []

            def keep(scores: Any, about: dict[str, Any]) -> None:
                if self.trainer.is_global_zero:
                    save_scores(options.out, scores, {**about, "seed": self.config.fit.seed_everything})
                written.append(options.out)

            pruning = [cb for cb in pruning_callbacks(self.trainer) if cb.select is not None]
            for callback in pruning:
                callback.keep_scores = keep
            self.trainer.fit_loop.epoch_loop.max_steps = 0
            self.trainer.num_sanity_val_steps = 0
            if len(pruning) == 1:
                self.trainer.fit(model, **kwargs)
            if not written:
                raise PruneError(
                    f"Expected a recipe with one callback that scores at the start of the fit; found {len(pruning)} pruning callbacks "
                    f"({', '.join(cb.state_key for cb in pruning) or 'none'}), and no scores. Add `--prune PruneAtInit`, say."
                )
            if self.trainer.is_global_zero:
                header = read_header(options.out)
                told = {"scores": options.out, "selected": header["selected"], "digest": header["digest"]}
                text = f"{options.out}: {header['selected']:,} scores, {header['meta']['method']}"
                if options.json:
                    show_json(told, sys.stdout)
                else:
                    sys.stdout.write(text + "\n")

    Score(args=["fit", *rest])
    return 0
