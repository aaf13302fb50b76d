"""`Search`: the points of a study that are chosen one after another, by what the earlier ones reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Literal, get_args

from pl_prune.core.types import PruneError
from pl_prune.runs.study_file import check_keys

Sampler = Literal["tpe", "random"]
Direction = Literal["maximize", "minimize"]
_KEYS = {"trials", "sampler", "seed", "space"}
_RANGE_KEYS = {"low", "high", "log", "step"}
_PATIENCE = 10  # points that TPE may repeat before one is drawn at random


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones where both ends and the step are whole.

    Args:
        low: The lower end.
        high: The upper end.
        log: Whether to spread them over the logarithm.
        step: Distance of neighbours; None for any number between, or every whole one.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return all(isinstance(n, int) for n in (self.low, self.high, self.step) if n is not None)

    def readable(self, number: float) -> float:
        """Return a number of the range with four digits, as people read and write it.

        Args:
            number: The number.

        Returns:
            It or a neighbour in the range; whole numbers and those of steps as they are.
        """
        if self.whole or self.step is not None:
            return number
        return min(max(float(f"{number:.4g}"), self.low), self.high)

    @property
    def size(self) -> int | None:
        """How many numbers it has; None for too many to count."""
        step = self.step or (1 if self.whole else None)
        return None if step is None else int((self.high - self.low) / step + 1e-9) + 1


@dataclass(frozen=True)
class Search:
    """Points that Optuna proposes.

    Args:
        trials: How many points every row of the study gets.
        space: Dotted key -> a list of choices, or a range.
        sampler: "tpe" (tree-structured Parzen estimator: ten points at random, then by what was reached) or "random".
        seed: Seed of the proposals. A row's n-th proposal follows from it and from what its earlier points reached, so
            that on one worker a study that was interrupted goes on as an undisturbed one.
    """

    trials: int
    space: dict[str, list[Any] | Range]
    sampler: Sampler = "tpe"
    seed: int = 0

    @classmethod
    def read(cls, content: Any, where: str) -> Search:
        """Read the key `search` of a study file.

        Args:
            content: What stands there.
            where: Names the file in errors.

        Returns:
            The search.

        Raises:
            PruneError: If a key is unknown, or a value is not of its kind.
        """
        if not isinstance(content, dict):
            raise PruneError(f"Expected search: {{trials, space}} in {where}; found {content!r}. Write both.")
        check_keys(content, _KEYS, f"search of {where}")
        trials, sampler, seed = (
            content.get(key, default) for key, default in (("trials", 0), ("sampler", "tpe"), ("seed", 0))
        )
        for key, number, least in (("trials", trials, 1), ("seed", seed, 0)):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise PruneError(f"Expected search.{key} of {least} or more; found {number!r}. Write a whole number.")
        if sampler not in get_args(Sampler):
            raise PruneError(f"Expected search.sampler of 'tpe' or 'random'; found {sampler!r}. Choose one.")
        space = content.get("space")
        if not isinstance(space, dict) or not space:
            raise PruneError(
                f"Expected search.space, dotted key: choices or {{low, high}}, in {where}; found {space!r}. Write at least one."
            )
        return cls(trials, {str(key): _dimension(str(key), value) for key, value in space.items()}, sampler, seed)

    def told(self) -> dict[str, Any]:
        """Return what must not change once points were proposed.

        Returns:
            Sampler, seed and space, as JSON has them.
        """
        space = {k: v if isinstance(v, list) else vars(v) for k, v in self.space.items()}
        plain: dict[str, Any] = json.loads(json.dumps({"sampler": self.sampler, "seed": self.seed, "space": space}))
        return plain

    @property
    def points(self) -> int:
        """How many points every row gets: `trials`, or all there are."""
        sizes = [len(d) if isinstance(d, list) else d.size for d in self.space.values()]
        return min(self.trials, prod(s for s in sizes if s is not None)) if None not in sizes else self.trials

    def ends(self) -> list[dict[str, Any]]:
        """Return points that together hold every choice and both ends of every range.

        Returns:
            Points of the space, by dotted key.
        """
        sides = {key: d if isinstance(d, list) else [d.low, d.high] for key, d in self.space.items()}
        longest = max(map(len, sides.values()))
        return [{key: found[min(i, len(found) - 1)] for key, found in sides.items()} for i in range(longest)]

    def propose(
        self, row: str, earlier: Sequence[tuple[Mapping[str, Any], float | None]], direction: Direction
    ) -> dict[str, Any]:
        """Propose the next point of a row.

        Args:
            row: Its name.
            earlier: Its earlier points in order, with what they reached; None for those that failed or are being run.
            direction: "maximize" or "minimize".

        Returns:
            A point that is not among the earlier ones; fewer than `points` of them must be there.
        """
        import optuna

        distributions = {key: _distribution(dimension) for key, dimension in self.space.items()}
        known = [
            optuna.trial.create_trial(
                params={k: d.index(point[k]) if isinstance(d, list) else point[k] for k, d in self.space.items()},
                distributions=distributions,
                value=value,
            )
            for point, value in earlier
            if value is not None
        ]
        attempt = -1
        while True:
            attempt += 1
            seed = _digest(self.seed, row, len(earlier), attempt)
            tpe = self.sampler == "tpe" and attempt < _PATIENCE
            sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
            study = optuna.create_study(sampler=sampler, direction=direction)
            study.add_trials(known)
            drawn = study.ask(distributions).params
            if attempt < 2 * _PATIENCE:  # else the range is narrower than four digits
                drawn = {k: d.readable(drawn[k]) if isinstance(d, Range) else drawn[k] for k, d in self.space.items()}
            point = {k: d[drawn[k]] if isinstance(d, list) else drawn[k] for k, d in self.space.items()}
            if point not in [dict(p) for p, _ in earlier]:
                return point

    def next_point(
        self, rows: Mapping[str, Sequence[tuple[Mapping[str, Any], float | None]]], direction: Direction
    ) -> tuple[str, dict[str, Any], int] | None:
        """Propose the next point of the row that has the fewest.

        Args:
            rows: Row -> its earlier points, as for `propose`.
            direction: "maximize" or "minimize".

        Returns:
            The row, its point and the point's number; None where every row has all.
        """
        row = min(rows, key=lambda name: len(rows[name]), default=None)
        if row is None or len(rows[row]) >= self.points:
            return None
        return row, self.propose(row, rows[row], direction), len(rows[row])


def _dimension(key: str, value: Any) -> list[Any] | Range:
    if isinstance(value, list) and value:
        if any(value.count(choice) > 1 for choice in value):
            raise PruneError(
                f"Expected different choices for search.space.{key}; found {value!r}. Leave out equal ones."
            )
        return list(json.loads(json.dumps(value)))  # as the database gives them back
    if not isinstance(value, dict):
        raise PruneError(
            f"Expected a list of choices or {{low, high, log, step}} for search.space.{key}; found {value!r}. Write one of them."
        )
    check_keys(value, _RANGE_KEYS, f"search.space.{key}")
    log = value.get("log", False)
    numbers: dict[str, Any] = {k: value.get(k) for k in ("low", "high", "step")}
    odd = [k for k, n in numbers.items() if (n is not None or k != "step") and not (_is_number(n) and isfinite(n))]
    if odd or not isinstance(log, bool):
        raise PruneError(
            f"Expected numbers for low, high and step, and true or false for log, in search.space.{key}; found {value!r}. "
            "Write 1.0e-3, not 1e-3, which YAML takes for a word."
        )
    low, high, step = numbers["low"], numbers["high"], numbers["step"]
    if low >= high or (step is not None and (step <= 0 or log)) or (log and low <= 0):
        raise PruneError(
            f"Expected low below high, a positive step without log, and a positive low with log, in search.space.{key}; "
            f"found {value!r}. Change one of them."
        )
    return Range(low, high, log, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distribution(dimension: list[Any] | Range) -> Any:
    import optuna

    if isinstance(dimension, list):
        return optuna.distributions.CategoricalDistribution(range(len(dimension)))
    if dimension.whole:
        low, high, step = int(dimension.low), int(dimension.high), int(dimension.step or 1)
        return optuna.distributions.IntDistribution(
            low, low + (high - low) // step * step, log=dimension.log, step=step
        )
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def _digest(*words: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:4], "big")
