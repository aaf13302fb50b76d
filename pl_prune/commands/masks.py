"""`pl-prune masks`: what a file of masks holds, and how two differ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def run(argv: Sequence[str]) -> int:
    """Show a file of masks, or compare two.

    Args:
        argv: Arguments after `masks`.

    Returns:
        Exit status: 0.
    """
    parser = argparse.ArgumentParser("pl-prune masks", description="Show a file of masks, or the difference of two.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what the file says of itself, and what is kept of each layer")
    show.add_argument("file", help="a file of masks")
    diff = commands.add_parser("diff", help="Hamming distance and intersection over union, in all and by layer")
    diff.add_argument("file", help="a file of masks")
    diff.add_argument("other", help="another one")
    for command in (show, diff):
        command.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.terminal import show_json

    found = _show(options.file) if options.command == "show" else _diff(options.file, options.other)
    if options.json:
        show_json(found, sys.stdout)
    else:
        sys.stdout.write(_text(found) + "\n")
    return 0


def _show(file: str) -> dict[str, Any]:
    from pl_prune.core.store import load_masks, read_header

    header, counts = read_header(file, "masks"), load_masks(file).counts()
    layers = {
        name: {"shape": header["shapes"][name], "kept": kept, "entries": total, "sparsity": 1 - kept / max(total, 1)}
        for name, (kept, total) in counts.items()
    }
    return {**{key: value for key, value in header.items() if key != "shapes"}, "layers": layers}


def _diff(file: str, other: str) -> dict[str, Any]:
    from pl_prune.core.store import load_masks

    one, two = load_masks(file), load_masks(other)
    total = {"hamming": one.hamming(two), "iou": _iou(one, two)}
    parts = {name: (one.subset([name]), two.subset([name])) for name in one}
    layers = {
        name: {"hamming": a.hamming(b), "iou": _iou(a, b), "kept": [m.counts()[name][0] for m in (a, b)]}
        for name, (a, b) in parts.items()
    }
    return {"files": [file, other], **total, "sparsity": [one.sparsity(), two.sparsity()], "layers": layers}


def _iou(one: Any, two: Any) -> float:
    """Return kept by both over kept by either; 1 where nothing is."""
    both = sum(int((one[name] & two[name].to(one[name].device)).sum()) for name in one)
    either = sum(masks.counts()[name][0] for masks in (one, two) for name in masks) - both
    return both / either if either else 1.0


def _text(found: dict[str, Any]) -> str:
    from pl_prune.report.table import columns

    if "files" in found:
        rows = [
            (name, f"{layer['hamming']:.4f}", f"{layer['iou']:.4f}", *(f"{kept:,}" for kept in layer["kept"]))
            for name, layer in found["layers"].items()
        ]
        table = columns([("parameter", "Hamming", "IoU", "kept in A", "kept in B"), *rows])
        a, b = (f"{file} (sparsity {s:.6g})" for file, s in zip(found["files"], found["sparsity"], strict=True))
        return f"{table}\n\nA  {a}\nB  {b}\nHamming distance {found['hamming']:.6f}, intersection over union {found['iou']:.6f}"
    rows = [
        (
            name,
            "x".join(map(str, layer["shape"])),
            f"{layer['kept']:,} / {layer['entries']:,}",
            f"{layer['sparsity']:.4f}",
        )
        for name, layer in found["layers"].items()
    ]
    table = columns([("parameter", "shape", "kept", "sparsity"), *rows])
    told = [(key, found[key]) for key in ("sparsity", "selected", "kept", "digest", "libraries")]
    lines = [
        f"{key:<14}  {value if isinstance(value, (str, int, float)) else json.dumps(value)}"
        for key, value in [*told, *found["meta"].items()]
    ]
    return "\n".join([table, "", *lines])
