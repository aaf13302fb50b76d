"""What is installed, what is missing, and what will not work together."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pl_prune.core.archive import installed_version
from pl_prune.report.table import Alarm, Facts, Part, Table


@dataclass(frozen=True)
class Findings:
    """What a look at the environment found.

    Args:
        versions: Version by package; Python among them.
        devices: What torch can run on.
        extras: Missing packages of each extra; none where the extra is complete.
        problems: What will not work, and what to do.
    """

    versions: dict[str, str]
    devices: list[str]
    extras: dict[str, list[str]]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data.

        Returns:
            What `json.dumps` takes.
        """
        return asdict(self)

    def parts(self) -> list[Part]:
        """Return it for a terminal.

        Returns:
            What `show` renders.
        """
        extras = [
            (
                f"extra {name}",
                "complete" if not missing else f"missing {', '.join(missing)}: pip install 'pl_prune[{name}]'",
            )
            for name, missing in self.extras.items()
        ]
        problems: list[Part] = [Alarm(f"PROBLEM: {problem}") for problem in self.problems]
        return [
            Table(("package", "version"), list(self.versions.items())),
            "",
            Facts([("devices", ", ".join(self.devices))]),
            "",
            Facts(extras),
            "",
            *(problems or ["no problem found"]),
        ]


def examine() -> Findings:
    """Look at the environment.

    Returns:
        What is there.
    """
    versions = {"python": platform.python_version(), "pl_prune": installed_version("pl_prune")}
    extras: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for extra, needed in _requirements():
        name, found = needed.name, installed_version(needed.name)
        fix = f"Run pip install 'pl_prune[{extra}]'." if extra else "Install that."
        if extra:
            extras.setdefault(extra, []).extend([] if found else [name])
        elif found:
            versions[name] = found
        if (found and not needed.specifier.contains(found, prereleases=True)) or not (found or extra):
            problems.setdefault(name, f"{name} {found or 'missing'}: needed is {needed.specifier}. {fix}")
    if found := installed_version("pytorch-lightning"):
        versions["pytorch-lightning"] = found
    if versions.get("pytorch-lightning", versions.get("lightning")) != versions.get("lightning"):
        problems["pytorch-lightning"] = (
            f"lightning {versions.get('lightning')} beside pytorch-lightning {versions['pytorch-lightning']}: callbacks of one do not fit "
            "the Trainer of the other. Import from lightning.pytorch alone, and install both in one version."
        )
    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    threads = torch.get_num_threads()
    return Findings(versions, [f"cpu, {threads} thread{'s' * (threads != 1)}", *cuda], extras, list(problems.values()))


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield what the package's own metadata list: the extra that it is for, empty if it is for all, and the requirement."""
    for line in requires("pl_prune") or []:
        needed = Requirement(line)
        extra = re.search(r"extra == [\'\"](\w+)", str(needed.marker))
        if canonicalize_name(needed.name) != "pl-prune" and not (extra and extra[1] in ("all", "dev", "docs")):
            yield extra[1] if extra else "", needed
