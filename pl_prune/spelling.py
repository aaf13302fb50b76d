"""The name that was meant, where jsonargparse refuses a class or a setting under a key of ours."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args, get_type_hints

import pl_prune

_KEY = re.compile(r'Parser key "(\w+)"')
_HOLDER = re.compile(r"Problem with given class_path '([\w.]+)'")
_SETTING = re.compile(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)")
_CLASS = re.compile(r"dot import path string: (\S+)|module '[\w.]+' has no attribute '(\w+)'")
_GIVEN = re.compile(r"(?:Given value: |Import path |val=')(\w+(?:\.\w+)+)")
_GROUP = re.compile(r"Group '(\w+)' does not accept option '([\w.]+)'")
_INNER = re.compile(r"unrecognized arguments: --(\w+)\.(\w+)")
_TOP = re.compile(
    r"(?i)^(?:unrecognized arguments: |ambiguous option: |subcommand '\w+' does not accept option '|option ')-*([\w.]+)"
)


def explain(message: str, kinds: Mapping[str, type | None], options: Collection[str] = ()) -> str | None:
    """Say what was meant.

    Args:
        message: Of jsonargparse.
        kinds: Keys that hold a class, and of which kind; None where any will do.
        options: Dotted names that the parser knows.

    Returns:
        Expected, found and fix; None where the message is about something else.
    """
    if "does not correspond to a subclass" in message and (foreign := _foreign(message)):
        return foreign
    if top := _TOP.search(message):
        name, first = top[1], top[1].split(".")[0]
        group = [option for option in options if option.startswith(f"{first}.")]
        name = name if group else first
        close = closest(name, group or [*kinds, "weights"])
        return f"Expected a known key; found {name!r}. The closest name is {close!r}." if close else None
    key = _KEY.match(message)
    if key is None or key[1] not in kinds:
        return None
    path, holder = [key[1]], None
    expected: type | None = kinds[key[1]]
    for line in message.splitlines()[1:]:
        if found := _KEY.search(line):
            path.append(found[1])
            expected = _hint(holder, found[1])
        elif found := _HOLDER.search(line):
            holder = _load(found[1])
        elif (found := _SETTING.search(line)) and holder is not None:
            return _setting(".".join(path), holder, found[1])
        elif (found := _GROUP.search(line) or _INNER.search(line)) and (inner := _hint(holder, found[1])) is not None:
            return _setting(".".join([*path, found[1]]), inner, found[2])
        elif (found := _CLASS.search(line)) and expected is not None:
            return _class(".".join(path), expected, (found[1] or found[2]).rpartition(".")[2])
    return None


def _foreign(message: str) -> str | None:
    for name in _GIVEN.findall(message):
        cls = _load(name)
        if cls is not None and any(base.__module__.startswith("pytorch_lightning") for base in cls.__mro__):
            return (
                f"Expected a class of the package lightning; found {name!r}, of pytorch_lightning: the two do not mix in one project. "
                "Import from lightning.pytorch in place of pytorch_lightning, everywhere."
            )
    return None


def _class(path: str, kind: type, name: str) -> str:
    known = sorted(_subclasses(kind))
    close = closest(name, known)
    fix = f"The closest name is {close!r}." if close else f"There are {', '.join(known)}."
    return f"Expected a kind of {kind.__name__} under {path}; found {name!r}. {fix}"


def _setting(path: str, holder: type, name: str) -> str:
    known = [p for p in inspect.signature(holder).parameters if p != "self"]
    close = closest(name, known)
    if close:
        fix = f"The closest name is {close!r}."
    elif known:
        fix = f"It has {', '.join(known)}."
    else:
        fix = "It has none." + (" Choose the class first: `--prune=PruneAtInit`, say." if path == "prune" else "")
    return f"Expected a setting of {holder.__name__} under {path}; found {name!r}. {fix}"


def closest(name: str, known: list[str]) -> str | None:
    """Return the known name that is most like another, whatever the case of their letters.

    Args:
        name: As it was typed.
        known: What could have been meant.

    Returns:
        None if none is like it.

    >>> closest("snap", ["SNIP", "GraSP"])
    'SNIP'
    """
    folded = {one.casefold(): one for one in known}
    close = get_close_matches(name.casefold(), folded, 1)
    return folded[close[0]] if close else None


def _hint(holder: type | None, key: str) -> type | None:
    """Return the class that a constructor's argument holds."""
    if holder is None:
        return None
    hint = get_type_hints(holder.__init__).get(key) or get_type_hints(holder).get(key)
    return next((one for one in (hint, *get_args(hint)) if inspect.isclass(one) and one is not type(None)), None)


def _load(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if inspect.isclass(found) else None


def _subclasses(kind: type) -> set[str]:
    """Return the names that YAML may give: those of the package, and those of the user's imported classes."""
    public = set(pl_prune.__all__)
    found: set[str] = set()
    for one in kind.__subclasses__():
        found |= _subclasses(one)
        if not inspect.isabstract(one) and (one.__name__ in public or not one.__module__.startswith("pl_prune.")):
            found.add(one.__name__)
    return found
