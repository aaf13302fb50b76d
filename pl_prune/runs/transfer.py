"""The runs that show whether masks move between data sets and initialisations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pl_prune.core.store import load_masks
from pl_prune.core.types import PruneError, check_sparsity
from pl_prune.runs.asked import asked
from pl_prune.runs.folder import write_whole
from pl_prune.runs.plan import Plan
from pl_prune.runs.spec import Spec

SOURCE = "source"
_OTHER_ORDER = 10_000
"""Added to a seed, it gives the same run another order of batches."""


@dataclass(frozen=True)
class TransferPlan(Plan):
    """Trainings for the Dataset-Transfer Index and the Initialization-Independence Index.

    Args:
        data: Data set -> configuration files laid over the recipe; the source first, without any.
        criteria: Label -> value of `--prune.criterion`.
        sparsities: Of the masks.
        folder: Where initial weights, scores, masks and runs lie.
    """

    data: dict[str, list[str]] = field(default_factory=dict)
    criteria: dict[str, str] = field(default_factory=dict)
    sparsities: tuple[float, ...] = ()
    folder: Path = Path()

    def check(self) -> None:
        """Raise if no index could come of it.

        Raises:
            PruneError: If there is no target, criterion or sparsity, a sparsity is out of range, or seeds are fewer than two.
        """
        for what, values in (
            ("--targets", list(self.data)[1:]),
            ("--criteria", self.criteria),
            ("--sparsity", self.sparsities),
        ):
            if not values:
                raise PruneError(f"Expected at least one value of {what}; found none. Name one.")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise PruneError(
                f"Expected two or more different --seeds, since masks move from one to the next; found {list(self.seeds)}. Name more."
            )

    def settle(self, allocation: str) -> None:
        """Note what the folder's weights, scores and masks are made with.

        Args:
            allocation: Where the kept entries go.

        Raises:
            PruneError: If those that are there were made with something else; they would be taken for these.
        """
        file = self.folder / "prepared.json"
        files = {data: (*self.config, *more) for data, more in self.data.items()}
        now = {"--allocation": allocation}
        for data, config in files.items():
            found = asked(Spec(key=data, row=data, settings={}, seed=0, config=config, values={}))["config"]
            now[f"configuration of {data}"] = ", ".join(f"{name} {digest}" for name, digest in found.items())
        told = json.loads(file.read_text()) if file.is_file() else {}
        then = {what: value for what, value in told.items() if self._used(what)}
        if odd := [what for what in now if then.get(what, now[what]) != now[what]]:
            old, new = ("; ".join(f"{what} {side[what]}" for what in odd) for side in (then, now))
            raise PruneError(
                f"Expected what the masks in {str(self.folder)!r} were made with, {old}; found {new}. "
                "Give the changed study another --folder, put it back, or delete the folder."
            )
        write_whole(file, json.dumps({**then, **now}, indent=1) + "\n")

    def _used(self, what: str) -> bool:
        """Say whether anything has been made with an entry of `prepared.json`."""
        if what == "--allocation":
            return any(self.folder.glob("scores/*"))
        data = what.removeprefix("configuration of ")
        return any(file.name.startswith(f"{data}_seed=") for file in self.folder.glob("weights/*"))

    def weights(self, data: str, seed: int) -> Path:
        """Return the file of a seed's initial weights: the same for all data sets, but for a head of another shape.

        Args:
            data: The data set.
            seed: The seed.

        Returns:
            A path in the folder.
        """
        return self.folder / "weights" / f"{data}_seed={seed}.safetensors"

    def scores(self, label: str, data: str, seed: int) -> Path:
        """Return the file of a criterion's scores.

        Args:
            label: The criterion.
            data: The data set.
            seed: The seed of the weights.

        Returns:
            A path in the folder.
        """
        return self.folder / "scores" / f"{label}_{data}_seed={seed}.safetensors"

    def masks(self, label: str, data: str, sparsity: float, seed: int) -> Path:
        """Return the file of masks.

        Args:
            label: The criterion.
            data: The data set that was scored on.
            sparsity: Of the masks.
            seed: The seed of the weights that were scored.

        Returns:
            A path in the folder.
        """
        return self.folder / "masks" / f"{label}_{data}_{sparsity}_seed={seed}.safetensors"

    def arms(self) -> list[tuple[dict[str, Any], Spec]]:
        """List the trainings; two that would be the same run share it.

        Returns:
            What a training is for (criterion, dataset, sparsity, seed, arm, digest of its masks), and its run, seed
            after seed.
        """
        digests: dict[Path, str] = {}
        found = []
        for place, seed in enumerate(self.seeds):
            other = self.seeds[(place + 1) % len(self.seeds)]
            for label in self.criteria:
                for data in self.data:
                    for sparsity in self.sparsities:
                        own, source = (self.masks(label, d, sparsity, seed) for d in (data, SOURCE))
                        for file in (own, source):
                            if file not in digests:
                                digests[file] = load_masks(file).digest()
                        same = digests[own] == digests[source]
                        arms = {
                            "own": (own, seed, seed),
                            "reused": (own if same else source, seed, seed),
                            "again": (own, seed, seed + _OTHER_ORDER),
                            "cross": (own, other, seed),
                        }
                        for arm, (masks, init, order) in arms.items():
                            about = {
                                "criterion": label,
                                "dataset": data,
                                "sparsity": sparsity,
                                "seed": seed,
                                "arm": arm,
                            }
                            name = "own" if arm == "reused" and same else arm
                            key = f"{label}_{data}_{sparsity}_seed={seed}_{name}"
                            found.append((
                                {**about, "masks": digests[masks]},
                                self._run(key, f"{label} {data} {name}", data, masks, init, order, sparsity),
                            ))
        return found

    def _run(self, key: str, row: str, data: str, masks: Path, init: int, order: int, sparsity: float) -> Spec:
        prune = {"class_path": "pl_prune.PruneAtInit", "init_args": {"masks": str(masks)}}
        return Spec(
            key=key,
            row=row,
            settings={"sparsity": sparsity},
            seed=order,
            config=(*self.config, *self.data[data]),
            values={
                **self.set,
                "prune": prune,
                "weights": str(self.weights(data, init)),
                "seed_everything": order,
            },
        )

    def specs(self) -> list[Spec]:
        """List the runs.

        Returns:
            Each once.
        """
        return list({spec.key: spec for _, spec in self.arms()}.values())
