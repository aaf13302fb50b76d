"""`RunFolder`: the files of one training, which is finished or not, and never half."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pl_prune.core.archive import installed_version, whole_file
from pl_prune.core.masks import MaskSet
from pl_prune.core.metrics import read_records
from pl_prune.core.store import load_masks, load_scores, save_masks, save_scores
from pl_prune.core.types import PruneError, Scores
from pl_prune.runs.lock import locked

_PACKAGES = ("pl_prune", "torch", "lightning", "torchvision", "torchmetrics", "torch-pruning", "numpy")


class RunFolder:
    """One run: configuration, environment, metrics, scores, masks, and a result that is there whole or not at all.

    | file | what |
    |---|---|
    | config.yaml | the resolved configuration |
    | environment.json | versions, machine, threads, device |
    | metrics.jsonl | a line for each epoch: epoch, step and metrics |
    | scores.safetensors | the scores that the masks were made from (`load_scores`) |
    | masks.safetensors | the masks in force at the end, one bit an entry (`load_masks`) |
    | unit_scores.safetensors | the scores of whole units, by layer, where those are pruned (`load_scores`) |
    | unit_masks.safetensors | which of them stay (`load_masks`) |
    | report.json | what `SparsityReport` writes |
    | checkpoints/ | Lightning's checkpoints; last.ckpt is resumed from |
    | asked.json | what the study asked of the run |
    | log.txt | warnings and messages, of a run of a study |
    | result.json | written last: the run is finished |
    | lock | held by the process that runs it |

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """Read the result.

        Returns:
            What `finish` was given.

        Raises:
            PruneError: If the folder is not a run, or the run is not finished.
        """
        if not self.finished:
            is_run = (self.path / "environment.json").is_file()
            raise PruneError(
                f"Expected a finished run in {str(self.path)!r}; found {'one that is not finished' if is_run else 'no run'}. "
                + (
                    "Run its command again, with --ckpt_path checkpoints/last.ckpt of that folder where there is one."
                    if is_run
                    else "Name the folder that holds the result.json of a `pl-prune fit`."
                )
            )
        return self._read("result.json")

    def report(self) -> dict[str, Any]:
        """Read the report of `SparsityReport`.

        Returns:
            Layers, cost, path, zeros and metrics; empty where the run had no such callback.
        """
        return self._read("report.json") if (self.path / "report.json").is_file() else {}

    def metrics(self) -> list[dict[str, float]]:
        """Read the metrics.

        Returns:
            A record for each epoch; a last line that was cut off by a crash is left out.

        Raises:
            PruneError: If another line is damaged.
        """
        file = self.path / "metrics.jsonl"
        return read_records(file) if file.is_file() else []

    def scores(self) -> Scores | None:
        """Read the scores.

        Returns:
            The scores that the masks were made from; None for a dense run, and for one that made its masks of none.
        """
        file = self.path / "scores.safetensors"
        return load_scores(file) if file.is_file() else None

    def masks(self) -> MaskSet | None:
        """Read the masks.

        Returns:
            The masks in force at the end; None for a dense run.
        """
        file = self.path / "masks.safetensors"
        return load_masks(file) if file.is_file() else None

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint; None before there is one."""
        found = sorted(self.path.glob("checkpoints/last*.ckpt"), key=lambda p: p.stat().st_mtime)
        return found[-1] if found else None

    def begin(self, step: int) -> None:
        """Start or go on: write the environment, and drop the metrics of steps that will be done again.

        Args:
            step: Optimizer steps that the checkpoint had done; 0 for a new run.
        """
        kept = [record for record in self.metrics() if record["step"] <= step] if step else []
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        write_whole(self.path / "environment.json", json.dumps(environment(), indent=1))

    def log(self, record: Mapping[str, float]) -> None:
        """Append the metrics of an epoch; what is known of the last one already is kept beside them.

        Args:
            record: With the keys epoch and step.
        """
        file, found = self.path / "metrics.jsonl", self.metrics()
        if found and all(found[-1].get(key) == record.get(key) is not None for key in ("epoch", "step")):
            lines = [*found[:-1], {**found[-1], **record}]
            write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
            return
        with file.open("a") as lines_so_far:
            lines_so_far.write(json.dumps(record) + "\n")

    def keep_scores(self, scores: Scores, meta: Mapping[str, Any]) -> None:
        """Write the scores.

        Args:
            scores: What the masks are made from.
            meta: Where they come from.
        """
        save_scores(self.path / "scores.safetensors", scores, meta)

    def keep_units(self, scores: Scores, masks: MaskSet, meta: Mapping[str, Any]) -> None:
        """Write the scores of whole units, and which of them stay.

        Args:
            scores: By layer.
            masks: By layer.
            meta: Where they come from.
        """
        save_scores(self.path / "unit_scores.safetensors", scores, meta)
        save_masks(self.path / "unit_masks.safetensors", masks, meta)

    def finish(self, result: Mapping[str, Any], masks: MaskSet, meta: Mapping[str, Any] | None = None) -> None:
        """Write the masks, then the result.

        Args:
            result: What `json.dumps` takes.
            masks: The masks in force; none for a dense run.
            meta: Where they come from.
        """
        if masks:
            save_masks(self.path / "masks.safetensors", masks, meta)
        write_whole(self.path / "result.json", json.dumps(result, indent=1))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against every other process of this machine; a lock ends with its process.

        Yields:
            None.
        """
        with locked(self.path / "lock"):
            yield

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
            if isinstance(content, dict):
                return content
            raise ValueError(f"a {type(content).__name__}")
        except ValueError as error:
            raise PruneError(
                f"Expected a record in {str(self.path / name)!r}; found something else ({error}). Delete the file and run again."
            ) from error


def write_whole(file: Path, text: str) -> None:
    """Write a file such that it is there whole or not at all.

    Args:
        file: Where to; its folder is made if need be.
        text: The content.
    """
    with whole_file(file) as part:
        part.write_text(text)


def environment() -> dict[str, Any]:
    """Return what a run's numbers may depend on.

    Returns:
        Versions, machine, threads and device.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := installed_version(name))},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
