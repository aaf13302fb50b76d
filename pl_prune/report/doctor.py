"""What is installed, what is missing, and what will not work together."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import requires
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pl_prune.core.archive import installed_version
from pl_prune.report.table import Alarm, Facts, Part, Table

_NEEDED = {"torch": ((2, 6), None), "lightning": ((2, 6), (2, 7)), "safetensors": ((0, 4), None)}


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
    versions = {"python": platform.python_version()}
    versions |= {
        name: found for name in ("pl_prune", *_NEEDED, "pytorch-lightning") if (found := installed_version(name))
    }
    problems = []
    for name, (least, below) in _NEEDED.items():
        numbers = tuple(int(n) for n in re.findall(r"\d+", versions.get(name, "0"))[:2])
        if numbers < least or (below is not None and numbers >= below):
            end = f", below {'.'.join(map(str, below))}" if below else ""
            problems.append(
                f"{name} {versions.get(name, 'missing')}: needed is {'.'.join(map(str, least))} or newer{end}. Install that."
            )
    if versions.get("pytorch-lightning", versions.get("lightning")) != versions.get("lightning"):
        problems.append(
            f"lightning {versions.get('lightning')} beside pytorch-lightning {versions['pytorch-lightning']}: callbacks of one do not fit "
            "the Trainer of the other. Import from lightning.pytorch alone, and install both in one version."
        )
    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    threads = torch.get_num_threads()
    extras, others = _extras()
    return Findings(versions, [f"cpu, {threads} thread{'s' * (threads != 1)}", *cuda], extras, [*problems, *others])


def _extras() -> tuple[dict[str, list[str]], list[str]]:
    """Return the missing packages of each extra, as the package's own metadata list them, and those of other versions."""
    extras: dict[str, list[str]] = {}
    others: dict[str, None] = {}
    for line in requires("pl_prune") or []:
        needed = Requirement(line)
        extra = re.search(r"extra == [\'\"](\w+)", str(needed.marker))
        if extra and canonicalize_name(needed.name) != "pl-prune" and extra[1] not in ("all", "dev", "docs"):
            missing, found = extras.setdefault(extra[1], []), installed_version(needed.name)
            if not found:
                missing.append(needed.name)
            elif not needed.specifier.contains(found, prereleases=True):
                others[
                    f"{needed.name} {found}: needed is {needed.specifier}. Run pip install 'pl_prune[{extra[1]}]'."
                ] = None
    return extras, list(others)
