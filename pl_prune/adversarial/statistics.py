"""Accuracies with intervals, and the comparison of two models on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from pl_prune.core.types import PruneError

_Z = 1.959963984540054  # two-sided 95 %


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion.

    Args:
        successes: How many succeeded.
        total: Of how many, at least 1.

    Returns:
        Lower and upper end, in [0, 1].

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference; without continuity correction.

    >>> [round(end, 3) for end in wilson(50, 100)]
    [0.404, 0.596]
    """
    share, z2 = successes / total, _Z**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    return middle - half if successes else 0.0, middle + half if successes < total else 1.0


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the probability of a difference at least as large if neither of two models were better.

    Args:
        only_first: Images that the first model alone gets right.
        only_second: Images that the second model alone gets right.

    Returns:
        The two-sided p value of the exact binomial test.

    Source:
        McNemar, Note on the sampling error of the difference between correlated proportions; here exact.

    >>> mcnemar(1, 5)
    0.21875
    """
    count = only_first + only_second
    tail = ways = 1  # of choosing none
    for chosen in range(1, min(only_first, only_second) + 1):
        ways = ways * (count - chosen + 1) // chosen
        tail += ways
    return min(1.0, 2 * tail / (1 << count))


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same images under the same attack.

    Args:
        only_first: Images that the first model alone gets right under attack.
        only_second: Images that the second model alone gets right under attack.
        total: Images in all.
    """

    only_first: int
    only_second: int
    total: int

    @property
    def difference(self) -> float:
        """Robust accuracy of the first less that of the second."""
        return (self.only_first - self.only_second) / self.total

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test, two-sided."""
        return mcnemar(self.only_first, self.only_second)

    def text(self) -> str:
        """Return the comparison in one line.

        Returns:
            Difference in percentage points, discordant images and p value.
        """
        return (
            f"difference {100 * self.difference:+.2f} points ({self.only_first} images only by the first, {self.only_second} only by the "
            f"second, of {self.total}), exact McNemar p = {self.p_value:.3g}"
        )


@dataclass(frozen=True)
class RobustAccuracy:
    """What an evaluation found.

    Args:
        settings: eps, norm, preset, seed, chunk_size and the version of the attacks.
        images: Digest of images and labels; only results of the same ones can be compared.
        correct: Whether each image is classified correctly.
        survived: The same after each attack, in the order in which they ran.
    """

    settings: Mapping[str, Any]
    images: str
    correct: tuple[bool, ...] = field(repr=False)
    survived: Mapping[str, tuple[bool, ...]] = field(repr=False)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.correct)

    @property
    def flags(self) -> tuple[bool, ...]:
        """Whether each image is classified correctly under every attack."""
        return [self.correct, *self.survived.values()][-1]

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return sum(self.correct) / self.total

    @property
    def robust(self) -> float:
        """Accuracy under every attack."""
        return sum(self.flags) / self.total

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `clean`."""
        return wilson(sum(self.correct), self.total)

    @property
    def robust_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `robust`."""
        return wilson(sum(self.flags), self.total)

    @property
    def after(self) -> dict[str, float]:
        """Accuracy after each attack, in order."""
        return {name: sum(flags) / self.total for name, flags in self.survived.items()}

    def compare(self, other: RobustAccuracy) -> PairedComparison:
        """Compare with another model, image by image.

        Args:
            other: Of the same images under the same attack.

        Returns:
            Where the two differ; `self` is the first.

        Raises:
            PruneError: If images or attack differ.
        """
        if self.images != other.images or self.settings != other.settings:
            what = "images" if self.images != other.images else "settings"
            raise PruneError(
                f"Expected two results of the same images under the same attack; found other {what}. "
                "Evaluate both models with the same x, y, eps, norm, preset, seed and chunk_size."
            )
        pairs = list(zip(self.flags, other.flags, strict=True))
        return PairedComparison(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain containers.

        Returns:
            Settings, accuracies with their intervals, and the flags as strings of 0 and 1.
        """
        return {
            **self.settings,
            "total": self.total,
            "clean": self.clean,
            "clean_interval": list(self.clean_interval),
            "robust": self.robust,
            "robust_interval": list(self.robust_interval),
            "after": self.after,
            "images": self.images,
            "correct": write_flags(self.correct),
            "survived": {name: write_flags(flags) for name, flags in self.survived.items()},
        }

    def text(self) -> str:
        """Return the result as a few lines.

        Returns:
            Clean accuracy, accuracy after each attack, and the settings.
        """
        eps, norm = self.settings["eps"], self.settings["norm"]
        rows = [("clean", self.correct), *self.survived.items()]
        lines = [f"{self.total} images, {norm} eps {eps:.4g} ({255 * eps:.3g}/255), preset {self.settings['preset']}"]
        for name, flags in rows:
            low, high = wilson(sum(flags), self.total)
            lines.append(
                f"{name if name == 'clean' else 'after ' + name:<14} {100 * sum(flags) / self.total:6.2f} %  "
                f"(95 %: {100 * low:.2f} to {100 * high:.2f})"
            )
        return "\n".join(lines)


def write_flags(flags: tuple[bool, ...]) -> str:
    """Write flags as a string.

    Args:
        flags: One for each image.

    Returns:
        A digit for each.

    >>> write_flags((True, False)), read_flags("10")
    ('10', (True, False))
    """
    return "".join("1" if flag else "0" for flag in flags)


def read_flags(text: str) -> tuple[bool, ...]:
    """Read what `write_flags` wrote.

    Args:
        text: A digit for each image.

    Returns:
        The flags.
    """
    return tuple(letter == "1" for letter in text)
