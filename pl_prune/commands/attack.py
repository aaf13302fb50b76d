"""`pl-prune attack`: the accuracy of a checkpoint under attack."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pl_prune.adversarial.corruptions import CorruptionAccuracy
    from pl_prune.adversarial.statistics import RobustAccuracy

    _Found: TypeAlias = "tuple[list[RobustAccuracy], list[CorruptionAccuracy]]"


def run(argv: Sequence[str]) -> int:
    """Attack the test images of a run's recipe.

    Args:
        argv: Arguments after `attack`; those that are not its own go to the recipe's parser, as those of `fit` do.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If there is no recipe, or the model cannot be attacked.
    """
    options, rest = _parser().parse_known_args(argv)
    from pl_prune.core.types import PruneError
    from pl_prune.report.terminal import show_json

    files = [Path(file) for file in (options.ckpt, options.against) if file]
    if options.picture and not Path(options.picture).parent.is_dir():
        where = str(Path(options.picture).parent)
        raise PruneError(f"Expected a folder {where!r} for the picture; found none. Make it, or name a file elsewhere.")
    words = [word for file in options.config or [] for word in ("--config", file)]
    if not words:
        recipe = _run_of(files[0]) / "config.yaml"
        if not recipe.is_file():
            raise PruneError(
                f"Expected the run's config.yaml at {str(recipe)!r}; found none. Name the recipe that {options.ckpt!r} was trained by: "
                "--config recipe.yaml."
            )
        words = ["--config", str(recipe)]
    found = _attack(files, [*words, *rest, "--weights=null"], options)
    if found is not None:
        told, text = _told(files, *found)
        if options.picture:
            from pl_prune.report.robustness import robustness_bars

            Path(options.picture).write_bytes(robustness_bars({m["ckpt"]: m for m in told["models"]}).png)
        if options.json:
            show_json(told, sys.stdout)
        else:
            sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pl-prune attack",
        description="Clean and robust accuracy of a checkpoint on its recipe's test images, which are in [0, 1]. Further options are "
        "those of `pl-prune fit`, --trainer.devices=2 say.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", required=True, help="a checkpoint of a run, a state_dict, or .safetensors")
    parser.add_argument("--config", action="append", help="the recipe; default: config.yaml of the checkpoint's run")
    parser.add_argument("--against", help="another checkpoint of the same recipe, to compare with image by image")
    parser.add_argument("--eps", type=_fraction, default=8 / 255, help="radius of the attacks (default 8/255)")
    parser.add_argument("--preset", default="fast", help="fast (default), standard (AutoAttack), untargeted or pgd")
    parser.add_argument("--norm", default="linf", help="linf (default) or l2")
    parser.add_argument("--images", type=int, help="attack only so many images, in a fixed random order")
    parser.add_argument("--seed", type=int, default=0, help="of that order and of the attacks' random starts")
    parser.add_argument("--chunk-size", type=int, default=250, help="images attacked at a time (default 250)")
    parser.add_argument("--folder", help="where chunks and robustness.json go; default: the checkpoint's run")
    parser.add_argument("--corruptions", help="folder of CIFAR-10-C: accuracy on corrupted images too")
    parser.add_argument("--severity", type=int, default=3, help="of the corruptions (default 3)")
    parser.add_argument("--picture", help="file: draw clean and robust accuracy, with intervals, as PNG")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number, 0.031 or 8/255; found {text!r}") from None


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _attack(files: Sequence[Path], words: Sequence[str], options: argparse.Namespace) -> _Found | None:
    """Attack one checkpoint after another; return nothing on ranks other than 0."""
    from lightning.pytorch.callbacks import ProgressBar

    from pl_prune.adversarial.corruptions import corruption_accuracy
    from pl_prune.callbacks.robustness import RobustnessEvaluation
    from pl_prune.cli import PruneCLI
    from pl_prune.core.files import load_weights

    def judge(file: Path) -> RobustnessEvaluation:
        folder = options.folder or (str(_run_of(file)) if (_run_of(file) / "config.yaml").is_file() else None)
        settings = (options.eps, options.preset, options.norm, options.images, options.seed, options.chunk_size)
        return RobustnessEvaluation(*settings, None, folder)

    judges = [judge(file) for file in files]  # before any work, since they refuse bad settings
    corrupted: list[CorruptionAccuracy] = []
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    class Attack(PruneCLI):
        """Parse a recipe for `fit`, and attack the test images instead of training."""

        def before_instantiate_classes(self) -> None:
            self.config.fit.trainer.logger = False
            self.config.fit.trainer.enable_model_summary = False
            self.save_config_callback = None

        def fit(self, model: Any, **kwargs: Any) -> None:
            bars = [cb for cb in self.trainer.callbacks if isinstance(cb, ProgressBar)]  # type: ignore[attr-defined]
            for file, evaluation in zip(files, judges, strict=True):
                load_weights(model, file)
                self.trainer.callbacks = [*bars, evaluation]  # type: ignore[attr-defined]
                self.trainer.test(model, datamodule=kwargs.get("datamodule"), verbose=False)
                if options.corruptions and self.trainer.is_global_zero:
                    corrupted.append(corruption_accuracy(model, options.corruptions, options.severity))

    done = Attack(args=["fit", *words])
    if not done.trainer.is_global_zero:
        return None
    return [evaluation.result for evaluation in judges if evaluation.result is not None], corrupted


def _told(
    files: Sequence[Path], results: Sequence[RobustAccuracy], corrupted: Sequence[CorruptionAccuracy]
) -> tuple[dict[str, Any], str]:
    """Return what is printed, as JSON's containers and as text."""
    models, parts = [], []
    for place, (file, result) in enumerate(zip(files, results, strict=True)):
        models.append({"ckpt": str(file), **result.to_dict()})
        parts.append(f"{file}\n{result.text()}")
        if corrupted:
            models[-1]["corruptions"] = {**corrupted[place].by_name, "mean": corrupted[place].mean}
            parts.append(corrupted[place].text())
    told: dict[str, Any] = {"models": models}
    if len(results) == 2:
        paired = results[0].compare(results[1])
        told["comparison"] = {**asdict(paired), "difference": paired.difference, "p_value": paired.p_value}
        parts.append(paired.text())
    return told, "\n\n".join(parts)
