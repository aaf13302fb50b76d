"""The rooms of the project: who may import what, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pl_prune

PACKAGE = Path(pl_prune.__file__).parent
ALLOWED = {
    "core": set(),
    "criteria": {"core"},
    "structure": {"core"},
    "optim": {"core"},
    "report": {"core"},
    "runs": {"core"},
    "adversarial": {"core", "optim"},
    "callbacks": {"core", "criteria", "structure", "optim", "report", "runs", "adversarial"},
    "data": {"core"},
    "models": {"core"},
}
ALLOWED["commands"] = set(ALLOWED)
WITH_LIGHTNING = {"callbacks", "data", "models", "commands"}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_the_rooms_below_it(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pl_prune" and len(parts) > 1 and parts[1] in ALLOWED:
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{room} imports {name}"
        if parts[0] in ("lightning", "pytorch_lightning"):
            assert room in WITH_LIGHTNING, f"{room} imports {name}"
        assert "callbacks" not in parts[1:2] or room in ("callbacks", "commands")


def test_files_stay_small():
    sizes = {p.name: len(p.read_text().splitlines()) for p in FILES}
    assert len(sizes) > 20
    assert {name: n for name, n in sizes.items() if n > 300} == {}


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, pl_prune; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_resolves_and_is_documented():
    for name in pl_prune.__all__:
        thing = getattr(pl_prune, name)
        assert name == "__version__" or thing.__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        pl_prune.no_such_name  # noqa: B018
