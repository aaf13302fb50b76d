"""`Stages`: robust pretraining, mask search and fine-tuning, each a run that starts from the one before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from pl_prune.core.types import PruneError
from pl_prune.runs.asked import check_unchanged
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.spec import Spec
from pl_prune.runs.study_file import check_keys, files, mapping, read

NAMES = ("pretrain", "search", "finetune")
_PROTOCOL = {"eps", "preset", "norm", "images", "seed", "chunk_size"}


@dataclass(frozen=True)
class Stages:
    """The stages of one arm.

    Args:
        name: Names the arm and its folder.
        specs: The stages in order; `weights_of` is the stage before, or a file of weights.
        evaluate: How robustness is measured: settings of `RobustnessEvaluation`.
    """

    name: str
    specs: Sequence[Spec]
    evaluate: Mapping[str, Any]

    @classmethod
    def load(
        cls,
        path: str | Path,
        weights: str | None = None,
        seed: int | None = None,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Stages:
        """Read a stage file.

        Args:
            path: A YAML file.
            weights: A file of weights that takes the place of the stage `pretrain`; None: what the file says.
            seed: Of all stages; None: those of the configuration.
            more: Stage -> settings by dotted key, over those of the file.

        Returns:
            The stages.

        Raises:
            PruneError: If the file is missing, is not YAML, has an unknown key or no stage, or names a file that is not there.
        """
        file = Path(path)
        content = read(file, {"name", "config", "set", "weights", "evaluate", "stages"})
        told = mapping(content.get("stages"), f"stages of {str(file)!r}, name: {{config, set}}")
        check_keys(told, set(NAMES), f"stages of {str(file)!r}")
        if weights is not None:
            told.pop("pretrain", None)
        elif content.get("weights") is not None and "pretrain" in told:
            raise PruneError(
                f"Expected `weights` or the stage pretrain in {str(file)!r}; found both. Leave out one of the two."
            )
        if not told:
            raise PruneError(
                f"Expected stages among {', '.join(NAMES)} in {str(file)!r}; found none. Write at least one."
            )
        if absent := sorted(set(more or {}) - set(told)):
            raise PruneError(
                f"Expected settings of the stages {', '.join(told)}; found some of {absent[0]!r}. Leave them out, or add that stage."
            )
        evaluate = mapping(content.get("evaluate"), "evaluate, setting of RobustnessEvaluation: value")
        check_keys(evaluate, _PROTOCOL, f"evaluate of {str(file)!r}")
        shared = tuple(files(content.get("config"), file, "config"))
        values = mapping(content.get("set"), "set, dotted key: value")
        source = weights if weights is not None else content.get("weights")
        specs: list[Spec] = []
        for name in (name for name in NAMES if name in told):
            stage = mapping(told[name], f"stage {name!r} to be {{config, set}}")
            check_keys(stage, {"config", "set"}, f"stage {name!r}")
            own = mapping(stage.get("set"), f"set of stage {name!r}, dotted key: value")
            specs.append(
                Spec(
                    key=name,
                    row=name,
                    settings={},
                    seed=seed or 0,
                    config=(*shared, *files(stage.get("config"), file, f"stage {name!r}")),
                    values={
                        **values,
                        **own,
                        **(more or {}).get(name, {}),
                        **({} if seed is None else {"seed_everything": seed}),
                    },
                    weights_of=specs[-1].key if specs else source,
                )
            )
        return cls(str(content.get("name", file.stem)), specs, evaluate)

    def check(self, folder: Path) -> None:
        """Raise if what is in a folder was not made by these stages.

        Args:
            folder: Holds a run's folder for each stage.

        Raises:
            PruneError: If a stage was begun under other settings, or before the one that it starts from was finished.
        """
        begun = [spec for spec in self.specs if _begun(folder / spec.key)]
        for spec in begun:
            check_unchanged(spec, RunFolder(folder / spec.key))
        for before, spec in pairwise(self.specs):
            if spec in begun and not RunFolder(folder / before.key).finished:
                raise PruneError(
                    f"Expected {before.key!r} to be finished, from which {spec.key!r} in {str(folder)!r} started; found that it is not. "
                    f"Put {str(folder / before.key)!r} back, or delete {str(folder / spec.key)!r}, which belongs to another one."
                )

    def ready(self, spec: Spec, folder: Path) -> Spec:
        """Hand a stage what it starts from.

        Args:
            spec: The stage.
            folder: Holds a run's folder for each stage.

        Returns:
            The stage with the weights and running statistics of the one before, unless it goes on from its own checkpoint,
            and with the masks that `search` ended with.

        Raises:
            PruneError: If the stage before has left no checkpoint or no masks.
        """
        begun = _begun(folder / spec.key)
        if spec.weights_of in NAMES:
            return handed(spec, folder / spec.weights_of, spec.weights_of == "search", begun)
        return replace(spec, values={**spec.values, **({} if begun else {"weights": spec.weights_of})})


def handed(spec: Spec, source: Path, masks: bool, begun: bool) -> Spec:
    """Hand a run the network that another ended with.

    Args:
        spec: The run.
        source: The folder of the other.
        masks: Whether it keeps to the other's masks.
        begun: Whether it goes on from a checkpoint of its own.

    Returns:
        The run with weights, running statistics and masks, as far as it needs them.

    Raises:
        PruneError: If the other has left no checkpoint or no masks.
    """
    pruned = {"prune": {"class_path": "pl_prune.PruneAtInit", "init_args": _masks(source)}} if masks else {}
    weights = {} if begun else {"weights": str(network(source))}
    return replace(spec, values={**spec.values, **pruned, **weights})


def network(folder: Path) -> Path:
    """Find the network that a finished run ended with.

    Args:
        folder: The run's folder.

    Returns:
        Its best.ckpt, where its pruning callback wrote one; else its last checkpoint.

    Raises:
        PruneError: If there is none, or it is of an earlier step than the last, whose masks may be others.
    """
    best, last = folder / "best.ckpt", RunFolder(folder).checkpoint
    if best.is_file():
        return best
    if last is None:
        raise PruneError(
            f"Expected the last checkpoint of {folder.name!r} in {str(folder / 'checkpoints')!r}; found none. "
            f"Put it back, or delete {str(folder)!r} to do that stage again."
        )
    saved = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    if saved != (steps := RunFolder(folder).result()["steps"]):
        raise PruneError(
            f"Expected {str(last)!r} to be of step {steps}, the last of {folder.name!r}; found step {saved}. "
            f"Let ModelCheckpoint save after every epoch, and training end with one; then delete {str(folder)!r} and run again."
        )
    return last


def settings(words: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read settings of single stages.

    Args:
        words: --STAGE.KEY=VALUE each.

    Returns:
        Stage -> settings by dotted key.

    Raises:
        PruneError: If a word is none.

    >>> settings(["--search.prune.sparsity=0.95"])
    {'search': {'prune.sparsity': 0.95}}
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        match = re.fullmatch(rf"--({'|'.join(NAMES)})\.([^=]+)=(.*)", word, re.DOTALL)
        if match is None:
            raise PruneError(
                f"Expected options of `pl-prune adversarial`, or of one stage as --search.prune.sparsity=0.95; found {word!r}. "
                f"The stages are {', '.join(NAMES)}."
            )
        found.setdefault(match[1], {})[match[2]] = yaml.safe_load(match[3])
    return found


def _begun(folder: Path) -> bool:
    run = RunFolder(folder)
    return run.finished or run.checkpoint is not None


def _masks(search: Path) -> dict[str, Any]:
    masks, config = search / "masks.safetensors", search / "config.yaml"
    for file, what in ((masks, "masks"), (config, "the configuration")):
        if not file.is_file():
            raise PruneError(
                f"Expected {what} of {search.name!r} at {str(file)!r}, for fine-tuning; found none. "
                "Give that stage a `prune` that makes masks, pl_prune.ScoreLearning or pl_prune.S2AP say, or put the file back."
            )
    learned = yaml.safe_load(config.read_text())["prune"].get("init_args", {})
    return {"masks": str(masks), **{name: learned[name] for name in ("select",) if name in learned}}
